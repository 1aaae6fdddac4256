"""A benchmark's results and a gate's verdicts as text."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from crqat.pipeline import console
from crqat.pipeline.gate.rules import BASELINES, Verdict, exit_code

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
_VERDICTS = {0: "PASS", 1: "FAIL", 3: "NOT JUDGED: something the gate needs did not work", 4: "INCONCLUSIVE"}


def show(results: dict[str, Any], directory: Path) -> None:
    """The table of a benchmark, then what was not run, then where the files are."""
    rows = [_row(file, model) for file, model in results["models"].items()]
    console.show_table(console.printable(_title(results)), _COLUMNS, rows)
    for line in _remarks(results["models"]):
        click.echo(console.printable(line))
    names = ("results.json", "verdict.json", "junit.xml", "report.html")
    click.echo(f"written: {', '.join(str(directory / name) for name in names)}")


def as_text(results: dict[str, Any]) -> str:
    """The same table and lines as plain text, for `print` and notebooks."""
    rows = [_COLUMNS, *(_row(file, model) for file, model in results["models"].items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(map(console.printable, [_title(results), *lines, *_remarks(results["models"])]))


def _title(results: dict[str, Any]) -> str:
    numbers = sorted({model["accuracy"]["n"] for model in results["models"].values() if model["accuracy"]})
    device, images = results["device"], ", ".join(map(str, numbers))
    return (
        f"{results['run']}: test images: {images}; threads: {results['config']['threads']}; "
        f"{device['cpu']}, onnxruntime {device['onnxruntime'] or 'not installed'}"
    )


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
        if (model.get("float_layers") or {}).get("macs"):
            yield f"{file}: {float_layers(model['float_layers'])}"
        layers = model.get("int8_layers")
        if layers and model["target"] not in BASELINES:
            others = f"; not {', '.join(layers['float'])}" if layers["float"] else ""
            yield f"{file}: {layers['int8']} of {layers['layers']} layers that multiply are INT8{others}"
        latency = model["latency"] or {"status": "not run"}
        if latency["status"] != "measured":
            yield f"{file}: latency {latency['status']}"
            continue
        if latency.get("unstable"):
            yield f"{file}: latency unstable: {latency['unstable']}"
        if latency.get("compute_p50_ms") is not None:
            yield f"{file}: {latency['compute_p50_ms']:.3f} ms of the latency is the device's computation"
        half = model.get("versus_float16")
        if half is not None:
            ratio = _with_interval(half["latency_ratio"], half["latency_ratio_interval"], 3)
            yield f"{file}: latency {ratio} of float16.onnx's"
        if model.get("builds"):
            medians = [statistics.median(build["round_p50_ms"]) for build in model["builds"]]
            yield f"{file}: {len(medians)} builds, p50 from {min(medians):.3f} to {max(medians):.3f} ms"
            yield f"{file}: top-1 at batch 1: {100 * model['accuracy_batch_1']['top1']:.2f} %"


def compare(several: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    """One table of the results of several devices: a file's rows stand together, in the order of the devices.

    Args:
        several: Each results.json with what `results_file.read_results` read from it.
    """
    rows = [[console.printable(cell) for cell in row] for row in side_by_side([results for _, results in several])]
    console.show_table("latency at batch 1; drop and ratio with their intervals", COMPARED, rows)
    for number, (path, results) in enumerate(several, 1):
        click.echo(console.printable(f"{number}: {path}: {results['run']}, {_device(results)}"))


def side_by_side(several: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows with the columns COMPARED: each file on each device."""
    files = dict.fromkeys(file for results in several for file in results["models"])
    return [_compared(file, results) for file in files for results in several if file in results["models"]]


def _device(results: dict[str, Any]) -> str:
    device = results.get("device", {})
    return str((device.get("jetson") or {}).get("model") or device.get("cpu") or "-")


def _compared(file: str, results: dict[str, Any]) -> list[str]:
    """A file's row on one device."""
    from crqat.pipeline.gate.latency_regression import key

    model = results["models"][file]
    accuracy, latency, versus = model["accuracy"] or {}, model["latency"] or {}, model["versus_float"] or {}
    shared = key(results, model)
    status = model["status"] if model["status"] != "measured" else latency.get("status", "not run")
    if status == "measured":
        status = f"unstable: {latency['unstable']}" if latency["unstable"] else "stable"
    return [
        file,
        _device(results),
        str(shared["power mode"] or "-"),
        " ".join(str(shared[name]) for name in ("runtime", "runtime version") if shared[name]) or "-",
        str(accuracy.get("n", "-")),
        _number(accuracy.get("top1"), 2, 100),
        _with_interval(versus.get("drop_points"), versus.get("drop_interval_points"), 2),
        _number(latency.get("p50_ms"), 3),
        _with_interval(versus.get("latency_ratio"), versus.get("latency_ratio_interval"), 3),
        status,
    ]


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


def float_layers(entry: dict[str, Any]) -> str:
    """What `quantization.float_layers` costs: the layers, largest first, and their share of the MACs."""
    names = sorted(entry["macs"], key=lambda name: -entry["macs"][name])
    more = f" and {len(names) - _SHOWN_LAYERS} more" if len(names) > _SHOWN_LAYERS else ""
    shown = ", ".join(names[:_SHOWN_LAYERS]) + more
    return f"kept in float by float_layers: {shown}, {100 * entry['share']:.2f} % of the MACs"


def show_verdicts(verdicts: Sequence[Verdict]) -> None:
    """A line for each rule and file, then the verdict."""
    for line in verdict_lines(verdicts):
        click.echo(line)


def verdict_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """A line for each rule and file, then the verdict."""
    # The message carries measured, interval, allowed and n, as far as the rule has them.
    lines = [f"{verdict.status:<12}  {verdict.file}  {verdict.rule}: {verdict.message}" for verdict in verdicts]
    return [*map(console.printable, lines), f"gate: {_VERDICTS[exit_code(verdicts)]}"]
