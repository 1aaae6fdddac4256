"""Layout of results.json: what a benchmark measured."""

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
    """Settings of a benchmark; `crqat.runtime_eval.config.BenchmarkConfig` describes the attributes."""

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
    """The test images of a benchmark.

    Attributes:
        n: Number of test images.
        classes: Number of classes that the models distinguish; None if no model ran.
    """

    n: int
    classes: int | None


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of one model on all test images, as shares between 0 and 1.

    Attributes:
        n: Number of test images.
        top1: Share of the images that the model classifies correctly.
        top1_interval: Wilson's bounds of `top1`, each one-sided 95 %.
        top5: Share of the images whose class is among the five highest logits.
        chance: Expected accuracy of the same predictions, assigned to the images at random.
    """

    n: Annotated[int, Range(ge=1)]
    top1: Share
    top1_interval: Interval
    top5: Share | None = None
    chance: Share | None = None


@dataclass(frozen=True)
class Latency:
    """Latency of one inference at batch 1 in milliseconds; a percentile is None if it has too few samples.

    Attributes:
        status: Always "measured".
        p50_ms: Median of all samples.
        rounds: Number of rounds; each ran in its own process.
        round_p50_ms: Median of each round.
        unstable: Why the latency is not reliable, or False.
        batch: Batch size, always 1.
        threads: Number of threads that one inference may use.
        n: Number of samples.
        p90_ms: The 90th percentile.
        p99_ms: The 99th percentile.
        compute_p50_ms: Median time of the device's computation alone, if the runtime reports it.
        min_ms: Shortest sample.
        cv: Coefficient of variation of all samples.
        cv_rounds: Coefficient of variation of the rounds' medians.
        round_spread: Interquartile range of the rounds' medians divided by their median; if several engines took turns,
            each median is first divided by that of its own engine.
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
    """Latency that was not measured; `status` gives the reason as "not run: ..."."""

    status: str


@dataclass(frozen=True)
class LatencyRatio:
    """Latency of one model divided by that of another, from the ratios of their medians in each round.

    Attributes:
        latency_ratio: Median of the rounds' ratios.
        latency_ratio_interval: Distribution-free bounds of the ratio.
        latency_ratio_coverage: Probability with which these bounds contain the true ratio.
    """

    latency_ratio: float
    latency_ratio_interval: Interval
    latency_ratio_coverage: float | None = None


@dataclass(frozen=True)
class VersusFloat:
    """Comparison of a model with its float model, image by image; each bound over images is one-sided 95 %.

    Attributes:
        drop_points: Top-1 accuracy of the float model minus that of this model, in percentage points.
        drop_interval_points: Tango's bounds of `drop_points`.
        agreement: Share of the images for which both models predict the same class.
        agreement_interval: Wilson's bounds of `agreement`.
        size_ratio: Size of this file divided by that of the float file.
        latency_ratio: Latency of this model divided by that of the float model, as in `LatencyRatio`; None if the two
            files were not timed in the same runtime.
        latency_ratio_interval: As in `LatencyRatio`; None without a `latency_ratio`.
        latency_ratio_coverage: As in `LatencyRatio`; None without a `latency_ratio`.
        both_right: Number of images that both models classify correctly.
        only_float_right: Number of images that only the float model classifies correctly; None if not counted.
        only_this_right: Number of images that only this model classifies correctly; None if not counted.
        both_wrong: Number of images that both models classify wrongly.
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
        """Reject incomplete image counts and a latency ratio without its interval."""
        if (self.only_float_right is None) != (self.only_this_right is None):
            msg = "has only_float_right without only_this_right, or the reverse"
            raise ValueError(msg)
        if (self.latency_ratio is None) != (self.latency_ratio_interval is None):
            msg = "has latency_ratio without latency_ratio_interval, or the reverse"
            raise ValueError(msg)


@dataclass(frozen=True)
class Build:
    """One of several engines that were built from the same file.

    Attributes:
        plan_sha256: SHA-256 of the engine.
        round_p50_ms: Median of each of the engine's rounds, in milliseconds.
    """

    plan_sha256: str
    round_p50_ms: Annotated[list[float], Range(ge=1)]


@dataclass(frozen=True)
class CountedCodes:
    """Comparison of the integer codes that this CPU computes with those of the export's simulator.

    Attributes:
        status: "passed", "failed: ...", or "not run: ..." on a CPU for which the export holds no codes.
        images: Number of images that were computed.
        codes: Number of codes compared.
        differing: Number of codes that differ.
        tensors: Number of tensors whose expected codes the export holds; only these are compared.
        left_out: Number of further tensors, whose expected codes the export does not hold because another correct float
            computation may round them differently.
        family: Family of the CPU, as `crqat.core.targets.CpuFamily` names it; None if it is not known.
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
    """Cost of the layers that `quantization.float_layers` keeps in float.

    Attributes:
        macs: Multiply-accumulates of each layer kept in float.
        share: Share of the network's multiply-accumulates that these layers have.
    """

    macs: dict[str, int]
    share: float


