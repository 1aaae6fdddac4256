"""The `benchmark` stage: an export directory in, measured results of each of its models out."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from artifacts.errors import ToolError, UsageError
from artifacts.progress import Progress
from artifacts.store import Manifest, manifest_hash, verify_stage
from runtime_eval import accuracy, device, engine, engine_report, latency, tensorrt_api
from runtime_eval.client import RUNTIME, Worker
from runtime_eval.config import BenchmarkConfig

SCHEMA_VERSION = 1
FLOAT, TENSORRT = "float", "tensorrt"
# The targets whose latency ONNX Runtime stands for. tensorrt.onnx runs here too, but only to count its right answers.
TIMED = (FLOAT, RUNTIME)


@dataclass
class _Model:
    """One file while it is measured."""

    entry: dict[str, Any]
    path: Path
    size: int
    provider: str | None = None
    classes: int | None = None
    failure: str | None = None
    top: npt.NDArray[np.int64] | None = None
    rounds: list[list[float]] = field(default_factory=list)
    memory: int | None = None
    engine: dict[str, Any] | None = None
    engine_failure: str = f"not run: tensorrt_rtx is not installed; {tensorrt_api.INSTALL_HINTS[tensorrt_api.RTX]}"

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """A failure of the model's process ends the body and is kept as the model's result."""
        try:
            yield
        except ToolError as error:
            self.failure = str(error)


def benchmark(export_dir: Path, config: BenchmarkConfig, progress: Progress) -> dict[str, Any]:
    """Measure every model of an export on this machine.

    A model whose process dies, hangs or answers nonsense has the status "failed: ..."; the others are measured.

    Args:
        export_dir: A directory written by the `export` stage; its hashes are checked.
        config: How to measure.
        progress: Told of rounds and images.

    Returns:
        The results, a JSON object. Accuracies and agreements are shares of 1, `drop_points` percentage points,
        `latency_ratio` and `size_ratio` this model's divided by the float model's. Every bound of an accuracy interval
        holds one-sided at 95 %; the latency interval states its two-sided coverage. "engines" has the engine reports
        with every layer; a model's "engine" is the summary of its own.

    Raises:
        UsageError: The directory is no export, or a file in it is missing or damaged.
    """
    export_dir = export_dir.resolve()  # a new export that becomes current meanwhile must not mix with this one
    manifest, parent = verify_stage(export_dir), manifest_hash(export_dir)
    entries, images, labels = _read_payload(export_dir, manifest)
    machine = device.describe()
    load_at_start = device.load_average()
    paths = [export_dir / entry["file"] for entry in entries]
    models = [_Model(entry, path, path.stat().st_size) for entry, path in zip(entries, paths, strict=True)]
    _build_engines(models, config, progress)
    _measure(models, export_dir / manifest.payload["images"], labels, config, progress)
    return {
        "schema_version": SCHEMA_VERSION,
        "run": manifest.payload["run"],
        "parent": parent,
        "device": {**machine, "load_average": {"start": load_at_start, "end": device.load_average()}},
        "config": asdict(config),
        "dataset": {
            "n": len(images),
            "classes": next((model.classes for model in models if model.classes is not None), None),
        },
        "models": {model.entry["file"]: _result(model, models, labels, config) for model in models},
        "engines": {model.entry["file"]: model.engine for model in models if model.engine is not None},
    }


def _read_payload(
    export_dir: Path, manifest: Manifest
) -> tuple[list[dict[str, Any]], npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """The models' entries, the images uint8 [N, C, H, W] (memory-mapped) and the labels int64 [N] of an export."""
    payload = manifest.payload
    try:
        entries = [dict(entry) for entry in payload["models"]]
        names = [payload["images"], payload["labels"], *(entry["file"] for entry in entries)]
        targets = [entry["target"] for entry in entries]
        payload["run"]
    except (KeyError, TypeError, ValueError) as error:
        msg = f"{export_dir}: not an export ({error!r} in the manifest's payload); give the run's `export` directory"
        raise UsageError(msg) from error
    for name in names:
        if name not in manifest.files:  # its hash was not checked
            msg = f"{export_dir}: the manifest names {name} as a model or data but not as a file; export again"
            raise UsageError(msg)
    if targets.count(FLOAT) != 1:
        msg = f"{export_dir}: {targets.count(FLOAT)} float models; exactly one is what the others are compared with"
        raise UsageError(msg)
    images, labels = (_read_array(export_dir / name) for name in names[:2])
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) == 0:
        msg = f"{export_dir / names[0]}: {images.dtype} {list(images.shape)}, expected uint8 [N, C, H, W]; export again"
        raise UsageError(msg)
    if labels.dtype != np.int64 or labels.shape != (len(images),):
        shape = list(labels.shape)
        msg = f"{export_dir / names[1]}: {labels.dtype} {shape}, expected int64 [{len(images)}]; export again"
        raise UsageError(msg)
    return entries, images, labels


