"""The `export` stage's part of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from crqat.core.field_bounds import STRICT, Range
from crqat.core.targets import TargetName


@dataclass(frozen=True)
class ExportConfig:
    """What is written.

    Attributes:
        targets: Runtimes to write a file for; None takes those that the network was trained for.
        candidate: "student", its EMA "teacher", or "calibrated", the network before training; "best" is the one with
            the highest accuracy on the validation split.
        tensorrt_precision: Type of everything that is not INT8 in tensorrt.onnx. Strongly typed TensorRT runs the
            float parts in the file's own type, so float16 is what a board wants. With it, float16.onnx holds the float
            network in that type, which is what INT8 has to be faster than.
        weights: How tensorrt.onnx stores weights: "int8" codes with a DequantizeLinear, or "float" values with a pair
            of QuantizeLinear and DequantizeLinear, for parsers that know no other form. The engine is the same.
        verify_images: Images of the training set on which each file is verified by the three checks.
        allow_lossy: Write a file even if an edge cannot keep its trained Grid.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    targets: tuple[Annotated[str, TargetName()], ...] | None = None
    candidate: Literal["best", "student", "teacher", "calibrated"] = "best"
    tensorrt_precision: Literal["float16", "float32"] = "float16"
    weights: Literal["int8", "float"] = "int8"
    verify_images: Annotated[int, Range(ge=1)] = 32
    allow_lossy: bool = False
