"""Formats a benchmark's results and a gate's verdicts as text."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import click

from crqat.core.results.benchmark import MEASURED, FloatLayers, LatencyRatio, ModelResult, Results, VersusFloat
from crqat.core.results.engine import EngineSummary
from crqat.core.results.verdict import Verdict
from crqat.pipeline import console
from crqat.pipeline.gate.rules import BASELINES, exit_code

_COLUMNS = (
    "file",
    "target",
    "top-1 %",
    "top-5 %",
    "drop, points",
    "agreement %",
    "p50 ms",
    "x float latency",
    "KiB",
    "peak MiB",
    "verification",
)
COMPARED = (
    "file",
    "device",
    "power mode",
    "runtime",
    "n",
    "top-1 %",
    "drop, points",
    "p50 ms",
    "x float",
    "latency is",
)
_SHOWN_LAYERS = 3
_VERDICTS = {0: "PASS", 1: "FAIL", 3: "NOT JUDGED: a rule could not be checked", 4: "INCONCLUSIVE"}


def show(results: Results, directory: Path) -> None:
    """Print a benchmark's results as a table, then what is missing or unreliable, then the files in `directory`."""
    rows = [_row(file, model) for file, model in results.models.items()]
    console.show_table(console.printable(_title(results)), _COLUMNS, rows)
    for line in _lines(results.models):
        click.echo(console.printable(line))
    names = ("results.json", "verdict.json", "junit.xml", "report.html")
    click.echo(f"written: {', '.join(str(directory / name) for name in names)}")


