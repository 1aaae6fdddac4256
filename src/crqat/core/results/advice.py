"""Layout of `advice.json`: cost and result of each step of `crqat advise`."""

from __future__ import annotations

from dataclasses import dataclass, field

from crqat.core.results.verdict import Verdict


@dataclass(frozen=True)
class Step:
    """Result of one step of `crqat advise`.

    Attributes:
        name: Name of the step, such as "calibration-mse" or "short-qat".
        run: Directory of the step's run, relative to the directory of all runs.
        minutes: Duration of the train stage (calibration and training), in minutes.
        top1: Top-1 accuracy of the step's network on the judging images, as a share.
        drop_points: Accuracy of the float network minus that of this step, in percentage points.
        drop_interval_points: Tango's bounds of `drop_points`, each one-sided 95 %.
        verdicts: Verdicts of the gate's rules on the judging images.
        status: "pass" if every rule passes; "fail" if one fails, else "inconclusive".
        float_layers: Layers that this step keeps in float.
        mean_bits: Mean bit width over the quantized weights.
        size_bytes: Size in bytes of the step's ONNX file for the recipe's first target.
        int8_share: Share of the multiply-accumulates whose inputs are quantized; None if it is not known.
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
    """Layout of `advice.json`.

    Attributes:
        images: Number of judging images, which are held out to judge the steps.
        source: Where the judging images come from.
        understated: Why the drop may be larger on unseen images; "" if there is no such reason.
        float_top1: Top-1 accuracy of the float network on the judging images, as a share.
        steps: The steps in the order in which they were tried.
        chosen: Name of the first step that passes, or of the best step if none passes.
        passed: Whether the chosen step passes.
    """

    images: int
    source: str
    understated: str
    float_top1: float
    steps: list[Step]
    chosen: str
    passed: bool
    schema_version: int = field(default=2)
