"""The `benchmark` stage: an export directory in, measured results of each of its models out."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from artifacts.errors import ToolError, UsageError
from artifacts.progress import Progress
from artifacts.store import Manifest, manifest_hash, verify_stage
from runtime_eval import accuracy, device, latency
from runtime_eval.client import RUNTIME, Worker
from runtime_eval.config import BenchmarkConfig

SCHEMA_VERSION = 1
FLOAT = "float"
# The targets whose latency ONNX Runtime stands for. tensorrt.onnx runs here too, but only to count its right answers.
TIMED = (FLOAT, RUNTIME)


@dataclass
class _Model:
    """One file while it is measured."""

    entry: dict[str, Any]
    path: Path
    size: int
    worker: Worker
    opened: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None
    rounds: list[list[float]] = field(default_factory=list)
    memory: int | None = None
    top: npt.NDArray[np.int64] | None = None

    @property
    def timed(self) -> bool:
        return self.failure is None and self.entry["target"] in TIMED

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """A failure of the worker in the body is kept as this model's result."""
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
        holds one-sided at 95 %; the latency interval states its two-sided coverage.

    Raises:
        UsageError: The directory is no export, or a file in it is missing or damaged.
    """
    export_dir = export_dir.resolve()  # a new export that becomes current meanwhile must not mix with this one
    manifest, parent = verify_stage(export_dir), manifest_hash(export_dir)
    entries, images, labels = _read_payload(export_dir, manifest)
    machine = device.describe()
    load_at_start = device.load_average()
    models: list[_Model] = []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for entry in entries:
                path = export_dir / entry["file"]
                size, worker = path.stat().st_size, Worker(path, export_dir / manifest.payload["images"], config)
                models.append(_Model(entry, path, size, worker))
            for model in models:
                with model.attempt():
                    model.opened = model.worker.open()
            _check_classes(models, labels)
            _measure(models, config, Path(scratch), progress)
        finally:
            for model in models:
                model.worker.close()
    return {
        "schema_version": SCHEMA_VERSION,
        "run": manifest.payload["run"],
        "parent": parent,
        "device": {**machine, "load_average": {"start": load_at_start, "end": device.load_average()}},
        "config": asdict(config),
        "dataset": {
            "n": len(images),
            "classes": next((model.opened["classes"] for model in models if model.opened), None),
        },
        "models": {model.entry["file"]: _result(model, models, labels, config) for model in models},
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


def _measure(models: list[_Model], config: BenchmarkConfig, scratch: Path, progress: Progress) -> None:
    """Fill in latency, memory and predictions of the models whose workers are open."""
    for turn in range(config.latency_rounds):
        timed = [model for model in models if model.timed]
        for position in range(len(timed)):
            model = timed[(position + turn) % len(timed)]  # nobody always follows the same neighbour
            progress("latency", turn, config.latency_rounds, model.entry["file"])
            with model.attempt():
                slice_seconds = config.latency_seconds / config.latency_rounds
                model.rounds.append(model.worker.latency(config.warm_up_seconds, slice_seconds))
        progress("latency", turn + 1, config.latency_rounds)
    for model in models:
        if model.timed:
            with model.attempt():
                model.memory = model.worker.memory()  # before accuracy, whose batches are larger
    for index, model in enumerate(models):
        if model.failure is None:
            file, out = model.entry["file"], scratch / f"{index}.npy"
            with model.attempt():
                model.worker.accuracy(
                    config.accuracy_batch,
                    out,
                    lambda done, total, file=file: progress(f"accuracy of {file}", done, total),  # type: ignore[misc]
                )
                model.top = np.load(out, allow_pickle=False)


def _check_classes(models: list[_Model], labels: npt.NDArray[np.int64]) -> None:
    """Labels that a model cannot answer would be counted as wrong answers of the model."""
    for model in models:
        if model.opened and not 0 <= labels.min() <= labels.max() < model.opened["classes"]:
            msg = (
                f"{model.path}: has {model.opened['classes']} classes, but the test labels go from {labels.min()} to "
                f"{labels.max()}; export again"
            )
            raise UsageError(msg)


def _result(
    model: _Model, models: list[_Model], labels: npt.NDArray[np.int64], config: BenchmarkConfig
) -> dict[str, Any]:
    """One model's entry in the results."""
    baseline = next(other for other in models if other.entry["target"] == FLOAT)
    result: dict[str, Any] = {
        "target": model.entry["target"],
        "runtime": RUNTIME,
        "provider": model.opened.get("provider"),
        "status": "measured" if model.failure is None else f"failed: {model.failure}",
        "size_bytes": model.size,
        "peak_memory_bytes": model.memory,
        "accuracy": None,
        "latency": None,
        "versus_float": None,
        "verification": model.entry.get("verification"),
        "fusion": model.entry.get("fusion"),
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
