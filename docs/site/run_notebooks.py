"""Runs notebooks and stores what they print: `python docs/site/run_notebooks.py docs/notebooks/*.ipynb`.

A small stand-in for Jupyter: each cell's printed text, the value of its last line, and its matplotlib figures.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def run(notebook: dict[str, Any], name: str) -> dict[str, Any]:
    """Run all code cells in one namespace and put their outputs in place.

    Args:
        notebook: The .ipynb file's content; changed in place.
        name: Of the file, for tracebacks.

    Returns:
        The namespace that the cells have made.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            cell["execution_count"], cell["outputs"] = count, _outputs("".join(cell["source"]), namespace, name, count)
    return namespace


def _outputs(source: str, namespace: dict[str, Any], name: str, count: int) -> list[dict[str, Any]]:
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value, where = io.StringIO(), None, f"{name}, cell {count}"
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, where, "exec"), namespace)  # noqa: S102 - the notebook's own code
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), where, "eval"), namespace)  # noqa: S307 - likewise
    made: list[dict[str, Any]] = []
    if printed.getvalue():
        made.append({"name": "stdout", "output_type": "stream", "text": printed.getvalue().splitlines(keepends=True)})
    made += [{"data": {"image/png": picture}, "metadata": {}, "output_type": "display_data"} for picture in _figures()]
    if value is not None and not source.rstrip().endswith(";"):
        text = repr(value).splitlines(keepends=True)
        made.append(
            {"data": {"text/plain": text}, "execution_count": count, "metadata": {}, "output_type": "execute_result"}
        )
    return made


def _figures() -> list[str]:
    """The figures that pyplot has open, as PNG in base64; they are closed."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None:
        return []
    pictures = []
    for number in pyplot.get_fignums():
        data = io.BytesIO()
        pyplot.figure(number).savefig(data, format="png", dpi=80, bbox_inches="tight")
        pictures.append(base64.b64encode(data.getvalue()).decode())
    pyplot.close("all")
    return pictures


def main(paths: list[str]) -> None:
    """Run each notebook and write it with its outputs."""
    import matplotlib as mpl

    mpl.use("agg")
    for path in map(Path, paths):
        notebook = json.loads(path.read_text())
        run(notebook, path.name)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
