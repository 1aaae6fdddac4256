"""What `crqat study` leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StudyRow:
    """A method with one seed, number of labels and bit width.

    Attributes:
        labels: Labeled images, validation images among them; None: all.
        bits: Of weights and activations; None: those of the recipe.
        seed: The recipe's.
        equal: What the trainings of a comparison share: "steps" or, about, "time".
        method: Its name.
        training: The training that it comes from.
        network: Which network of the training: "float", "student" or "teacher".
        start: The training whose float network that one starts from, None for the first.
        views: Of labeled images and, behind a slash, of unlabeled ones.
        unlabeled: What unlabeled images are used for.
        seconds: Of the training, on one core.
        validation: Top-1, share of the validation images.
        n: Test images.
        correct: Which of them were answered rightly: base64 of eight images a byte, the first in the highest bit.
        key: Of all that the training depends on.
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

    @property
    def place(self) -> tuple[object, ...]:
        """What there is one row of."""
        return self.labels, self.bits, self.seed, self.equal, self.method


@dataclass(frozen=True)
class StudyResults:
    """All rows of a study.

    Attributes:
        recipe: As it was resolved when the last row was written.
        machine: That the last training ran on.
        versions: Of the libraries that train.
        rows: In the order in which they were found.
    """

    recipe: dict[str, Any]
    machine: str
    versions: dict[str, str]
    rows: list[StudyRow]
    schema_version: int = 1
