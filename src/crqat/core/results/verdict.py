"""Layout of verdict.json, which the gate writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["pass", "fail", "inconclusive", "not run", "error"]


@dataclass(frozen=True)
class Verdict:
    """Verdict of one rule on one file.

    Attributes:
        rule: "measurement", "required", "findings", "verification", "codes_on_this_cpu", "engine", "int8_coverage",
            "reformat_layers", "accuracy_drop", "agreement", "accuracy", "latency_ratio", "latency_regression" or
            "size_ratio"; for the float model "float_accuracy" or "known_accuracy".
        file: Name of the model file.
        status: Result of the rule; "error" means that the environment prevented the check.
        measured: Measured value in the rule's unit; None if there is no number.
        interval: Interval that the rule was judged by; None for an exact value.
        allowed: Limit of the rule.
        n: Number of images, inference rounds or codes that `measured` is based on.
        message: Explanation in one line.
        images_needed: For an inconclusive rule on test images: approximate number of images that would decide it at the
            measured rates; None if no number would, or if `n` does not count images.
    """

    rule: str
    file: str
    status: Status
    measured: float | None
    interval: tuple[float, float] | None
    allowed: float | None
    n: int | None
    message: str
    images_needed: int | None = None


@dataclass(frozen=True)
class Judgement:
    """Verdicts of all rules on all files.

    Attributes:
        exit_code: Exit code of the gate.
        rules: The verdicts.
    """

    exit_code: int
    rules: list[Verdict]
    schema_version: int = 1