@dataclass(frozen=True)
class Int8Layers:
    """How many of the layers that multiply OpenVINO computes in INT8, and which it does not.

    Attributes:
        int8: Number of layers computed in INT8.
        layers: Number of layers that multiply.
        in_float: Names of the layers not computed in INT8.
    """

    int8: int
    layers: int
    in_float: list[str] = field(metadata={"key": "float"})


@dataclass(frozen=True)
class NodeTime:
    """Time of one node of the graph that ONNX Runtime optimized.

    Attributes:
        node: Name of the node; a node that the optimizer inserted has the name that the optimizer gave it.
        operation: Operation, as ONNX Runtime calls it.
        microseconds: Median over the profiled inferences at batch 1.
    """

    node: str
    operation: str
    microseconds: Annotated[float, Range(ge=0)]


@dataclass(frozen=True)
class ModelResult:
    """Benchmark result of one file.

    Attributes:
        target: Target that the file was written for, or "float", "float16", "openvino" or "float_openvino".
        status: "measured", "failed: ..." or "not run: ...".
        accuracy: Top-1 and top-5 accuracy on the test images; None unless they were measured.
        latency: Latency at batch 1, or why it was not measured; None if the file did not run.
        versus_float: Comparison with the float file; None for the float file itself, or if not measured.
        verification: Comparison of integer codes by which the export verified the file; None for a float file.
        runtime: Runtime that ran the file.
        runtime_version: Version of that runtime.
        provider: Execution provider or device.
        size_bytes: File size in bytes.
        peak_memory_bytes: Peak memory of the measuring process, in bytes.
        accuracy_batch_1: Accuracy of a TensorRT engine at batch 1.
        builds: The engines that were built from this file and measured in turns.
        versus_float16: Latency divided by that of the float16 file, on a GPU.
        fusion: Operations that ONNX Runtime fused into integer operations, as found by the export.
        codes_on_this_cpu: Comparison of the integer codes that the measuring CPU computes with the expected ones.
        findings: Rules of the runtime that the file breaks, one line each.
        float_layers: Layers that the recipe keeps in float.
        engine: Summary of the TensorRT engine; None if the file is not for TensorRT.
        int8_layers: How many layers OpenVINO computes in INT8, and which it does not; None for other runtimes.
        answers: Predicted class of each test image, packed by `crqat.core.results.answers`.
        node_times: Time of each node in the order of computation, for files timed in ONNX Runtime. The profiler slows
            each node down, so the times add up to more than the latency.
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
        """Reject a measured result without numbers, and counts that exceed the number of images."""
        if self.status == MEASURED and (self.accuracy is None or self.latency is None):
            msg = f"has status measured but no {'accuracy' if self.accuracy is None else 'latency'}"
            raise ValueError(msg)
        versus = self.versus_float
        if versus is not None and self.accuracy is not None:
            counted = max(versus.only_float_right or 0, versus.only_this_right or 0)
            if counted > self.accuracy.n:
                msg = f"counts {counted} of {self.accuracy.n} images in versus_float"
                raise ValueError(msg)
        self.classes()

    def classes(self) -> npt.NDArray[np.int64] | None:
        """Return the predicted class of each test image, int64 [N]; None if the predictions were not stored."""
        if self.answers is None or self.accuracy is None:
            return None
        return unpack(self.answers, self.accuracy.n)

    @property
    def timed(self) -> Latency | None:
        """The latency; None if it was not measured."""
        return self.latency if isinstance(self.latency, Latency) else None


@dataclass(frozen=True)
class Results:
    """Benchmark results of all files of one export on one machine.

    Attributes:
        run: Name of the run.
        models: Results by file name; those of the same file in OpenVINO are under "FILE@openvino".
        config: Settings of the measurement.
        device: Machine that measured.
        dataset: Test images.
        parent: SHA-256 of the export's manifest.
        bundle: SHA-256 of the measured bundle; None if an export was measured.
        engines: Engine reports by file name; they are stored in engine.json next to results.json.
        crqat_version: Version of crqat that measured; None if crqat ran from a bundle instead of being installed.
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
    """Return the results in a results.json, after checking them.

    Raises:
        UsageError: The file is missing, damaged or of another version; the message names the file and the key.
        ToolError: The file cannot be read.
    """
    return typed_json.read(Results, path, "run the benchmark again with --force (crqat benchmark RECIPE)")


@dataclass(frozen=True)
class BenchmarkPayload:
    """Summary of a benchmark stage in its manifest.

    Attributes:
        device: Machine that measured.
        files: Names of the measured files.
        on: Address of the board; None for this machine.
        bundle: SHA-256 of the bundle that was sent to the board.
    """

    device: Device
    files: list[str]
    on: str | None = field(default=None, metadata=OMIT)
    bundle: str | None = field(default=None, metadata=OMIT)
    schema_version: int = 1
