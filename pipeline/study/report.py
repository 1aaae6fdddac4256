"""Summarizes the rows of a study: means, intervals over seeds and images, a table and a picture."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats  # type: ignore[import-untyped]

from crqat.core.results.study import StudyRow
from crqat.pipeline.study.methods import METHODS, REFERENCE

COLUMNS = (
    "method", "views", "unlabeled images", "seeds", "test top-1 %", "95 % over seeds", "validation %",
    f"{REFERENCE} minus it, points", "95 % over seeds", "95 % over images", "s",
)  # fmt: skip
_HEAD = """# Study: {name}

Written by `crqat study`; the numbers are in the `.json` next to it. All methods of a table share labels, the float
network that they start from, optimizer steps (or, with `time`, approximately the seconds) and the batch of labeled
images. Accuracies are of the torch network on all test images. Intervals over seeds are Student's t; those over images
are paired, for the mean difference over all seeds. `s`: seconds of the training on one core, as a mean over the seeds,
on a machine that may have run other work.
"""


@dataclass(frozen=True)
class Line:
    """Summary of one method of a study at one number of labels and one bit width.

    Attributes:
        method: Name of the method.
        rows: Results of the method, one for each seed.
        mean: Mean test accuracy over the seeds, in percent.
        half: Half the 95 % interval of the mean over seeds; None with one seed.
        difference: Accuracy of the method `REFERENCE` minus that of this method in percentage points, as a mean over
            the seeds in which both descend from the same float network; None without such seeds.
        difference_half: Half the interval of the difference over seeds; None with one seed.
        difference_images: Half the paired interval of the difference over images.
        pairs: Number of seeds in the difference.
    """

    method: str
    rows: list[StudyRow]
    mean: float
    half: float | None
    difference: float | None = None
    difference_half: float | None = None
    difference_images: float | None = None
    pairs: int = 0


def correct(row: StudyRow) -> npt.NDArray[np.float64]:
    """Return an array of shape [N] from a result: 1 for each test image that was classified correctly, else 0."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(row.correct), np.uint8))
    return bits[: row.n].astype(np.float64)


def top1(row: StudyRow) -> float:
    """Return the test accuracy in a result, as a share from 0 to 1."""
    return float(correct(row).mean())


def half_interval(values: Sequence[float]) -> float | None:
    """Return half the 95 % interval of a mean by Student's t; None for one value."""
    if len(values) < 2:
        return None
    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))


def lines(rows: Sequence[StudyRow]) -> list[Line]:
    """Return the summary of each method, in the order of `METHODS`.

    All results must have the same number of labels and the same bit width.
    """
    reference = {row.seed: row for row in rows if row.method == REFERENCE}
    found = []
    for method in METHODS:
        own = sorted((row for row in rows if row.method == method), key=lambda row: row.seed)
        if not own:
            continue
        values = [100 * top1(row) for row in own]
        both = [row for row in own if _alike(row, reference.get(row.seed))] if method != REFERENCE else []
        if not both:
            found.append(Line(method, own, float(np.mean(values)), half_interval(values)))
            continue
        images = np.stack([100 * (correct(reference[row.seed]) - correct(row)) for row in both])
        spread = images.mean(0).std(ddof=1) / math.sqrt(images.shape[1])
        difference = float(images.mean()), half_interval(images.mean(1).tolist()), float(stats.norm.ppf(0.975) * spread)
        found.append(Line(method, own, float(np.mean(values)), half_interval(values), *difference, len(both)))
    return found


def _alike(row: StudyRow, reference: StudyRow | None) -> bool:
    """Return whether a result descends from the same float network as that of `REFERENCE`, which may not exist."""
    return reference is not None and row.lineage[:1] == reference.lineage[:1]


def others(rows: Sequence[StudyRow]) -> str:
    """Return a sentence that names the methods that descend from another float network than the one in the table.

    All results must have the same number of labels and the same bit width. The text is empty if there is no such
    method.
    """
    odd: list[str] = []
    for seed in sorted({row.seed for row in rows}):
        own = [row for row in rows if row.seed == seed]
        first = next((row for row in own if row.method == "float"), own[-1])
        names = [row.method for row in own if row.lineage[:1] != first.lineage[:1]]
        odd += [f"{', '.join(names)} with seed {seed}"] if names else []
    if not odd:
        return ""
    return (
        "These methods start from another float network than the one in the table, and cannot be compared with methods "
        f"that start from it: {'; '.join(odd)}."
    )


