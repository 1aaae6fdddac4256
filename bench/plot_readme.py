"""Draws the README's picture from measured figures: `python -m bench.plot_readme`.

The figures are in docs/images/wrong_codes.json, copied from a table of docs/results.md; a test compares the two.
"""

from __future__ import annotations

import json
from pathlib import Path

FIGURES = Path(__file__).parents[1] / "docs" / "images" / "wrong_codes.json"


def draw(figures: Path, picture: Path) -> None:
    """Draw wrong codes as bars, two for each network.

    Args:
        figures: JSON with `title` and `rows`; a row has `model`, and counts of wrong codes `crqat`, `quantize_static`.
        picture: File to write; its suffix, such as .svg or .png, is the format. Equal figures give equal bytes.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    content = json.loads(figures.read_text())
    rows = content["rows"]
    # Text stays text, and nothing is random or depends on the time: the file changes only with its figures.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "crqat", "font.family": "sans-serif"}):
        figure = Figure(figsize=(8.5, 3.2), layout="constrained", facecolor="white")
        axes = figure.subplots()
        for name, label, color, offset in (
            ("crqat", "crqat-edge", "#1a7f37", -0.19),
            ("quantize_static", "ONNX Runtime quantize_static (U8S8)", "#8c959f", 0.19),
        ):
            counts = [row[name] for row in rows]
            places = [index + offset for index in range(len(rows))]
            bars = axes.barh(places, counts, height=0.36, color=color, label=label)
            axes.bar_label(bars, [f"{count:,}" for count in counts], padding=4, color=color, weight="bold")
        axes.set_yticks(range(len(rows)), [row["model"] for row in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.15 * max(row["quantize_static"] for row in rows))
        axes.xaxis.set_visible(False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.legend(loc="upper right", frameon=False)
        axes.set_title(content["title"], loc="left", weight="bold")
        figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None, dpi=120)


if __name__ == "__main__":
    draw(FIGURES, FIGURES.with_suffix(".svg"))
