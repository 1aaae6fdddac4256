"""Summary of a training run in its manifest, which later stages read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from crqat.core.field_bounds import Range
from crqat.core.preprocessing import Preprocessing


@dataclass(frozen=True)
class FloatNetwork:
    """The float network before quantization.

    Attributes:
        validation_accuracy: Top-1 accuracy, as a share of the validation images.
        published_accuracy: Accuracy that the publisher of the weights reports; None if it is unknown or was measured on
            other classes.
    """

    validation_accuracy: float
    published_accuracy: Annotated[float, Range(ge=0, le=1)] | None = None


@dataclass(frozen=True)
class Candidate:
    """A quantized network that may be exported.

    Attributes:
        validation_accuracy: Top-1 accuracy, as a share of the validation images.
    """

    validation_accuracy: float


@dataclass(frozen=True)
class TrainingPayload:
    """Summary of a training run in its manifest.

    Attributes:
        best: Name of the candidate with the highest validation accuracy.
        candidates: Candidates by name: "student", "teacher", "calibrated".
        class_names: Class names in the order of the logits.
        float_network: The float network before quantization.
        input_shape: Shape [C, H, W] of one image.
        preprocessing: Conversion from bytes to the network's input.
        validation_images: Number of validation images.
        compiled: Whether torch.compile fused the quantizers, and if not, why.
        device: Device of the training.
        seconds: Duration of the training in seconds, summed over all parts if it was interrupted.
        quantizers: Number of quantizers in the network.
        notes: Notes on the accuracies and on layers whose bit width differs from that in the recipe, one line each.
        preparation: Notes on how the images were resized, cropped and normalized, one line each.
        warnings: Probable problems of the trained network, one line each.
        processes: Number of processes that trained together.
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
        """Reject a best candidate that is not in `candidates`, and an input shape that is not [C, H, W]."""
        if self.best not in self.candidates:
            msg = f"has best {self.best}, which is not one of its candidates"
            raise ValueError(msg)
        if len(self.input_shape) != 3:
            msg = f"has an input_shape of {len(self.input_shape)} dimensions, not [C, H, W]"
            raise ValueError(msg)


@dataclass(frozen=True)
class Epoch:
    """Accuracies after one epoch, as one line of history.jsonl holds them.

    Attributes:
        phase: "float" or "qat".
        epoch: Number of the epoch, from 1; 0 is the calibrated network.
        validation: Top-1 accuracy of the trained network, as a share of the validation images.
        validation_teacher: Top-1 accuracy of the teacher, as a share of the validation images.
        weight: Weight lambda of the consistency loss.
    """

    phase: str
    epoch: int
    validation: float | None = None
    validation_teacher: float | None = None
    weight: float | None = field(default=None, metadata={"key": "lambda"})