def cells(rows: Sequence[StudyRow]) -> dict[tuple[Any, Any, str], list[StudyRow]]:
    """Group results by (number of labels, bit width, `equal`): each group becomes one table.

    `equal` is what all methods of a comparison had equally much of: "steps", or (approximately) "time".
    """
    found: dict[tuple[Any, Any, str], list[StudyRow]] = {}
    for row in rows:
        found.setdefault((row.labels, row.bits, row.equal), []).append(row)
    return found


def title(cell: tuple[Any, Any, str]) -> str:
    """Return the heading of a table; `cell` is a key of `cells`: (number of labels, bit width, "steps" or "time")."""
    labels, bits, equal = cell
    named = "all labels" if labels is None else f"{labels:,} labels"
    return f"{named}, {'bits of the recipe' if bits is None else f'W{bits}A{bits}'}, equal {equal}"


def table(rows: Sequence[StudyRow]) -> list[list[str]]:
    """Return the cells of one table row for each method; the columns are those in `COLUMNS`.

    Args:
        rows: Results with the same number of labels and the same bit width.
    """
    return [
        [
            line.method, line.rows[0].views, line.rows[0].unlabeled, str(len(line.rows)), f"{line.mean:.2f}",
            _plus_minus(line.half), f"{100 * np.mean([row.validation for row in line.rows]):.2f}",
            "" if line.difference is None else f"{line.difference:+.2f}", _plus_minus(line.difference_half),
            _plus_minus(line.difference_images), f"{np.mean([row.seconds for row in line.rows]):.0f}",
        ]
        for line in lines(rows)
    ]  # fmt: skip


def headline(rows: Sequence[StudyRow]) -> str:
    """Return a sentence with the difference in accuracy between the method `REFERENCE` and the best other method.

    The best is that with the highest validation accuracy. The text is empty if no other method shares a seed with
    `REFERENCE`.
    """
    found = [line for line in lines(rows) if line.difference is not None]
    if not found:
        return ""
    best = max(found, key=lambda line: float(np.mean([row.validation for row in line.rows])))
    seeds = f"{best.pairs} seed{'s' * (best.pairs > 1)}"
    return (
        f"{REFERENCE} minus {best.method}, the best of the others on the validation images: {best.difference:+.2f} "
        f"± {best.difference_images:.2f} points (paired over images, {seeds})."
    )


def markdown(rows: Sequence[StudyRow], name: str) -> str:
    """Return a Markdown page with a table for each number of labels and bit width; `name` is the name of the study."""
    parts = [_HEAD.format(name=name), f"![accuracy of each method]({name}.png)\n"]
    for cell, own in cells(rows).items():
        head = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        body = ["| " + " | ".join(row) + " |" for row in table(own)]
        said = [f"{sentence}\n" for sentence in (headline(own), others(own)) if sentence]
        parts += [f"## {title(cell)}\n", *said, "\n".join([*head, *body]) + "\n"]
    return "\n".join(parts)


def picture(rows: Sequence[StudyRow], path: Path) -> None:
    """Draw each method's accuracy for each seed, and the mean with its interval, into a file; one plot per table."""
    from matplotlib.figure import Figure

    found = cells(rows)
    heights = [len(lines(own)) for own in found.values()]
    figure = Figure(figsize=(8, 0.9 + sum(0.32 * height + 0.9 for height in heights)), layout="constrained")
    axes = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (cell, own) in zip(axes, found.items(), strict=True):
        for place, line in enumerate(reversed(lines(own))):
            values = [100 * top1(row) for row in line.rows]
            axis.plot(values, [place] * len(values), "o", color="#9aa5b1", markersize=5)
            axis.errorbar([line.mean], [place], xerr=line.half, fmt="D", color="#1f5fa8", markersize=6, capsize=3)
        axis.set_yticks(range(len(lines(own))), [line.method for line in reversed(lines(own))])
        axis.set_title(title(cell), loc="left", fontsize=10)
        axis.set_xlabel("top-1 % on the test images; diamonds: means with 95 % intervals over seeds, dots: seeds")
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120, metadata={"Software": ""})


def _plus_minus(half: float | None) -> str:
    return "" if half is None else f"± {half:.2f}"
