"""What a function imports, found without importing it."""

from __future__ import annotations

from pathlib import Path

import pytest

from crqat.pipeline.stages.imports import imports_of, module_file, versions


def test_a_function_in_a_folder_without_init_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "outer" / "inner" / "own.py"
    module.parent.mkdir(parents=True)
    module.touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert module_file("outer.inner.own") == module
    assert module_file("outer.inner.none") is None


def test_imports_are_followed_through_the_users_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "mine/__init__.py": "",
        "mine/nets.py": "import json, numpy.linalg\nfrom .parts.blocks import block\nfrom crqat.train import config\n",
        "mine/parts/__init__.py": "from .. import extra\n",
        "mine/parts/blocks.py": "def block():\n    import importlib\n    importlib.import_module('odd-name')\n",
        "mine/extra.py": "import mine.nets\nfrom PIL.Image import open as read\nimport not_there\n",
        "mine/unused.py": "import torch\n",
        "odd-name.py": "this is no Python\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    found = imports_of("mine.nets")
    assert found.files == {
        "mine": tmp_path / "mine/__init__.py",
        "mine.extra": tmp_path / "mine/extra.py",
        "mine.nets": tmp_path / "mine/nets.py",
        "mine.parts": tmp_path / "mine/parts/__init__.py",
        "mine.parts.blocks": tmp_path / "mine/parts/blocks.py",
        "odd-name": tmp_path / "odd-name.py",
    }
    assert found.packages == {"numpy", "PIL", "crqat", "not_there"}
    assert {"numpy", "pillow"} <= {name.lower() for name in versions(found.packages)}


@pytest.mark.parametrize("text", ["from . import x", "from .... import x", "from ..x import y", "__import__('.')"])
def test_relative_imports_that_lead_nowhere_end_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "alone_here.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert list(imports_of("alone_here").files) == ["alone_here"]
