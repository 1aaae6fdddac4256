"""Layout of the JSON file with the results of `crqat study`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StudyRow:
    """Result of one method with one seed, number of labels and bit width.

    Attributes:
        labels: Number of labeled images, including validation images; None for all.
        bits: Bit width of weights and activations; None for those of the recipe.
        seed: Seed of the recipe.
        equal: What the compared training runs have equally much of: "steps", or (approximately) "time".
        method: Name of the method.
        training: Name of the training run that the network comes from.
        network: Which network of the training run: "float", "student" or "teacher".
        start: Name of the training run whose float network this one starts from; None for the training "float".
        views: Augmentation of labeled images and, after a slash, of unlabeled images.
        unlabeled: What the unlabeled images are used for.
        seconds: Duration of the training on one core, in seconds.
        validation: Top-1 accuracy, as a share of the validation images.
        n: Number of test images.
        correct: Test images classified correctly: base64 of one bit per image, the first in each byte's highest bit.
        key: Hash of everything that the training depends on.
        lineage: First 16 digits of the SHA-256 of the float weights of each training run that this one descends from,
            beginning with the training "float". If others start from this run, the last entry is of its own weights.
            The same recipe gives other weights on another kind of CPU. The list is empty in results of older versions.
    """

    labels: int | None
    bits: int | None
    seed: int
    equal: str
    method: str
    training: str
    network: str
    start: str | None
    views: str
    unlabeled: str
    seconds: float
    validation: float
    n: int
    correct: str
    key: str
    lineage: list[str] = field(default_factory=list)

    @property
    def place(self) -> tuple[object, ...]:
        """Values of the fields that identify this result in a study; a newer result with equal values replaces it."""
        return self.labels, self.bits, self.seed, self.equal, self.method


@dataclass(frozen=True)
class StudyResults:
    """Layout of a study's JSON file.

    Attributes:
        recipe: The resolved recipe at the time the last result was written.
        machine: Machine of the last training run.
        versions: Versions of torch and NNCF.
        rows: Results in the order in which they were computed.
    """

    recipe: dict[str, Any]
    machine: str
    versions: dict[str, str]
    rows: list[StudyRow]
    schema_version: int = 1
