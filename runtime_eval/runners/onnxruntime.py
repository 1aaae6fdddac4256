"""Runs a model file in ONNX Runtime with all optimizations, on the requested execution provider."""

from __future__ import annotations

import base64
import json
import re
import tempfile
import time
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from crqat.core.errors import ToolError
from crqat.core.results.benchmark import NodeTime
from crqat.runtime_eval.runners import Description

# An optimization rounds a Conv's float bias to int32 in units of s_x s_w. In a float16 file, such as TensorRT's, that
# product underflows and the bias is lost: a CIFAR-10 ResNet-20 fell from 91.6 % to 89.3 % (ONNX Runtime 1.32, 1,000
# images).
_FLOAT16_BIAS = "WeightBiasQuantization"

# An ONNX file with one QuantizeLinear from a float16 "x" to an int8 "y", scale 1.
_FLOAT16_QUANTIZER = base64.b64decode(
    "CAk6WAocCgF4CgFzCgF6EgF5Ig5RdWFudGl6ZUxpbmVhchIBZyoJEApCAXNKAgA8KggQA0IBekoBAFoPCgF4EgoKCAgKEgQKAggBYg8KAXkSCgoI"
    "CAMSBAoCCAFCBAoAEBM="
)


def float16_is_rounded() -> bool:
    """Return whether the installed ONNX Runtime rounds, instead of truncating, when it quantizes float16 values.

    Version 1.23.2, the last for Python 3.10, truncates. A file with float16 quantizers, such as one for TensorRT, then
    has another accuracy: 90.8 % instead of 92.5 % for a ResNet-20 on the digits (797 images).
    """
    session = ort.InferenceSession(_FLOAT16_QUANTIZER, providers=["CPUExecutionProvider"])
    (codes,) = session.run(["y"], {"x": np.array([0.75], np.float16)})
    return bool(codes[0] == 1)


_WARM_UP, _PROFILED_LEAST, _PROFILED_SECONDS = 3, 10, 0.3
# The suffix of a node's computation in the profile, and the suffix that the optimizer adds to a node's own name.
_KERNEL = "_kernel_time"
_ADDED = re.compile(r"(_nchwc|_token_\d+)+$")


class OnnxRuntimeRunner:
    """`Runner` for a file that takes "input" and returns "logits", both float32 with the batch first.

    For a file whose metadata names the target "tensorrt", the optimization "WeightBiasQuantization", which breaks such
    files, is disabled.

    Args:
        path: The ONNX file.
        provider: ONNX Runtime's name of the execution provider.
        threads: Number of threads within one operator; operators run one after another.

    Raises:
        ToolError: ONNX Runtime refuses the file, or would run it on another provider.
    """

    def __init__(self, path: Path, provider: str, threads: int) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors only: a warning could pass for a crashed process's last message
        if provider not in ort.get_available_providers():
            msg = (
                f"this onnxruntime has no {provider}, only {', '.join(ort.get_available_providers())}; "
                "install the onnxruntime package that has it or choose another provider"
            )
            raise ToolError(msg)
        self._path = path
        try:
            self._session = ort.InferenceSession(str(path), options, providers=[provider])
            if self._session.get_modelmeta().custom_metadata_map.get("crqat.target") == "tensorrt":
                self._session = ort.InferenceSession(
                    str(path), options, providers=[provider], disabled_optimizers=[_FLOAT16_BIAS]
                )
        except Exception as error:  # ONNX Runtime's exception classes share no public base
            msg = f"ONNX Runtime does not load {path.name}: {error}"
            raise ToolError(msg) from error
        # An installed provider can still fail to start, for example without its driver; ONNX Runtime then uses the CPU.
        self._provider = self._session.get_providers()[0]
        if self._provider != provider:
            msg = f"ONNX Runtime runs {path.name} on {self._provider}, not on {provider}; check the device's driver"
            raise ToolError(msg)

    def __enter__(self) -> OnnxRuntimeRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._session

    def infer(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return float32 logits [N, classes] of normalized float32 images [N, C, H, W]."""
        logits: npt.NDArray[np.float32] = self._session.run(["logits"], {"input": images})[0]
        return logits

    def compute_seconds(self) -> None:
        """Return None, because ONNX Runtime does not report the device's compute time."""
        return

    def node_times(self, image: npt.NDArray[np.float32]) -> list[NodeTime]:
        """Return the time of each node of the optimized graph, from a separate session with ONNX Runtime's profiler.

        Args:
            image: Normalized image, float32 [1, C, H, W].
        """
        with tempfile.TemporaryDirectory() as folder:
            options = self._session.get_session_options()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = ort.InferenceSession(str(self._path), options, providers=[self._provider])
            for _ in range(_WARM_UP):
                session.run(["logits"], {"input": image})
            end, runs = time.perf_counter() + _PROFILED_SECONDS, 0
            while runs < _PROFILED_LEAST or time.perf_counter() < end:
                session.run(["logits"], {"input": image})
                runs += 1
            events = json.loads(Path(session.end_profiling()).read_text())
        times: dict[tuple[str, str, str], list[float]] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
                name, told = _ADDED.sub("", event["name"].removesuffix(_KERNEL)), event["args"]
                times.setdefault((told["node_index"], name, told["op_name"]), []).append(float(event["dur"]))
        return [
            NodeTime(name, operation, float(np.median(own[_WARM_UP:]))) for (_, name, operation), own in times.items()
        ]

    def describe(self) -> Description:
        """Return ONNX Runtime's version, the execution provider and the file's metadata."""
        metadata = dict(self._session.get_modelmeta().custom_metadata_map)
        return Description("onnxruntime", ort.__version__, self._provider, metadata)
