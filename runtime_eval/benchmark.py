"""The `benchmark` stage: measures each model of an export directory."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import numpy.typing as npt

from crqat.core.errors import ToolError, UsageError
from crqat.core.progress import Progress
from crqat.core.results import answers
from crqat.core.results.benchmark import (
    MEASURED,
    Build,
    CountedCodes,
    Dataset,
    Int8Layers,
    Latency,
    LatencyRatio,
    ModelResult,
    NodeTime,
    NoLatency,
    Results,
    Settings,
    VersusFloat,
)
from crqat.core.results.device import LoadAverage
from crqat.core.results.engine import BUILT, EngineReport, EngineSummary
from crqat.core.results.export import ExportedModel
from crqat.core.run_directory import manifest_hash, sha256_file, verify_stage
from crqat.core.targets import TARGETS, TENSORRT, builds_engine
from crqat.runtime_eval.config import TENSORRT_PROVIDERS, BenchmarkConfig
from crqat.runtime_eval.exported import FLOAT, read_payload
from crqat.runtime_eval.machine import host
from crqat.runtime_eval.machine.jetson import Watch
from crqat.runtime_eval.measure import accuracy, latency
from crqat.runtime_eval.measure.worker_client import OPENVINO, RUNTIME, Worker
from crqat.runtime_eval.trt import coverage, engine
from crqat.runtime_eval.trt import versions as tensorrt_api

FLOAT16 = "float16"
# Targets of the files that OpenVINO runs too: the float file, and that of a target with `runs_also`.
FLOAT_OPENVINO = "float_openvino"
FOR_OPENVINO = {FLOAT: FLOAT_OPENVINO} | {name: OPENVINO for name, t in TARGETS.items() if OPENVINO in t.runs_also}
# The builder chooses kernels by times that it measures once, so engines of one file differ; they take turns.
BUILDS = 3


@dataclass
class _Model:
    """One file of an export during its measurement, with the results so far."""

    entry: ExportedModel
    path: Path
    size: int
    plans: Sequence[Path] = ()
    version: str | None = None
    provider: str | None = None
    classes: int | None = None
    failure: str | None = None
    not_run: str | None = None
    top: npt.NDArray[np.int64] | None = None
    top_single: npt.NDArray[np.int64] | None = None
    rounds: list[list[float]] = field(default_factory=list)
    computed: list[float] = field(default_factory=list)
    memory: int | None = None
    int8_layers: Int8Layers | None = None
    node_times: list[NodeTime] | None = None
    codes: CountedCodes | None = None
    engine: EngineReport | None = None
    engine_failure: str = "not run: no builder was asked for"

    @property
    def runtime(self) -> str:
        """Name of the runtime that runs the file: "onnxruntime", "openvino" or "tensorrt"."""
        if self.entry.target in FOR_OPENVINO.values():
            return OPENVINO
        return TENSORRT.name if self.plans else RUNTIME

    @property
    def name(self) -> str:
        """Name in the results: the file's name, with the runtime if two runtimes run the file."""
        return f"{self.entry.file}@{OPENVINO}" if self.runtime == OPENVINO else self.entry.file

    def file(self, turn: int) -> Path:
        """File to load in a round: the ONNX file, or one of its engines; the engines take turns from round to round."""
        return self.plans[turn % len(self.plans)] if self.plans else self.path

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Context manager that stores a failure of the model's process as the model's result."""
        try:
            yield
        except ToolError as error:
            self.failure = str(error)


def benchmark(export_dir: Path, config: BenchmarkConfig, progress: Progress) -> Results:
    """Measure every model of an export on this machine.

    A model whose process dies, hangs or returns invalid output gets the status "failed: ..."; the others are measured.

    Args:
        export_dir: Directory written by the `export` stage; its hashes are checked.
        config: Settings of the measurement.
        progress: Callback for the progress of rounds and images.

    Raises:
        UsageError: The directory is not an export, or a file in it is missing or damaged.
    """
    export_dir = export_dir.resolve()  # a new export may become current during the benchmark
    manifest, parent = verify_stage(export_dir), manifest_hash(export_dir)
    payload, images, labels = read_payload(export_dir, manifest)
    entries = list(payload.models)
    machine = host.describe()
    load_at_start = host.load_average()
    watch = Watch()
    if config.openvino or OPENVINO in config.require:
        entries += [
            ExportedModel(entry.file, FOR_OPENVINO[entry.target]) for entry in entries if entry.target in FOR_OPENVINO
        ]
    paths = [export_dir / entry.file for entry in entries]
    models = [_Model(entry, path, path.stat().st_size) for entry, path in zip(entries, paths, strict=True)]
    with tempfile.TemporaryDirectory() as scratch:
        _build_engines(models, config, progress, Path(scratch))
        _measure(models, export_dir / payload.images, labels, config, progress, watch)
        watch.look()
        by_name = {model.name: _result(model, models, labels, config, watch) for model in models}
    load = LoadAverage(load_at_start, host.load_average())
    classes = next((model.classes for model in models if model.classes is not None), None)
    return Results(
        run=payload.run,
        models=by_name,
        config=Settings(**{**asdict(config), "require": list(config.require)}),
        device=replace(machine, jetson=watch.result(), load_average=load),
        dataset=Dataset(len(images), classes),
        parent=parent,
        engines={model.name: model.engine for model in models if model.engine is not None},
        crqat_version=_version(),
    )


def _version() -> str | None:
    """Return this crqat's version; None if crqat was not installed but came with a bundle."""
    try:
        return metadata.version("crqat-edge")
    except metadata.PackageNotFoundError:
        return None


