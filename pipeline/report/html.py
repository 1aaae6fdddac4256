"""Renders a run as one self-contained HTML page: first the verdict, then its evidence. No scripts or external files."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from crqat.core import strict_json
from crqat.core import targets as runtimes
from crqat.core.errors import UsageError
from crqat.core.results.analysis import LayerAccuracy, Perturbation, mean_and_deviation
from crqat.core.results.benchmark import Results
from crqat.core.results.export import ExportPayload
from crqat.core.results.training import Epoch, TrainingPayload
from crqat.core.results.verdict import Verdict
from crqat.core.run_directory import payload_of, read_manifest
from crqat.core.typed_json import from_json, to_json
from crqat.pipeline.gate.rules import exit_code
from crqat.pipeline.report.answers import Difference, differences
from crqat.pipeline.report.tables import COMPARED, float_layers, side_by_side
from crqat.pipeline.report.time_spent import time_spent

TEMPLATES = Path(__file__).parents[1] / "templates"
WORDS = {0: "pass", 1: "fail", 3: "not judged", 4: "inconclusive"}
# Readable on white and on near-black.
_PALETTE = ("#8a8f98", "#8957c9", "#2f81d6", "#4f9d3a", "#d9822b", "#c0392b")
_COLORS = dict(zip(("float", "openvino", *runtimes.names()), _PALETTE, strict=False))
# Names of the networks in perturbation.json (written by `crqat sensitivity --perturbation`) in plain words.
PERTURBATION = "perturbation.json"
NETWORKS = {"float": "float", "calibrated": "calibration alone", "student": "trained", "teacher": "EMA teacher"}
_NETWORK_COLORS = dict(zip(NETWORKS, ("#8a8f98", "#8957c9", "#2f81d6", "#d9822b"), strict=True))
_LONGEST_NAME = 24
_LINES = {"validation": "#2f81d6", "validation_teacher": "#d9822b", "lambda": "#4f9d3a"}


def render(
    run: Path,
    results: Results,
    verdicts: Sequence[Verdict],
    layers: Sequence[LayerAccuracy] = (),
    others: Sequence[Results] = (),
    perturbation: Perturbation | None = None,
) -> str:
    """Render the HTML page of a run.

    Args:
        run: Directory of the run; its train and export manifests and the training history are read.
        results: Results of the benchmark.
        verdicts: Verdicts of the gate on these results.
        layers: Result of `crqat.export.analysis.layer_accuracy.accuracy_of_each_layer`, if it was measured.
        others: Results of benchmarks of the same files on other devices.
        perturbation: Accuracy of the run's networks under noise, if it was measured.

    Raises:
        UsageError: A file of the run is missing or damaged.
    """
    manifest = read_manifest(run / "export")
    train = payload_of(TrainingPayload, run / "train", read_manifest(run / "train"))
    export = payload_of(ExportPayload, run / "export", manifest)
    history = _history(run / "train" / "history.jsonl")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(
        percent=_percent,
        number=_number,
        interval=_interval,
        kib=_kib,
        float_layers=float_layers,
        json=to_json,
        integer=_integer,
    )
    page = environment.get_template("report.html.j2").render(
        results=results,
        verdicts=verdicts,
        verdict=WORDS[exit_code(verdicts)],
        train=train,
        export=export,
        environment=manifest.environment,
        revision=str(manifest.environment.get("git_revision", "unknown")),
        recipe=manifest.config,
        edges=_edges(export),
        differences=[
            (difference, _class_chart(difference)) for difference in differences(run / "export", export, results)
        ],
        spent=time_spent(run / "export", export, results),
        summaries=export.layers,
        all_macs=sum(layer.macs for layer in export.layers),
        float_reasons=_float_reasons(export),
        layers=layers,
        perturbation=perturbation,
        noise="" if perturbation is None else _noise(perturbation),
        columns=COMPARED,
        devices=side_by_side([results, *others]) if others else [],
        tradeoff=_tradeoff(results),
        curves=_curves(history, train.float_network.validation_accuracy) if history else "",
    )
    return re.sub(r"<table>.*?</table>", _with_headings, page, flags=re.DOTALL)


def _with_headings(table: re.Match[str]) -> str:
    """Return an HTML table in which each cell has its column's heading as an attribute.

    On a phone, the style sheet shows each row as a list of headings and cells.
    """
    headings = re.findall(r"<th[^>]*>(.*?)</th>", table[0])

    def row(cells: re.Match[str]) -> str:
        column = 0

        def cell(found: re.Match[str]) -> str:
            nonlocal column
            heading = headings[column]
            column += int(found[1] or 1)
            return f'{found[0]} data-heading="{heading}"'

        return re.sub(r'<td(?: colspan="(\d+)")?', cell, cells[0])

    return re.sub(r"<tr>.*?</tr>", row, table[0], flags=re.DOTALL)


def _percent(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}"


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _interval(interval: Sequence[float] | None, digits: int = 3, factor: float = 1.0) -> str:
    return "" if interval is None else f"[{interval[0] * factor:.{digits}f}, {interval[1] * factor:.{digits}f}]"


def _integer(value: int | None) -> str:
    return "-" if value is None else str(value)


def _kib(size: int | None) -> str:
    return "-" if size is None else f"{size / 1024:.1f}"


@dataclass(frozen=True)
class _Edge:
    """A quantized edge: its signal-to-noise ratio in dB, and by target whether the file holds its Grid exactly."""

    edge: str
    noise: float | None
    claims: dict[str, str]


def _edges(export: ExportPayload) -> list[_Edge]:
    """Return one row for each quantized edge, the noisiest first."""
    claims: dict[str, dict[str, str]] = {}
    for model in export.models:
        for edge, claim in model.claims.items():
            claims.setdefault(edge, {})[model.target] = claim.claim
    rows = [_Edge(edge, export.noise.get(edge), of_edge) for edge, of_edge in claims.items()]
    return sorted(rows, key=lambda row: (row.noise is None, row.noise or 0.0))


def _float_reasons(export: ExportPayload) -> dict[str, str]:
    """Return by layer why a file computes the layer in float although it has quantizers."""
    reasons: dict[str, list[str]] = {}
    for model in export.models:
        for node in model.fusion.in_float if model.fusion is not None else ():
            reasons.setdefault(node.node, []).append(f"float in {model.file}: {node.reason}")
    return {node: "; ".join(texts) for node, texts in reasons.items()}


def _class_chart(difference: Difference) -> str:
    """Draw the float and the quantized file's accuracy of the classes that changed most, as SVG."""
    rows = difference.changed
    if not rows:
        return ""
    height = 1.2 + 0.28 * len(rows)
    figure, axes = _figure(6.4, height)
    for place, row in enumerate(rows):
        before, after = 100 * row.float_right / row.n, 100 * row.right / row.n
        axes.plot([before, after], [place, place], color="#8a8f98", linewidth=1)
        axes.plot([before], [place], "o", color=_COLORS["float"], label="float" if place == 0 else None)
        axes.plot([after], [place], "o", color="#2f81d6", label=_label(difference.file) if place == 0 else None)
    axes.set_yticks(range(len(rows)), [f"{_label(_shortened(row.name))} (n {row.n})" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("top-1 accuracy, %")
    axes.margins(y=0.5 / len(rows))
    figure.legend(frameon=False, fontsize=9, loc="outside upper center", ncols=2)
    return _svg(figure)


def _history(path: Path) -> list[Epoch]:
    try:
        return [from_json(Epoch, strict_json.parse(line)) for line in path.read_text().splitlines()]
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}; train again with --force"
        raise UsageError(msg) from error
    except ValueError as error:
        msg = f"{path}: damaged: {error}; train again with --force"
        raise UsageError(msg) from error


def _tradeoff(results: Results) -> str:
    """Draw accuracy against latency, one point per timed file, with the intervals of both."""
    points = [
        (model.target, file, model.accuracy, model.timed)
        for file, model in results.models.items()
        if model.accuracy is not None and model.timed is not None
    ]
    if not points:
        return ""
    figure, axes = _figure(6.4, 3.2)
    for target, file, accuracy, latency in points:
        low, high = accuracy.top1_interval
        top1, p50 = 100 * accuracy.top1, latency.p50_ms
        spread = [[top1 - 100 * low], [100 * high - top1]]
        color = _COLORS.get(target, "#8a8f98")
        axes.errorbar([p50], [top1], yerr=spread, fmt="o", color=color, capsize=3, label=_label(file))
    axes.set_xlabel("median latency at batch 1, ms")
    axes.set_ylabel("top-1 accuracy, %")
    axes.set_xlim(0, 1.1 * max(latency.p50_ms for _, _, _, latency in points))
    axes.legend(frameon=False, fontsize=9)
    return _svg(figure)


def _shortened(name: str) -> str:
    """Return a class name, cut to a length that leaves room for the chart."""
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _label(file: str) -> str:
    """Return a name that matplotlib shows unchanged: no math between dollar signs, no hiding by an underscore."""
    text = "".join(letter if letter.isprintable() else "?" for letter in file).replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def _curves(history: list[Epoch], float_accuracy: float) -> str:
    """Draw validation accuracy over the epochs, float training and QAT side by side.

    Lambda, the weight of the consistency loss, is drawn too where it is not 0. The QAT curve starts with the calibrated
    network as epoch 0; the float network's accuracy is a horizontal line.
    """
    from matplotlib.ticker import MaxNLocator

    phases = list(dict.fromkeys(row.phase for row in history))
    figure, all_axes = _figure(6.4, 3.2, columns=len(phases))
    for axes, phase in zip(all_axes if len(phases) > 1 else [all_axes], phases, strict=True):
        rows = [row for row in history if row.phase == phase]
        for key, label in (("validation", "student" if phase == "qat" else "float"), ("validation_teacher", "teacher")):
            points = [(row.epoch, 100 * value) for row in rows if (value := getattr(row, key)) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), ".-", color=_LINES[key], label=label)
        if phase == "qat":
            axes.axhline(100 * float_accuracy, linestyle=":", color=_COLORS["float"], label="float")
        axes.set_ylabel("validation accuracy, %")
        axes.legend(frameon=False, fontsize=8)
        if any(row.weight for row in rows):
            weight = axes.twinx()  # on the accuracies' axis it would flatten them
            weights = [(row.epoch, row.weight) for row in rows if row.weight is not None]
            weight.plot(*zip(*weights, strict=True), "--", color=_LINES["lambda"], linewidth=1)
            weight.set_ylabel("lambda (dashed)", color=_LINES["lambda"])
            weight.set_ylim(bottom=0)
            weight.spines["top"].set_visible(False)
        axes.set_title(phase)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(y=0.1)
        axes.set_ylim(top=min(axes.get_ylim()[1], 101.0))  # no accuracy is above 100 %
    return _svg(figure)


