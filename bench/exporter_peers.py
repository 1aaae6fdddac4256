"""Exporters from a float network to a quantized ONNX file: NNCF, Model-Optimizer and ONNX Runtime.

Each exporter is used as its documentation shows for convolutional networks, with its defaults, on the calibration
images of crqat's file. Each runs in a separate process: Model-Optimizer replaces parts of ONNX Runtime's quantizer in
its process, and an exporter that crashes or hangs does not affect the others.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

from crqat.train.placement.nncf_layout import without_extension

BATCH = 64  # calibration images in a batch
TIME_LIMIT_SECONDS = 1200.0


@dataclass(frozen=True)
class Source:
    """Inputs of every exporter.

    Attributes:
        network: Float network in eval mode.
        images: Normalized calibration images, float32 [N, C, H, W].
        float_file: The network as ONNX, with BN folded, "input" and "logits", and a dynamic batch.
        batch: Number of images in a batch.
    """

    network: nn.Module
    images: npt.NDArray[np.float32]
    float_file: Path
    batch: int = BATCH

    def batches(self) -> list[npt.NDArray[np.float32]]:
        """Return the calibration images as a list of batches, float32 [batch, C, H, W]; the last may be smaller."""
        return [self.images[start : start + self.batch] for start in range(0, len(self.images), self.batch)]


@dataclass(frozen=True)
class Way:
    """An exporter of another project.

    Attributes:
        write: Function that writes the exported file; it is called with the inputs and the path of the file.
        modules: Modules that it needs to import.
    """

    write: Callable[[Source, Path], None]
    modules: tuple[str, ...] = ()


def nncf_way(source: Source, out: Path, preset: str, extension: bool = False) -> None:
    """Write an ONNX file with NNCF: nncf.quantize, conversion to torch's fake quantization, then torch.onnx.export.

    The older torch.onnx exporter can write these modules; the newer one (dynamo) refuses them. NNCF's C++ extension is
    compiled on first use and only affects the exporter's time.
    """
    import nncf

    if not extension:
        without_extension()
    example = torch.from_numpy(source.images[:1])
    batches = [torch.from_numpy(batch) for batch in source.batches()]
    quantized = nncf.quantize(
        copy.deepcopy(source.network),
        nncf.Dataset(batches),
        preset=nncf.QuantizationPreset(preset),
        subset_size=len(batches),
    )
    native = nncf.strip(quantized, strip_format=nncf.StripFormat.NATIVE, example_input=example)
    dynamic = {"input": {0: "batch"}, "logits": {0: "batch"}}
    torch.onnx.export(
        native, (example,), str(out), dynamo=False, input_names=["input"], output_names=["logits"], dynamic_axes=dynamic
    )


def modelopt_way(source: Source, out: Path, precision: str) -> None:
    """Write an ONNX file with Model-Optimizer: its ONNX quantizer with its default calibration.

    Args:
        source: Inputs of the exporter.
        out: The file to write.
        precision: Type of the operations that are not INT8, as `high_precision_dtype` takes it.
    """
    # TensorRT's type stubs import as an empty package, which Model-Optimizer takes for TensorRT itself.
    if _has("tensorrt") and not hasattr(importlib.import_module("tensorrt"), "__version__"):
        sys.modules["tensorrt"] = None  # type: ignore[assignment]
    from modelopt.onnx.quantization import quantize

    quantize(
        str(source.float_file),
        quantize_mode="int8",
        calibration_data={"input": source.images},
        calibration_eps=["cpu"],
        high_precision_dtype=precision,
        output_path=str(out),
        log_level="ERROR",
    )


def onnxruntime_way(source: Source, out: Path, signed: bool, quantize_bias: bool = True) -> None:
    """Write a QDQ file with ONNX Runtime's quantize_static and per-channel weights.

    Args:
        source: Inputs of the exporter.
        out: The file to write.
        signed: Whether activations are symmetric int8, as TensorRT needs, instead of uint8.
        quantize_bias: Whether biases are stored as int32, which TensorRT rejects.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter([{"input": batch} for batch in source.batches()])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    quantize_static(
        str(source.float_file), str(out), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QInt8 if signed else QuantType.QUInt8, weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": signed, "WeightSymmetric": True, "QuantizeBias": quantize_bias},
    )  # fmt: skip


_MODELOPT = ("modelopt", "onnx_graphsurgeon", "onnxslim", "lief", "onnxscript")
WAYS = {
    "NNCF, PERFORMANCE": Way(functools.partial(nncf_way, preset="performance"), ("nncf", "torchao")),
    "NNCF, MIXED": Way(functools.partial(nncf_way, preset="mixed"), ("nncf", "torchao")),
    "Model-Optimizer, fp16": Way(functools.partial(modelopt_way, precision="fp16"), _MODELOPT),
    "Model-Optimizer, fp32": Way(functools.partial(modelopt_way, precision="fp32"), _MODELOPT),
    "ONNX Runtime, U8S8": Way(functools.partial(onnxruntime_way, signed=False)),
    "ONNX Runtime, S8S8": Way(functools.partial(onnxruntime_way, signed=True)),
    "ONNX Runtime, S8S8, float bias": Way(functools.partial(onnxruntime_way, signed=True, quantize_bias=False)),
}


def not_installed(name: str) -> str | None:
    """Return a text that names the missing packages of an exporter, for its table row; None if none is missing."""
    missing = [module for module in WAYS[name].modules if not _has(module)]
    return f"not run: not installed ({', '.join(missing)})" if missing else None


def write(name: str, source: Source, out: Path, metadata: dict[str, str]) -> str | None:
    """Write the file of an exporter, which runs in a separate process.

    Args:
        name: Name of the exporter in `WAYS`.
        source: The exporter's inputs.
        out: The file to write.
        metadata: Entries that are written into the metadata_props of the file.

    Returns:
        None if the file was written, otherwise the reason in one line.
    """
    missing = not_installed(name)
    if missing is not None:
        return missing
    reason = out.with_suffix(".reason")
    arguments = (name, source, out, metadata, reason)
    process = multiprocessing.get_context("spawn").Process(target=_write_here, args=arguments)
    process.start()
    process.join(TIME_LIMIT_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        return f"failed: not finished after {TIME_LIMIT_SECONDS:g} s"
    if reason.is_file():
        return f"failed: {reason.read_text()}"
    return None if process.exitcode == 0 else f"failed: its process ended with {process.exitcode}"


def _write_here(name: str, source: Source, out: Path, metadata: dict[str, str], reason: Path) -> None:
    try:
        WAYS[name].write(source, out)
        model = onnx.load(out)
        onnx.helper.set_model_props(model, {**{p.key: p.value for p in model.metadata_props}, **metadata})
        onnx.save(model, out)
    except Exception as error:  # a peer may raise anything
        reason.write_text(" ".join(f"{type(error).__name__}: {error}".split())[:300])


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