def _read_array(path: Path) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        msg = f"{path}: not a .npy array ({error}); export again"
        raise UsageError(msg) from error
    return array


def _build_engines(models: list[_Model], config: BenchmarkConfig, progress: Progress) -> None:
    """Build the engine of each file for TensorRT where a builder is installed; a failed one is a result, too."""
    for model in models:
        if model.entry["target"] != TENSORRT or tensorrt_api.choose() is None:
            continue
        task = f"engine of {model.entry['file']}"
        progress(task, 0, 1)
        options = engine.EngineOptions(
            batch=(1, 1, max(2, config.accuracy_batch)), time_limit_seconds=config.time_limit_seconds
        )
        try:
            model.engine = engine.build(model.path, options, model.entry.get("macs"))
        except ToolError as error:
            model.engine_failure = f"not run: {error}"
        progress(task, 1, 1, model.engine_failure if model.engine is None else model.engine["status"])


def _engine_summary(model: _Model) -> dict[str, Any] | None:
    """A model's entry `engine` in the results; None of what is not for TensorRT."""
    if model.entry["target"] != TENSORRT:
        return None
    return {"status": model.engine_failure} if model.engine is None else engine_report.headline(model.engine)


def _measure(
    models: list[_Model], images: Path, labels: npt.NDArray[np.int64], config: BenchmarkConfig, progress: Progress
) -> None:
    """Fill in the models' predictions, latency and memory. One process lives at a time and has the machine to itself.

    Raises:
        UsageError: A label is no class of a model.
    """
    for model in models:
        task = f"accuracy of {model.entry['file']}"
        with model.attempt(), tempfile.TemporaryDirectory() as scratch, Worker(model.path, images, config) as worker:
            model.provider, model.classes = worker.provider, worker.classes
            if not 0 <= labels.min() <= labels.max() < worker.classes:
                msg = (
                    f"{model.path}: has {worker.classes} classes, but the test labels go from {labels.min()} to "
                    f"{labels.max()}; export again"
                )
                raise UsageError(msg)
            top = Path(scratch) / "top.npy"
            worker.accuracy(config.accuracy_batch, top, partial(progress, task))
            model.top = np.load(top, allow_pickle=False)
    for turn in range(config.latency_rounds):
        timed = [model for model in models if model.failure is None and model.entry["target"] in TIMED]
        for position in range(len(timed)):
            model = timed[(position + turn) % len(timed)]  # nobody always follows the same neighbour
            with model.attempt(), Worker(model.path, images, config) as worker:
                progress("latency", turn, config.latency_rounds, model.entry["file"])
                slice_seconds = config.latency_seconds / config.latency_rounds
                model.rounds.append(worker.latency(config.warm_up_seconds, slice_seconds))
                model.memory = worker.memory()
        progress("latency", turn + 1, config.latency_rounds)


def _result(
    model: _Model, models: list[_Model], labels: npt.NDArray[np.int64], config: BenchmarkConfig
) -> dict[str, Any]:
    """One model's entry in the results."""
    baseline = next(other for other in models if other.entry["target"] == FLOAT)
    result: dict[str, Any] = {
        "target": model.entry["target"],
        "runtime": RUNTIME,
        "provider": model.provider,
        "status": "measured" if model.failure is None else f"failed: {model.failure}",
        "size_bytes": model.size,
        "peak_memory_bytes": model.memory,
        "accuracy": None,
        "latency": None,
        "versus_float": None,
        "verification": model.entry.get("verification"),
        "fusion": model.entry.get("fusion"),
        "findings": model.entry.get("findings", []),
        "engine": _engine_summary(model),
    }
    if model.failure is not None or model.top is None:
        return result
    result["accuracy"] = accuracy.summarize(model.top, labels)
    result["latency"] = latency.summarize(model.rounds, config.threads) if model.rounds else {"status": _not_run()}
    if baseline.failure is None and baseline.top is not None and model is not baseline:
        ratio = latency.compare(baseline.rounds, model.rounds) if model.rounds else {}
        result["versus_float"] = {
            **accuracy.compare(baseline.top, model.top, labels),
            "latency_ratio": None,
            "latency_ratio_interval": None,
            "latency_ratio_coverage": None,
            **ratio,
            "size_ratio": model.size / baseline.size,
        }
    return result


def _not_run() -> str:
    """Why the latency of a file for TensorRT is not measured."""
    if not device.cuda_device():
        return "not run: no CUDA device"
    return "not run: this version has no TensorRT runner"
