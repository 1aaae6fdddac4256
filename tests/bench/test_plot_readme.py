"""The README's picture shows what docs/results.md says."""

from __future__ import annotations

import json
import re
from pathlib import Path

from bench.plot_readme import FIGURES, draw

ROOT = Path(__file__).parents[2]


def test_its_figures_are_those_of_the_results() -> None:
    content = json.loads(FIGURES.read_text())
    heading = content["source"].removeprefix("docs/results.md: ")
    section = (ROOT / "docs" / "results.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    assert lines[0][-2:] == ["without VNNI: ours", "peer"]
    measured = {line[0]: [int(cell.replace(",", "")) for cell in line[-2:]] for line in lines[2:]}
    assert {row["model"]: [row["crqat"], row["quantize_static"]] for row in content["rows"]} == measured


def test_the_picture_was_drawn_from_them(tmp_path: Path) -> None:
    picture = FIGURES.with_suffix(".svg").read_text()
    draw(FIGURES, tmp_path / "again.svg")
    shown = [re.findall(r"<text[^>]*>([^<]*)</text>", text) for text in (picture, (tmp_path / "again.svg").read_text())]
    assert shown[0] == shown[1]
    assert "15,929,188" in shown[0]
