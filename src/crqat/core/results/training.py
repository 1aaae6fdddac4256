"""What a training leaves to the next stage: the payload of its manifest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from crqat.core.field_bounds import Range
from crqat.core.preprocessing import Preprocessing


@dataclass(frozen=True)
class FloatNetwork:
    """The float network before quantization.

    Attributes:
        validation_accuracy: Top-1, share of the validation images.
        published_accuracy: By whoever published its weights; None if nobody did, or the classes are others.
    """

    validation_accuracy: float
    published_accuracy: Annotated[float, Range(ge=0, le=1)] | None = None


@dataclass(frozen=True)
class Candidate:
    """A quantized network that may be delivered.

    Attributes:
        validation_accuracy: Top-1, share of the validation images.
    """

    validation_accuracy: float


@dataclass(frozen=True)
class TrainingPayload:
    """A training.

    Attributes:
        best: Name of the candidate with the highest accuracy.
        candidates: "student", "teacher", "calibrated".
        class_names: In the order of the logits.
        float_network: Before quantization.
        input_shape: [C, H, W] of one image.
        preprocessing: From bytes to the network's input.
        validation_images: How many the accuracies are of.
        compiled: Whether torch.compile fused the quantizers, and if not, why.
        device: That it ran on.
        seconds: That it took, over all its parts if it was interrupted.
        quantizers: How many the network has.
        notes: What a reader of the accuracies has to know.
        preparation: How the images were prepared where published weights say how.
        warnings: What is wrong with the outcome.
        processes: That trained together.
    """

    best: str
    candidates: dict[str, Candidate]
    class_names: list[str]
    float_network: FloatNetwork = field(metadata={"key": "float"})
    input_shape: list[int]
    preprocessing: Preprocessing
    validation_images: int
    compiled: str
    device: str
    seconds: float
    quantizers: int
    notes: list[str] = field(default_factory=list)
    preparation: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    processes: int = 1
    schema_version: int = 1

    def __post_init__(self) -> None:
        """Refuse a best candidate that is none, and an input that is no image."""
        if self.best not in self.candidates:
            msg = f"delivers {self.best}, which is none of its candidates"
            raise ValueError(msg)
        if len(self.input_shape) != 3:
            msg = f"has an input_shape of {len(self.input_shape)} dimensions, not [C, H, W]"
            raise ValueError(msg)


@dataclass(frozen=True)
class Epoch:
    """A line of history.jsonl.

    Attributes:
        phase: "float" or "qat".
        epoch: From 1; 0 is the calibrated network.
        validation: Top-1 accuracy, share of the validation images.
        validation_teacher: The same of the teacher.
        weight: lambda, of the consistency loss.
    """

    phase: str
    epoch: int
    validation: float | None = None
    validation_teacher: float | None = None
    weight: float | None = field(default=None, metadata={"key": "lambda"})
