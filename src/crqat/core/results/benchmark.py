"""What a benchmark measured: results.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt

from crqat.core import typed_json
from crqat.core.field_bounds import Range
from crqat.core.results.answers import unpack
from crqat.core.results.device import Device
from crqat.core.results.engine import EngineReport, EngineSummary
from crqat.core.results.verification import Fusion, Verification
from crqat.core.typed_json import OMIT, OMIT_EMPTY, Interval

MEASURED: Literal["measured"] = "measured"
Share = Annotated[float, Range(ge=0, le=1)]
Count = Annotated[int, Range(ge=0)]
Positive = Annotated[float, Range(gt=0)]


@dataclass(frozen=True)
class Settings:
    """How it was measured; attributes as in `crqat.runtime_eval.config.BenchmarkConfig`."""

    threads: int
    provider: str | None = None
    warm_up_seconds: float | None = None
    latency_rounds: int | None = None
    latency_seconds: float | None = None
    accuracy_batch: int | None = None
    cuda_graph: bool = False
    openvino: bool = False
    require: list[str] = field(default_factory=list)
    time_limit_seconds: float | None = None


@dataclass(frozen=True)
class Dataset:
    """The test images.

    Attributes:
        n: How many.
        classes: That the models tell apart; None if none was run.
    """

    n: int
    classes: int | None


@dataclass(frozen=True)
class Accuracy:
    """A model's accuracy on all test images; shares of 1.

    Attributes:
        n: Images.
        top1: Share of the images answered rightly.
        top1_interval: Wilson's bounds of it, each one-sided 95 %.
        top5: Share of the images whose class is among the five best.
        chance: The accuracy of the same answers dealt out at random.
    """

    n: Annotated[int, Range(ge=1)]
    top1: Share
    top1_interval: Interval
    top5: Share | None = None
    chance: Share | None = None


@dataclass(frozen=True)
class Latency:
    """Of one inference at batch 1, milliseconds; a percentile is None if there are too few samples for it.

    Attributes:
        status: "measured".
        p50_ms: The median of all samples.
        rounds: In how many processes it was measured.
        round_p50_ms: The median of each.
        unstable: Why it is not to be trusted, or False.
        batch: 1.
        threads: What one inference may use.
        n: Samples.
        p90_ms: The 90th percentile.
        p99_ms: The 99th percentile.
        compute_p50_ms: The median of the device's computation alone, if the runtime tells.
        min_ms: The shortest.
        cv: Coefficient of variation of all samples.
        cv_rounds: Of the rounds' medians.
        round_spread: The rounds' interquartile range divided by their median.
    """

    status: Literal["measured"]
    p50_ms: Positive
    rounds: int
    round_p50_ms: Annotated[list[Positive], Range(ge=1)]
    unstable: Literal[False] | str
    batch: int = 1
    threads: int | None = None
    n: int | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    compute_p50_ms: float | None = None
    min_ms: float | None = None
    cv: float | None = None
    cv_rounds: float | None = None
    round_spread: float | None = None


@dataclass(frozen=True)
class NoLatency:
    """Why a latency was not measured: "not run: ..."."""

    status: str


@dataclass(frozen=True)
class LatencyRatio:
    """A model's latency divided by another's, from the ratios of the medians of each round.

    Attributes:
        latency_ratio: The median ratio.
        latency_ratio_interval: Distribution-free bounds of it.
        latency_ratio_coverage: Their two-sided coverage.
    """

    latency_ratio: float
    latency_ratio_interval: Interval
    latency_ratio_coverage: float | None = None


@dataclass(frozen=True)
class VersusFloat:
    """A model against its float original, image by image. Each bound of an interval of images is one-sided 95 %.

    Attributes:
        drop_points: The float model's top-1 accuracy less this model's, percentage points.
        drop_interval_points: Tango's bounds of it.
        agreement: Share of the images with the same answer.
        agreement_interval: Wilson's bounds of it.
        size_ratio: This file's bytes divided by the float file's.
        latency_ratio: As in `LatencyRatio`; None if the two were not timed in one runtime.
        latency_ratio_interval: Likewise.
        latency_ratio_coverage: Likewise.
        both_right: Images that both models answer rightly.
        only_float_right: Images that the float model alone answers rightly; None if that was not counted.
        only_this_right: Images that this model alone answers rightly; None if that was not counted.
        both_wrong: Images that no model answers rightly.
    """

    drop_points: float
    drop_interval_points: Interval
    agreement: Share
    agreement_interval: Interval
    size_ratio: float
    latency_ratio: float | None
    latency_ratio_interval: Interval | None
    latency_ratio_coverage: float | None = None
    both_right: int | None = None
    only_float_right: Count | None = None
    only_this_right: Count | None = None
    both_wrong: int | None = None

    def __post_init__(self) -> None:
        """Refuse half of a count of images, and half of a ratio."""
        if (self.only_float_right is None) != (self.only_this_right is None):
            msg = "counts the images that one model alone answers rightly for one of the two"
            raise ValueError(msg)
        if (self.latency_ratio is None) != (self.latency_ratio_interval is None):
            msg = "has a latency_ratio without its interval, or the interval alone"
            raise ValueError(msg)


@dataclass(frozen=True)
class Build:
    """One of several engines of the same file.

    Attributes:
        plan_sha256: Of the engine.
        round_p50_ms: The median of each of its rounds, milliseconds.
    """

    plan_sha256: str
    round_p50_ms: Annotated[list[float], Range(ge=1)]


@dataclass(frozen=True)
class CountedCodes:
    """The integer codes that this CPU computes against those of the export's simulator.

    Attributes:
        status: "passed", "failed: ...", or "not run: ..." on a CPU for which the export knows no codes.
        images: How many were computed.
        codes: Compared.
        differing: Of them.
        tensors: That hold them.
        left_out: Tensors whose codes another correct float computation may round otherwise.
        family: Of the CPU, as `crqat.core.targets.CpuFamily` names it; None if it is not known.
    """

    status: str
    images: int
    codes: int
    differing: int
    tensors: int = 0
    left_out: int = 0
    family: str | None = field(default=None, metadata=OMIT)


@dataclass(frozen=True)
class FloatLayers:
    """What `quantization.float_layers` costs.

    Attributes:
        macs: Multiply-accumulates of each layer that it keeps in float.
        share: Of the network's.
    """

    macs: dict[str, int]
    share: float


@dataclass(frozen=True)
class Int8Layers:
    """What OpenVINO computes in INT8 of the layers that multiply.

    Attributes:
        int8: How many.
        layers: Of how many.
        in_float: Names of the others.
    """

    int8: int
    layers: int
    in_float: list[str] = field(metadata={"key": "float"})


@dataclass(frozen=True)
class NodeTime:
    """One node of the graph that ONNX Runtime made of a file.

    Attributes:
        node: Its name; one that the optimizer put in has the name that it gave.
        operation: What it computes, as ONNX Runtime calls it.
        microseconds: Median over the profiled inferences at batch 1.
    """

    node: str
    operation: str
    microseconds: Annotated[float, Range(ge=0)]


@dataclass(frozen=True)
class ModelResult:
    """One file.

    Attributes:
        target: The runtime that it was written for, "float" or "float16"; "openvino" and "float_openvino" in that.
        status: "measured", "failed: ..." or "not run: ...".
        accuracy: None unless it was measured.
        latency: Likewise.
        versus_float: Against the float file; None of that file, or where that was not measured.
        verification: The export's; None of a float file.
        runtime: What ran it.
        runtime_version: Of that.
        provider: The execution provider or device.
        size_bytes: Of the file.
        peak_memory_bytes: Of its process.
        accuracy_batch_1: Of an engine at batch 1.
        builds: The engines that took turns.
        versus_float16: Against the float16 file on a GPU.
        fusion: The export's.
        codes_on_this_cpu: Counted where it was measured.
        findings: Rules of its runtime that the file breaks.
        float_layers: What was kept in float by name.
        engine: What TensorRT's builder made of it; None of what is not for TensorRT.
        int8_layers: What OpenVINO computes in INT8.
        answers: The class that it names for each test image, as `crqat.core.results.answers` packs them.
        node_times: Of a file whose latency is ONNX Runtime's: where the time goes, in the order of computation.
            Measured with a profiler that slows each node down, so that they add up to more than the latency.
    """

    target: str
    status: str
    accuracy: Accuracy | None
    latency: Latency | NoLatency | None
    versus_float: VersusFloat | None
    verification: Verification | None
    runtime: str | None = None
    runtime_version: str | None = None
    provider: str | None = None
    size_bytes: int | None = None
    peak_memory_bytes: int | None = None
    accuracy_batch_1: Accuracy | None = None
    builds: list[Build] | None = None
    versus_float16: LatencyRatio | None = None
    fusion: Fusion | None = None
    codes_on_this_cpu: CountedCodes | None = None
    findings: list[str] = field(default_factory=list)
    float_layers: FloatLayers | None = None
    engine: EngineSummary | None = None
    int8_layers: Int8Layers | None = None
    answers: str | None = field(default=None, metadata=OMIT)
    node_times: list[NodeTime] | None = field(default=None, metadata=OMIT)

    def __post_init__(self) -> None:
        """Refuse a measurement without numbers, and counts of more images than there are."""
        if self.status == MEASURED and (self.accuracy is None or self.latency is None):
            msg = f"is measured, and its {'accuracy' if self.accuracy is None else 'latency'} is missing"
            raise ValueError(msg)
        versus = self.versus_float
        if versus is not None and self.accuracy is not None:
            counted = max(versus.only_float_right or 0, versus.only_this_right or 0)
            if counted > self.accuracy.n:
                msg = f"counts {counted} of {self.accuracy.n} images in versus_float"
                raise ValueError(msg)
        self.classes()

    def classes(self) -> npt.NDArray[np.int64] | None:
        """The class that it names for each test image, int64 [N]; None if that was not kept."""
        if self.answers is None or self.accuracy is None:
            return None
        return unpack(self.answers, self.accuracy.n)

    @property
    def timed(self) -> Latency | None:
        """The latency, if it was measured."""
        return self.latency if isinstance(self.latency, Latency) else None


@dataclass(frozen=True)
class Results:
    """All files of one export on one machine.

    Attributes:
        run: Its name.
        models: By file; "FILE@openvino" where OpenVINO runs a file, too.
        config: How it was measured.
        device: Where.
        dataset: On what.
        parent: SHA-256 of the export's manifest.
        bundle: SHA-256 of the bundle that was measured, None of an export.
        engines: The engine reports, which lie in engine.json beside results.json once these are written.
        crqat_version: Of the crqat that measured, None if it is not installed but came with a bundle.
    """

    run: str
    models: dict[str, ModelResult]
    config: Settings
    device: Device
    dataset: Dataset | None = None
    parent: str | None = None
    schema_version: int = 1
    bundle: str | None = field(default=None, metadata=OMIT)
    engines: dict[str, EngineReport] = field(default_factory=dict, metadata=OMIT_EMPTY)
    crqat_version: str | None = field(default=None, metadata=OMIT)


def read_results(path: Path) -> Results:
    """What results.json holds.

    Raises:
        UsageError: The file is not there, is damaged, or is of another version; the message names the file and the key.
        ToolError: It cannot be read.
    """
    return typed_json.read(Results, path, "run the benchmark again with --force (crqat benchmark RECIPE)")


@dataclass(frozen=True)
class BenchmarkPayload:
    """The payload of a benchmark's manifest.

    Attributes:
        device: That measured.
        files: Names of what was measured.
        on: The board's address, None of this machine.
        bundle: SHA-256 of the bundle that was sent there.
    """

    device: Device
    files: list[str]
    on: str | None = field(default=None, metadata=OMIT)
    bundle: str | None = field(default=None, metadata=OMIT)
    schema_version: int = 1
