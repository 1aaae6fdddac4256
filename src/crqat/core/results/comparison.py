"""What `crqat compare` says of several runs, each file against the same target's file of the first run."""

from __future__ import annotations

from dataclasses import dataclass, field

from crqat.core.typed_json import Interval


@dataclass(frozen=True)
class Compared:
    """One file of one run.

    Attributes:
        run: The run's name, or its path where two have one name.
        file: Of the run.
        target: That it was written for, or "float".
        status: "measured", or why there are no numbers.
        n: Test images.
        top1: Share of them that it answers rightly.
        top1_interval: Wilson's bounds, each one-sided 95 %.
        difference_points: Its accuracy less that of the first run's file, percentage points, on the same images.
        difference_interval_points: Tango's bounds of it, each one-sided 95 %.
        unpaired: Why there is no difference; "" if there is one, and of the first run.
        p50_ms: Median latency at batch 1.
        device: Where it was measured.
        size_bytes: Of the file.
        int8_share: Share of the multiply-accumulates in INT8: of TensorRT's engine, or of the layers that ONNX Runtime
            computes in integers; None of a float file, and where it is not known.
        verification: Status of the export's.
    """

    run: str
    file: str
    target: str
    status: str
    n: int | None = None
    top1: float | None = None
    top1_interval: Interval | None = None
    difference_points: float | None = None
    difference_interval_points: Interval | None = None
    unpaired: str = ""
    p50_ms: float | None = None
    device: str = ""
    size_bytes: int | None = None
    int8_share: float | None = None
    verification: str | None = None


@dataclass(frozen=True)
class Comparison:
    """All files of all runs.

    Attributes:
        rows: A target's files stand together, in the order of the runs.
    """

    rows: list[Compared]
    schema_version: int = field(default=1)