def _build_engines(models: list[_Model], config: BenchmarkConfig, progress: Progress, folder: Path) -> None:
    """Build the engines of the TensorRT files if a builder is installed; a failed build becomes the file's result.

    Without a GPU, one engine of each quantized file is built to report its layers, and is not run. With a GPU, several
    engines of each file, including the float files, are built and measured.
    """
    builder = tensorrt_api.choose()
    runs = builder == tensorrt_api.TENSORRT
    missing = tensorrt_api.TENSORRT if host.cuda_device() else tensorrt_api.RTX
    batch = (1, 1, max(2, config.accuracy_batch))
    for model in models:
        if builder is None:
            model.engine_failure = f"not run: {missing} is not installed; {tensorrt_api.INSTALL_HINTS[missing]}"
        wanted = _for_engine(model) if runs else builds_engine(model.entry.target)
        if builder is None or not wanted:
            continue
        task, plans = f"engine of {model.entry.file}", []
        for number in range(BUILDS if runs else 1):
            progress(task, number, BUILDS if runs else 1)
            path = folder / f"{model.path.stem}.{number}.plan" if runs else None
            options = engine.EngineOptions(batch=batch, time_limit_seconds=config.time_limit_seconds)
            try:
                model.engine = engine.build(model.path, options, model.entry.macs, path)
            except ToolError as error:
                model.engine_failure = f"not run: {error}"
                break
            if model.engine.status != BUILT:
                break
            plans += [path] if path is not None else []
        model.plans = plans if len(plans) == BUILDS else ()
        progress(task, 1, 1, model.engine_failure if model.engine is None else model.engine.status)


def _for_engine(model: _Model) -> bool:
    """Return whether TensorRT runs the file: it is the file for TensorRT, or a float file to compare that one with."""
    return model.entry.target in (FLOAT, FLOAT16) or builds_engine(model.entry.target)


def _engine_summary(model: _Model) -> EngineSummary | None:
    """Return the entry `engine` of a model's results; None if the file is not for TensorRT."""
    if not builds_engine(model.entry.target):
        return None
    return EngineSummary(status=model.engine_failure) if model.engine is None else coverage.headline(model.engine)


def _measure(
    models: list[_Model],
    images: Path,
    labels: npt.NDArray[np.int64],
    config: BenchmarkConfig,
    progress: Progress,
    watch: Watch,
) -> None:
    """Measure the models' predictions, latency and memory. Only one process runs at a time.

    Raises:
        UsageError: A label is not a class of a model.
    """
    for model in models:
        model.not_run = None if model.plans else _obstacle(model)
    runnable = [model for model in models if model.not_run is None]
    for model in runnable:
        task = f"accuracy of {model.name}"
        progress(task, 0, len(labels))
        with (
            model.attempt(),
            tempfile.TemporaryDirectory() as scratch,
            Worker(model.file(0), images, config, model.runtime) as worker,
        ):
            model.version, model.provider, model.classes = worker.version, worker.provider, worker.classes
            model.int8_layers = worker.int8_layers
            if not 0 <= labels.min() <= labels.max() < worker.classes:
                msg = (
                    f"{model.path}: has {worker.classes} classes, but the test labels go from {labels.min()} to "
                    f"{labels.max()}; export again"
                )
                raise UsageError(msg)
            top = Path(scratch) / "top.npy"
            worker.accuracy(config.accuracy_batch, top, partial(progress, task))
            model.top = np.load(top, allow_pickle=False)
            if model.plans:  # an engine uses other kernels at another batch size
                worker.accuracy(1, top, partial(progress, f"{task} at batch 1"))
                model.top_single = np.load(top, allow_pickle=False)
            elif model.entry.expected_codes is not None:
                model.codes = worker.codes(model.path.parent / model.entry.expected_codes)
            if _is_timed(model, config):
                model.node_times = worker.node_times()
    for turn in range(config.latency_rounds):
        timed = [model for model in runnable if model.failure is None and _is_timed(model, config)]
        for position in range(len(timed)):
            model = timed[(position + turn) % len(timed)]  # no model always follows the same neighbour
            with model.attempt(), Worker(model.file(turn), images, config, model.runtime) as worker:
                progress("latency", turn, config.latency_rounds, model.name)
                slice_seconds = config.latency_seconds / config.latency_rounds
                samples, computed = worker.latency(config.warm_up_seconds, slice_seconds)
                model.rounds.append(samples)
                model.computed += computed
                model.memory = worker.memory()
        watch.look()
        progress("latency", turn + 1, config.latency_rounds)


