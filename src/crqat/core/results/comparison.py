"""Layout of the report of `crqat compare`: each file is compared with the file of the first run for the same target."""

from __future__ import annotations

from dataclasses import dataclass, field

from crqat.core.typed_json import Interval


@dataclass(frozen=True)
class Compared:
    """Results of one file of one run, compared with the file of the first run for the same target.

    Attributes:
        run: Name of the run, or its path if two runs share a name.
        file: Name of the file in the run.
        target: Target that the file was written for, or "float".
        status: "measured", or why the file has no results.
        n: Number of test images.
        top1: Share of the test images that the file classifies correctly.
        top1_interval: Wilson's bounds of `top1`, each one-sided 95 %.
        difference_points: Accuracy of this file minus that of the file of the first run, on the same images, in
            percentage points.
        difference_interval_points: Tango's bounds of `difference_points`, each one-sided 95 %.
        unpaired: Why there is no difference; "" if there is one, and for the first run.
        p50_ms: Median latency at batch 1, in milliseconds.
        device: Machine that measured the file.
        size_bytes: File size in bytes.
        int8_share: Share of the network's multiply-accumulates that TensorRT's engine or ONNX Runtime computes in INT8;
            None for a float file and where it is not known.
        verification: Status of the export's verification.
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
    """Comparison of the files of several runs.

    Attributes:
        rows: Results of each file, grouped by target, and for each target in the order of the runs.
    """

    rows: list[Compared]
    schema_version: int = field(default=1)
