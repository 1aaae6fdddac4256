"""What the gate says: verdict.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["pass", "fail", "inconclusive", "not run", "error"]


@dataclass(frozen=True)
class Verdict:
    """One rule on one file.

    Attributes:
        rule: "measurement", "required", "findings", "verification", "codes_on_this_cpu", "engine", "int8_coverage",
            "reformat_layers", "accuracy_drop", "agreement", "accuracy", "latency_ratio", "latency_regression" or
            "size_ratio"; of the float model "float_accuracy" or "known_accuracy".
        file: The model's file.
        status: "error" means that the environment kept the rule from being judged.
        measured: In the rule's own unit; None if there is no number.
        interval: What the rule was judged by; None for what is exact.
        allowed: The limit.
        n: Images, inference rounds or codes behind `measured`.
        message: One line.
        images_needed: Of an inconclusive rule on test images: about how many would decide it if the measured rates
            stay; None if no number would, or where n counts something else.
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
    """All rules on all files.

    Attributes:
        exit_code: Of the gate.
        rules: The verdicts.
    """

    exit_code: int
    rules: list[Verdict]
    schema_version: int = 1
