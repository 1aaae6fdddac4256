"""The notebooks of docs/ run from top to bottom, and what they store is what their cells print."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def loaded(name: str) -> ModuleType:
    """A file of docs/site as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "site" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def kinds(notebook: dict[str, Any]) -> list[list[str]]:
    """The kind of each output of each code cell."""
    return [[output["output_type"] for output in cell.get("outputs", [])] for cell in notebook["cells"]]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_its_files_are_verified(path: Path) -> None:
    notebook = json.loads(path.read_text())
    stored = kinds(notebook)
    namespace = loaded("run_notebooks").run(notebook, path.name)
    assert kinds(notebook) == stored, "run `make notebooks`"
    assert all(verified.passed for verified in namespace["files"].verification.values())
    assert namespace["results"].files["onnxruntime.onnx"].accuracy.top1 > 0.85
    assert namespace["verdict"].lines


def test_what_a_cell_gives(capsys: pytest.CaptureFixture[str]) -> None:
    def cell(source: str) -> dict[str, Any]:
        return {"cell_type": "code", "source": source.splitlines(keepends=True), "outputs": [], "execution_count": None}

    sources = ["x = 2\nprint(x)\nx + 1", "x * 2;", "import matplotlib.pyplot as plt\nplt.plot([1, x])\nNone"]
    notebook = {"cells": [{"cell_type": "markdown", "source": ["# A title\n"]}, *map(cell, sources)]}
    assert loaded("run_notebooks").run(notebook, "some.ipynb")["x"] == 2
    first, second, third = (made["outputs"] for made in notebook["cells"][1:])
    assert [output.get("text", output.get("data")) for output in first] == [["2\n"], {"text/plain": ["3"]}]
    assert second == [] and [list(output["data"]) for output in third] == [["image/png"]]
    assert capsys.readouterr().out == ""
    page = loaded("pages").notebook_page(notebook)
    assert page.startswith("# A title\n")
    assert "```python\nx * 2;\n```" in page and "](data:image/png;base64," in page
