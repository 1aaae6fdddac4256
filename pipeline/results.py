"""A benchmark's results and a gate's verdicts as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from pipeline import console
from pipeline.gate import Verdict, exit_code

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
_VERDICTS = {0: "PASS", 1: "FAIL", 3: "NOT JUDGED: something the gate needs did not work", 4: "INCONCLUSIVE"}


def show(results: dict[str, Any], directory: Path) -> None:
    """The table of a benchmark, then what was not run, then where the files are."""
    models: dict[str, Any] = results["models"]
    numbers = sorted({model["accuracy"]["n"] for model in models.values() if model["accuracy"]})
    device = results["device"]
    images, threads = ", ".join(map(str, numbers)), results["config"]["threads"]
    title = (
        f"{results['run']}: test images: {images}; threads: {threads}; "
        f"{device['cpu']}, onnxruntime {device['onnxruntime']}"
    )
    console.show_table(console.printable(title), _COLUMNS, [_row(file, model) for file, model in models.items()])
    for line in _remarks(models):
        click.echo(console.printable(line))
    click.echo(f"written: {', '.join(str(directory / name) for name in ('results.json', 'junit.xml', 'report.html'))}")


def _row(file: str, model: dict[str, Any]) -> list[str]:
    accuracy, latency = model["accuracy"] or {}, model["latency"] or {}
    versus, proof = model["versus_float"] or {}, model["verification"] or {}
    cells = [
        file,
        model["target"],
        _number(accuracy.get("top1"), 2, 100),
        _number(accuracy.get("top5"), 2, 100),
        _with_interval(versus.get("drop_points"), versus.get("drop_interval_points"), 2),
        _number(versus.get("agreement"), 2, 100),
        _number(latency.get("p50_ms"), 3) + (" unstable" if latency.get("unstable") else ""),
        _with_interval(versus.get("latency_ratio"), versus.get("latency_ratio_interval"), 3),
        _number(model["size_bytes"], 1, 1 / 1024),
        _number(model["peak_memory_bytes"], 1, 1 / 1024**2),
        proof.get("status", "-"),
    ]
    return [console.printable(cell) for cell in cells]


def _number(value: float | None, digits: int, factor: float = 1.0) -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}"


def _with_interval(value: float | None, interval: Sequence[float] | None, digits: int) -> str:
    if value is None or interval is None:
        return "-"
    return f"{value:.{digits}f} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def _remarks(models: dict[str, Any]) -> Iterable[str]:
    """A line for everything that has no number, and for every number that is not to be trusted."""
    for file, model in models.items():
        if model["status"] != "measured":
            yield f"{file}: {model['status']}"
            continue
        engine = _engine(model.get("engine"))
        if engine:
            yield f"{file}: engine {engine}"
        latency = model["latency"] or {"status": "not run"}
        if latency["status"] != "measured":
            yield f"{file}: latency {latency['status']}"
        elif latency.get("unstable"):
            yield f"{file}: latency unstable: {latency['unstable']}"


def _engine(engine: dict[str, Any] | None) -> str:
    """A TensorRT engine in one line; empty where none is meant to be."""
    if engine is None or engine["status"] != "built":
        return "" if engine is None else engine["status"]
    covered, number, builder = engine["coverage"], engine["counts"], engine["builder"]
    share = "unknown share" if covered["by_macs"] is None else f"{100 * covered['by_macs']:.2f} %"
    return (
        f"built by {builder['name']} {builder['version']}: {share} of the MACs in INT8, {number['layers']} layers, "
        f"{number['pointwise']} pointwise, {number['reformat']} reformat"
    )


def show_verdicts(verdicts: Sequence[Verdict]) -> None:
    """A line for each rule and file, then the verdict."""
    for verdict in verdicts:
        # The message carries measured, interval, allowed and n, as far as the rule has them.
        click.echo(console.printable(f"{verdict.status:<12}  {verdict.file}  {verdict.rule}: {verdict.message}"))
    click.echo(f"gate: {_VERDICTS[exit_code(verdicts)]}")
