"""Runs a model file on OpenVINO's CPU plugin, whose low-precision passes compute quantized layers in INT8."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import openvino

from crqat.core.errors import ToolError
from crqat.core.results.benchmark import Int8Layers
from crqat.runtime_eval.runners import Description, onnx_header

DEVICE = "CPU"
# The plugin's names of the layers that multiply, and the precisions that count as INT8.
_MATMULS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
_INT8 = ("i8", "u8")
_INFO = ("layerType", "runtimePrecision", "originalLayersNames")


class OpenVINORunner:
    """`Runner` for a file that takes "input" and returns "logits", both float32 with the batch first.

    The runner sets float32 for operations that are not INT8, as in ONNX Runtime; on a CPU with AMX, the plugin would
    otherwise compute them in bfloat16.

    Args:
        path: The ONNX file.
        threads: Number of threads that one inference may use.

    Raises:
        ToolError: OpenVINO refuses the file.
    """

    def __init__(self, path: Path, threads: int) -> None:
        properties = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        self._metadata = onnx_header.read(path)
        try:
            core = openvino.Core()
            self._model = core.compile_model(core.read_model(path), DEVICE, properties)
            self._request = self._model.create_infer_request()
        except Exception as error:  # OpenVINO raises RuntimeError and pybind11's own
            msg = f"OpenVINO does not load {path.name}: {' '.join(str(error).split())}"
            raise ToolError(msg) from error

    def __enter__(self) -> OpenVINORunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._request, self._model

    def infer(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return float32 logits [N, classes] of normalized float32 images [N, C, H, W]."""
        logits: npt.NDArray[np.float32] = self._request.infer({"input": images})["logits"].copy()
        return logits

    def compute_seconds(self) -> None:
        """Return None, because OpenVINO does not report the device's compute time."""
        return

    def node_times(self, _image: npt.NDArray[np.float32]) -> None:
        """Return None: the time of each node is not measured in OpenVINO."""
        return

    def describe(self) -> Description:
        """Return OpenVINO's version, device and the file's metadata, with the number of layers computed in INT8."""
        layers, rest = 0, []
        for node in self._model.get_runtime_model().get_ordered_ops():
            info = {key: value.astype(str) for key, value in node.get_rt_info().items() if key in _INFO}
            if info["layerType"] in _MATMULS:
                layers += 1
                if info["runtimePrecision"] not in _INT8:
                    rest.append(info["originalLayersNames"].split(",")[0] or node.get_friendly_name())
        version = openvino.__version__.partition("-")[0]
        return Description("openvino", version, DEVICE, self._metadata, Int8Layers(layers - len(rest), layers, rest))
