"""Configuration of the `export` stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from crqat.core.field_bounds import STRICT, Range
from crqat.core.targets import TargetName


@dataclass(frozen=True)
class ExportConfig:
    """Files to export, and how they are written and verified.

    Attributes:
        targets: Runtimes to write files for; None takes those that the network was trained for.
        candidate: "student", its EMA "teacher", or "calibrated", the network before training; "best" takes the one with
            the highest accuracy on the validation split.
        tensorrt_precision: Type of all operations in tensorrt.onnx that are not INT8. Strongly typed TensorRT runs the
            float parts in the file's own type, so float16 suits most boards. With "float16", the export also writes
            float16.onnx, the float network in float16, as the baseline that INT8 has to beat.
        weights: How tensorrt.onnx stores weights: "int8" as codes with a DequantizeLinear, or "float" as values with a
            pair of QuantizeLinear and DequantizeLinear, for parsers that support no other form. The engine is the same.
        verify_images: Number of training images on which each file is verified: the codes of torch, the integer
            simulator, ONNX Runtime and the other targets' files are compared.
        allow_lossy: Write a file even if it cannot represent an edge's trained Grid exactly.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    targets: tuple[Annotated[str, TargetName()], ...] | None = None
    candidate: Literal["best", "student", "teacher", "calibrated"] = "best"
    tensorrt_precision: Literal["float16", "float32"] = "float16"
    weights: Literal["int8", "float"] = "int8"
    verify_images: Annotated[int, Range(ge=1)] = 32
    allow_lossy: bool = False