def as_text(results: Results) -> str:
    """Return the text that `show` prints for a benchmark's results, for `print` and notebooks."""
    rows = [_COLUMNS, *(_row(file, model) for file, model in results.models.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(map(console.printable, [_title(results), *lines, *_lines(results.models)]))


def _title(results: Results) -> str:
    numbers = sorted({model.accuracy.n for model in results.models.values() if model.accuracy is not None})
    return (
        f"{results.run}: test images: {', '.join(map(str, numbers))}; threads: {results.config.threads}; "
        f"{results.device.cpu}, onnxruntime {results.device.onnxruntime or 'not installed'}"
    )


def _row(file: str, model: ModelResult) -> list[str]:
    accuracy, latency, versus = model.accuracy, model.timed, model.versus_float
    cells = [
        file,
        model.target,
        _number(accuracy.top1 if accuracy else None, 2, 100),
        _number(accuracy.top5 if accuracy else None, 2, 100),
        _drop(versus),
        _number(versus.agreement if versus else None, 2, 100),
        _number(latency.p50_ms if latency else None, 3) + (" unstable" if latency and latency.unstable else ""),
        _ratio(versus),
        _number(model.size_bytes, 1, 1 / 1024),
        _number(model.peak_memory_bytes, 1, 1 / 1024**2),
        "-" if model.verification is None else model.verification.status,
    ]
    return [console.printable(cell) for cell in cells]


def _number(value: float | None, digits: int, factor: float = 1.0) -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}"


def _drop(versus: VersusFloat | None) -> str:
    return "-" if versus is None else _with_interval(versus.drop_points, versus.drop_interval_points, 2)


def _ratio(ratio: VersusFloat | LatencyRatio | None) -> str:
    return "-" if ratio is None else _with_interval(ratio.latency_ratio, ratio.latency_ratio_interval, 3)


def _with_interval(value: float | None, interval: tuple[float, float] | None, digits: int) -> str:
    if value is None or interval is None:
        return "-"
    return f"{value:.{digits}f} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def _lines(models: Mapping[str, ModelResult]) -> Iterable[str]:
    """Yield a line for each missing or unreliable number of a file, and for what the table has no column for."""
    for file, model in models.items():
        if model.status != MEASURED:
            yield f"{file}: {model.status}"
            continue
        if model.engine is not None:
            yield f"{file}: engine {_engine(model.engine)}"
        if model.float_layers is not None and model.float_layers.macs:
            yield f"{file}: {float_layers(model.float_layers)}"
        layers = model.int8_layers
        if layers is not None and model.target not in BASELINES:
            others = f"; in float: {', '.join(layers.in_float)}" if layers.in_float else ""
            yield f"{file}: {layers.int8} of {layers.layers} layers that multiply are INT8{others}"
        latency = model.timed
        if latency is None:
            yield f"{file}: latency {_why_untimed(model)}"
            continue
        if latency.unstable:
            yield f"{file}: latency unstable: {latency.unstable}"
        if latency.compute_p50_ms is not None:
            yield f"{file}: {latency.compute_p50_ms:.3f} ms of the latency is the device's computation"
        if model.versus_float16 is not None:
            yield f"{file}: latency divided by that of float16.onnx: {_ratio(model.versus_float16)}"
        if model.builds:
            medians = [statistics.median(build.round_p50_ms) for build in model.builds]
            yield f"{file}: {len(medians)} builds, p50 from {min(medians):.3f} to {max(medians):.3f} ms"
        if model.accuracy_batch_1 is not None:
            yield f"{file}: top-1 at batch 1: {100 * model.accuracy_batch_1.top1:.2f} %"


def _why_untimed(model: ModelResult) -> str:
    return "not run" if model.latency is None else model.latency.status


def compare(several: Sequence[tuple[Path, Results]]) -> None:
    """Print the results of several devices as one table, in which the rows of the same file follow each other.

    Args:
        several: Path of each results.json, and its content.
    """
    rows = [[console.printable(cell) for cell in row] for row in side_by_side([results for _, results in several])]
    console.show_table("latency at batch 1; drop and ratio with their intervals", COMPARED, rows)
    for number, (path, results) in enumerate(several, 1):
        click.echo(console.printable(f"{number}: {path}: {results.run}, {_device(results)}"))


def side_by_side(several: Sequence[Results]) -> list[list[str]]:
    """Return the cells of one table row for each file on each device; the columns are those in `COMPARED`."""
    files = dict.fromkeys(file for results in several for file in results.models)
    return [_compared(file, results) for file in files for results in several if file in results.models]


def _device(results: Results) -> str:
    board = results.device.jetson
    return (board and board.model) or results.device.cpu


def _compared(file: str, results: Results) -> list[str]:
    """Return the table row of a file on one device, with the columns `COMPARED`."""
    from crqat.pipeline.gate.latency_regression import key

    model = results.models[file]
    accuracy, latency, shared = model.accuracy, model.timed, key(results, model)
    status = model.status if model.status != MEASURED else _why_untimed(model)
    if model.status == MEASURED and latency is not None:
        status = f"unstable: {latency.unstable}" if latency.unstable else "stable"
    return [
        file,
        _device(results),
        str(shared["power mode"] or "-"),
        " ".join(str(shared[name]) for name in ("runtime", "runtime version") if shared[name]) or "-",
        "-" if accuracy is None else str(accuracy.n),
        _number(accuracy.top1 if accuracy else None, 2, 100),
        _drop(model.versus_float),
        _number(latency.p50_ms if latency else None, 3),
        _ratio(model.versus_float),
        status,
    ]


def _engine(engine: EngineSummary) -> str:
    """Describe a TensorRT engine in one line."""
    covered, counts, builder = engine.coverage, engine.counts, engine.builder
    if covered is None or counts is None or builder is None:
        return engine.status
    share = "unknown share" if covered.by_macs is None else f"{100 * covered.by_macs:.2f} %"
    return (
        f"built by {builder.name} {builder.version}: {share} of the MACs in INT8, {counts.layers} layers, "
        f"{counts.pointwise} pointwise, {counts.reformat} reformat"
    )


def float_layers(kept: FloatLayers) -> str:
    """Return a text that names the layers a recipe keeps in float, largest first, and their share of the MACs."""
    names = sorted(kept.macs, key=lambda name: -kept.macs[name])
    more = f" and {len(names) - _SHOWN_LAYERS} more" if len(names) > _SHOWN_LAYERS else ""
    shown = ", ".join(names[:_SHOWN_LAYERS]) + more
    return f"kept in float by float_layers: {shown}, {100 * kept.share:.2f} % of the MACs"


def show_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Print the gate's verdicts on stdout: one line for each rule and file, then the overall verdict."""
    for line in verdict_lines(verdicts):
        click.echo(line)


def verdict_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """Return the gate's verdicts as text: one line for each rule and file, then the overall verdict."""
    # The message holds measured value, interval, limit and n, if the rule has them.
    lines = [f"{verdict.status:<12}  {verdict.file}  {verdict.rule}: {verdict.message}" for verdict in verdicts]
    return [*map(console.printable, lines), f"gate: {_VERDICTS[exit_code(verdicts)]}"]