def _noise(perturbation: Perturbation) -> str:
    """Draw accuracy against noise on inputs and weights, one line per network, with its deviation over draws."""
    figure, (left, right) = _figure(6.4, 3.2, columns=2)
    for network in perturbation.networks:
        for axes, levels in ((left, network.input_noise), (right, network.weight_noise)):
            points = [mean_and_deviation([100 * value for value in level.accuracy]) for level in levels]
            means, spreads = zip(*points, strict=True)
            axes.errorbar(
                [level.level for level in levels], means, yerr=spreads, fmt=".-", capsize=3,
                color=_NETWORK_COLORS[network.network], label=NETWORKS[network.network],
            )  # fmt: skip
    left.set_title("noise on the input")
    left.set_xlabel("standard deviation")
    right.set_title("noise on the weights")
    right.set_xlabel("share of the weight norm")
    for axes in (left, right):
        axes.set_ylabel("validation accuracy, %")
        axes.legend(frameon=False, fontsize=8)
        axes.set_ylim(top=min(axes.get_ylim()[1], 101.0))  # no accuracy is above 100 %
    return _svg(figure)


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    # Use the page's own font, and ids that do not change between renderings.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "crqat", "font.family": "sans-serif", "font.size": 10})
    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained")
    for one in axes if columns > 1 else [axes]:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    """Return the picture as inline SVG: as wide as the page allows, text in the page's colour, no background."""
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    with warnings.catch_warnings():
        # The reader's browser has the glyphs that this machine's font lacks.
        warnings.filterwarnings("ignore", "Glyph|constrained_layout")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL).replace("#000000", "currentColor")
    # Text without its own colour would be black whatever the page's colour is.
    return re.sub(r'<text style="', '<text style="fill: currentColor; ', text)
