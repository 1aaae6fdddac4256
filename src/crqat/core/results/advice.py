"""`advice.json`: what each step of `crqat advise` cost and brought."""

from __future__ import annotations

from dataclasses import dataclass, field

from crqat.core.results.verdict import Verdict


@dataclass(frozen=True)
class Step:
    """One step of the ladder, as it was judged.

    Attributes:
        name: Of the step.
        run: The directory of its run, below that of all runs.
        minutes: What it took: of the train stage, calibration and training.
        top1: Share of the judging images that its network answers rightly.
        drop_points: The float network's accuracy less this one's, percentage points.
        drop_interval_points: Tango's bounds of it, each one-sided 95 %.
        verdicts: The gate's rules on the judging images.
        status: "pass" if every rule passes; "fail" if one fails, else "inconclusive".
        float_layers: Layers that this step keeps in float.
        mean_bits: Mean bit width over the quantized weights.
        size_bytes: Of the ONNX file that the step would ship, for the recipe's first target.
        int8_share: Share of its multiply-accumulates whose inputs are quantized; None where it is not known.
    """

    name: str
    run: str
    minutes: float
    top1: float
    drop_points: float
    drop_interval_points: tuple[float, float]
    verdicts: list[Verdict]
    status: str
    float_layers: list[str]
    mean_bits: float
    size_bytes: int
    int8_share: float | None


@dataclass(frozen=True)
class Advice:
    """The file's layout.

    Attributes:
        images: How many judged.
        source: What they are.
        understated: Why the drop may be larger on images that nobody has seen; "" if nothing speaks for it.
        float_top1: Share of them that the float network answers rightly.
        steps: In the order in which they were tried.
        chosen: Name of the first step that passes, or of the best one if none does.
        passed: Whether it passes.
    """

    images: int
    source: str
    understated: str
    float_top1: float
    steps: list[Step]
    chosen: str
    passed: bool
    schema_version: int = field(default=2)