def _is_timed(model: _Model, config: BenchmarkConfig) -> bool:
    """Return whether the latency of the file is measured; other files run only for their accuracy."""
    if model.runtime == OPENVINO:
        return True
    by_tensorrt = bool(model.plans) or config.provider in TENSORRT_PROVIDERS
    return _for_engine(model) if by_tensorrt else model.entry.target in (FLOAT, model.runtime)


def _result(
    model: _Model, models: list[_Model], labels: npt.NDArray[np.int64], config: BenchmarkConfig, watch: Watch
) -> ModelResult:
    """Return the benchmark result of one file from its measurements."""
    timed: Latency | NoLatency | None = None
    top = None if model.failure is not None else model.top
    single = None if model.failure is not None else model.top_single
    if top is not None:
        timed = NoLatency(_not_run(model))
    if top is not None and model.rounds:
        builds = max(1, len(model.plans))
        timed = latency.summarize(model.rounds, config.threads, model.computed, watch.unstable(), builds)
    return ModelResult(
        target=model.entry.target,
        status=model.not_run or (MEASURED if model.failure is None else f"failed: {model.failure}"),
        accuracy=None if top is None else accuracy.summarize(top, labels),
        latency=timed,
        versus_float=None if top is None else _versus_float(model, top, models, labels),
        verification=model.entry.verification,
        runtime=model.runtime,
        runtime_version=model.version,
        provider=model.provider,
        size_bytes=model.size,
        peak_memory_bytes=model.memory,
        accuracy_batch_1=None if single is None else accuracy.summarize(single, labels),
        builds=None if single is None else [_build(model, index) for index in range(len(model.plans))],
        versus_float16=None if top is None else _versus_float16(model, models),
        fusion=model.entry.fusion,
        codes_on_this_cpu=model.codes,
        answers=None if top is None else answers.pack(top[:, 0]),
        node_times=model.node_times if model.rounds else None,
        findings=model.entry.findings or [],
        float_layers=model.entry.float_layers,
        engine=_engine_summary(model),
        int8_layers=model.int8_layers,
    )


def _versus_float(
    model: _Model, top: npt.NDArray[np.int64], models: list[_Model], labels: npt.NDArray[np.int64]
) -> VersusFloat | None:
    """Compare a file with the float file in the same runtime; None if that runtime did not run the float file."""
    of_openvino = model.runtime == OPENVINO
    baseline = next(other for other in models if other.entry.target == (FLOAT_OPENVINO if of_openvino else FLOAT))
    if baseline.failure is not None or baseline.top is None or model is baseline:
        return None
    # A ratio across two runtimes would not show the effect of quantization.
    comparable = bool(model.rounds) and model.runtime == baseline.runtime
    ratio = latency.compare(baseline.rounds, model.rounds) if comparable else None
    return accuracy.compare(baseline.top, top, labels, model.size / baseline.size, ratio)


def _versus_float16(model: _Model, models: list[_Model]) -> LatencyRatio | None:
    half = next((other for other in models if other.entry.target == FLOAT16), None)
    if half is None or not half.rounds or not model.rounds or not builds_engine(model.entry.target):
        return None
    return latency.compare(half.rounds, model.rounds)


def _build(model: _Model, index: int) -> Build:
    """Return the hash of one of a file's engines, and the engine's median latency in each of its rounds."""
    rounds = model.rounds[index :: len(model.plans)]
    return Build(sha256_file(model.plans[index]), [1e3 * float(np.median(samples)) for samples in rounds])


def _obstacle(model: _Model) -> str | None:
    """Return why the file cannot be measured on this machine, such as a missing runtime; None if it can be."""
    if model.runtime == OPENVINO:
        return None if importlib.util.find_spec(OPENVINO) else "not run: openvino is not installed"
    version = host.onnxruntime_version()
    if version is None:  # a board with TensorRT alone
        return "not run: onnxruntime is not installed"
    from crqat.runtime_eval.runners.onnxruntime import float16_is_rounded

    if model.entry.precision != "float16" or float16_is_rounded():
        return None
    return f"not run: onnxruntime {version} truncates where it quantizes float16, and TensorRT rounds"


def _not_run(model: _Model) -> str:
    """Return the status that says why the latency of a file was not measured."""
    if model.entry.target != FLOAT16 and not builds_engine(model.entry.target):
        return "not run: the file is for another execution provider"
    if not host.cuda_device():
        return "not run: no CUDA device"
    return "not run: no engine was built from this file"
