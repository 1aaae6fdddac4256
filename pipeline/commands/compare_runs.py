"""Compares several runs: accuracy paired by image, latency, size and INT8 coverage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from crqat.core.errors import ToolError, UsageError
from crqat.core.results.benchmark import ModelResult, Results, read_results
from crqat.core.results.comparison import Compared, Comparison
from crqat.core.results.export import ExportedModel, ExportPayload
from crqat.core.run_directory import Manifest, payload_of, verify_stage
from crqat.pipeline import console
from crqat.pipeline.stages import staleness

COLUMNS = (
    "file",
    "run",
    "n",
    "top-1 %",
    "against the first run, points",
    "p50 ms",
    "KiB",
    "INT8 MACs %",
    "verification",
)
_FLOAT16 = "float16"


@dataclass(frozen=True)
class _Run:
    """A finished run: name, export, benchmark results, labels of the test images, hashes of images and labels."""

    name: str
    export: ExportPayload
    results: Results
    labels: npt.NDArray[np.int64]
    hashes: tuple[str, str]


def compare(directories: Sequence[Path]) -> Comparison:
    """Compare each file of several runs with the file of the first run for the same target.

    Args:
        directories: Run directories of finished runs, at least two.

    Raises:
        UsageError: A run is not finished or is damaged.
    """
    names = [directory.resolve().name for directory in directories]
    runs = [
        _read(directory, str(directory) if names.count(name) > 1 else name)
        for directory, name in zip(directories, names, strict=True)
    ]
    targets = dict.fromkeys(
        model.target for run in runs for model in run.results.models.values() if model.target != _FLOAT16
    )
    rows = []
    for target in targets:
        found = [(run, *entry) for run in runs if (entry := _of_target(run, target)) is not None]
        rows += [_compared(found[0], own) for own in found]
    return Comparison(rows)


def _read(directory: Path, name: str) -> _Run:
    exported: Manifest = verify_stage(directory / "export")
    staleness.check_parent(directory, verify_stage(directory / "benchmark"))
    export = payload_of(ExportPayload, directory / "export", exported)
    labels = np.load(directory / "export" / export.labels, allow_pickle=False)
    hashes = (exported.files[export.images], exported.files[export.labels])
    return _Run(name, export, read_results(directory / "benchmark" / "results.json"), labels, hashes)


def _of_target(run: _Run, target: str) -> tuple[str, ModelResult] | None:
    return next(((file, model) for file, model in run.results.models.items() if model.target == target), None)


def _compared(first: tuple[_Run, str, ModelResult], own: tuple[_Run, str, ModelResult]) -> Compared:
    from crqat.runtime_eval.measure.accuracy import tango

    run, file, model = own
    difference, interval, unpaired = None, None, ""
    before, after = first[2].classes(), model.classes()
    if run is first[0]:
        pass
    elif run.hashes != first[0].hashes:
        unpaired = "other test images"
    elif before is None or after is None:
        unpaired = "the predictions were not stored; run the benchmark again"
    else:
        was_right, is_right = before == run.labels, after == run.labels
        n, won, lost = len(run.labels), int((is_right & ~was_right).sum()), int((was_right & ~is_right).sum())
        low, high = tango(won, lost, n)
        difference, interval = 100 * (won - lost) / n, (100 * low, 100 * high)
    accuracy, board = model.accuracy, run.results.device.jetson
    entry = next((entry for entry in run.export.models if entry.file == file), None)
    return Compared(
        run=run.name,
        file=file,
        target=model.target,
        status=model.status,
        n=None if accuracy is None else accuracy.n,
        top1=None if accuracy is None else accuracy.top1,
        top1_interval=None if accuracy is None else accuracy.top1_interval,
        difference_points=difference,
        difference_interval_points=interval,
        unpaired=unpaired,
        p50_ms=None if model.timed is None else model.timed.p50_ms,
        device=(board and board.model) or run.results.device.cpu,
        size_bytes=model.size_bytes,
        int8_share=_int8_share(run.export, entry, model),
        verification=None if model.verification is None else model.verification.status,
    )


def _int8_share(export: ExportPayload, entry: ExportedModel | None, model: ModelResult) -> float | None:
    """Return the INT8 share of the multiply-accumulates of TensorRT's engine or of ONNX Runtime's optimized graph."""
    if model.engine is not None:
        return None if model.engine.coverage is None else model.engine.coverage.by_macs
    total = sum(layer.macs for layer in export.layers)
    if entry is None or entry.fusion is None or not total:
        return None
    stays = {node.node for node in entry.fusion.in_float}
    covered = [
        layer.macs for layer in export.layers if layer.weight_bits and layer.input_bits and layer.layer not in stays
    ]
    return sum(covered) / total


def show(comparison: Comparison) -> None:
    """Print the compared runs as a table on stdout."""
    devices = {row.device for row in comparison.rows}
    several = len(devices) > 1
    rows = [[console.printable(cell) for cell in _cells(row, several)] for row in comparison.rows]
    columns = [*COLUMNS, "device"] if several else COLUMNS
    console.show_table("accuracy of the same test images, paired; each bound one-sided 95 %", columns, rows)


def _cells(row: Compared, several: bool) -> list[str]:
    difference = row.unpaired or ("-" if row.top1 is not None else row.status)
    if row.difference_points is not None and row.difference_interval_points is not None:
        low, high = row.difference_interval_points
        difference = f"{row.difference_points:+.2f} [{low:+.2f}, {high:+.2f}]"
    cells = [
        row.file,
        row.run,
        "-" if row.n is None else str(row.n),
        "-" if row.top1 is None else f"{100 * row.top1:.2f}",
        difference,
        "-" if row.p50_ms is None else f"{row.p50_ms:.3f}",
        "-" if row.size_bytes is None else f"{row.size_bytes / 1024:.1f}",
        "-" if row.int8_share is None else f"{100 * row.int8_share:.1f}",
        row.verification or "-",
    ]
    return [*cells, row.device] if several else cells


def check_picture(path: Path) -> None:
    """Check the file name of a picture, before the runs are read.

    Raises:
        UsageError: The suffix is not .png, .svg or .pdf, or the folder does not exist.
    """
    if path.suffix not in (".png", ".svg", ".pdf"):
        msg = f"--picture {path}: not a picture; name it .png, .svg or .pdf"
        raise UsageError(msg)
    if not path.parent.is_dir():
        msg = f"--picture {path}: there is no folder {path.parent}; make it first"
        raise UsageError(msg)


def draw(comparison: Comparison, path: Path) -> None:
    """Draw the accuracy, with its interval, and the latency of each file of each run into a picture.

    Args:
        comparison: Comparison to draw.
        path: A .png, .svg or .pdf file.

    Raises:
        UsageError: The suffix is not .png, .svg or .pdf, or the folder does not exist.
        ToolError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    check_picture(path)
    rows = [row for row in comparison.rows if row.top1 is not None and row.top1_interval is not None]
    layout = ConstrainedLayoutEngine(wspace=0.06)
    figure = Figure(figsize=(8.4, 1.2 + 0.34 * len(rows)), layout=layout)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    colors = dict(zip(dict.fromkeys(row.run for row in rows), _cycle(), strict=False))
    for place, row in enumerate(rows):
        low, high = row.top1_interval or (0.0, 0.0)
        color = colors.get(row.run, "#8a8f98")
        left.plot([100 * low, 100 * high], [place, place], color=color, linewidth=2)
        left.plot([100 * (row.top1 or 0.0)], [place], "o", color=color)
        if row.p50_ms is not None:
            right.barh([place], [row.p50_ms], color=color, height=0.6)
    left.set_yticks(range(len(rows)), [f"{row.run}: {row.file}".replace("$", r"\$") for row in rows])
    left.invert_yaxis()
    left.set_xlabel("top-1 accuracy, %")
    right.set_xlabel("median latency at batch 1, ms")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        msg = f"--picture {path}: cannot be written: {error.strerror}"
        raise ToolError(msg) from error


def _cycle() -> list[str]:
    return ["#2f81d6", "#d9822b", "#4f9d3a", "#8957c9", "#c0392b", "#17807e", "#b58900", "#6c71c4"]
