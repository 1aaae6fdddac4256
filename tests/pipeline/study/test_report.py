from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats  # type: ignore[import-untyped]

from crqat.core.results.study import StudyRow
from crqat.pipeline.study import report
from crqat.pipeline.study.worker import packed


def row(method: str, seed: int, right: int, n: int = 100, validation: float = 0.5, **changes: Any) -> StudyRow:
    """A method that answers the first `right` images rightly."""
    made = StudyRow(
        labels=400, bits=4, seed=seed, equal="steps", method=method, training=method, network="student", start="float",
        views="weak", unlabeled="no", seconds=10.0, n=n, validation=validation, key="0",
        correct=packed(torch.arange(n) < right),
    )  # fmt: skip
    return replace(made, **changes)


ROWS = [
    row("cr-unlabeled", 0, 80), row("cr-unlabeled", 1, 84), row("qat", 0, 78, validation=0.6), row("qat", 1, 80),
    row("ptq", 0, 50),
]  # fmt: skip


def test_answers_survive_packing() -> None:
    right = torch.rand(1003, generator=torch.Generator().manual_seed(0)) < 0.5
    found = report.correct(row("qat", 0, 0, n=1003, correct=packed(right)))
    np.testing.assert_array_equal(found, right.numpy())


def test_means_and_intervals_over_seeds_and_images() -> None:
    ptq, qat, reference = report.lines(ROWS)
    assert [line.method for line in (ptq, qat, reference)] == ["ptq", "qat", "cr-unlabeled"]
    assert (reference.mean, reference.difference) == (82, None)
    low, high = stats.t.interval(0.95, 1, 82, stats.sem([80, 84]))
    assert reference.half == pytest.approx((high - low) / 2)
    assert ptq.half is None
    # Paired by seed: 80 - 78 and 84 - 80.
    assert qat.difference == pytest.approx(3)
    assert qat.difference_half == pytest.approx(stats.t.ppf(0.975, 1) * stats.sem([2, 4]))
    # Paired by image, each the mean of two seeds.
    images = np.zeros(100)
    images[78:80] += 50  # seed 0
    images[80:84] += 50  # seed 1
    assert qat.difference_images == pytest.approx(stats.norm.ppf(0.975) * images.std(ddof=1) / 10)
    assert ptq.difference == pytest.approx(30)  # of the seed that both have


def test_the_headline_is_the_difference_to_the_best_other_method_on_validation_images() -> None:
    assert report.headline(ROWS).startswith(
        "cr-unlabeled minus qat, the best of the others on the validation images: +3.00 "
    )
    assert report.headline([line for line in ROWS if line.method != "cr-unlabeled"]) == ""


def test_methods_from_another_float_network_are_named_and_not_compared() -> None:
    rows = [
        row("float", 0, 70, lineage=["b"]),
        row("qat", 0, 78, lineage=["a"]),
        row("ptq", 0, 60, lineage=["b"]),
    ]
    rows.append(row("cr-unlabeled", 0, 80, lineage=["b"]))
    differences = {line.method: line.difference for line in report.lines(rows)}
    assert differences["qat"] is None and differences["ptq"] == pytest.approx(20)
    assert "start from it: qat with seed 0." in report.others(rows)
    assert report.others(ROWS) == ""


def test_each_cell_has_its_table_and_its_part_of_the_picture(tmp_path: Path) -> None:
    rows = [*ROWS, row("qat", 0, 60, labels=None), row("qat", 0, 61, bits=None, equal="time")]
    text = report.markdown(rows, "example")
    for heading in ("## 400 labels, W4A4, equal steps", "## all labels, W4A4, equal steps"):
        assert heading in text
    assert "| qat | weak | no | 2 | 79.00 | ± 12.71 | 55.00 | +3.00 | ± 12.71 | ± 2.34 | 10 |" in text
    heights = []
    for part in (ROWS, rows):
        report.picture(part, tmp_path / "picture.png")
        with Image.open(tmp_path / "picture.png") as image:
            heights.append(image.size[1])
            assert len(image.getcolors(1 << 20) or ()) > 10
    assert heights[1] > heights[0]
