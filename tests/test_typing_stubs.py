"""TensorRT's stubs: they are repaired, and mypy really checks code against them."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from tests import typing_stubs
from tests.needs import missing

ROOT = Path(__file__).parent.parent
SOURCE = """
from __future__ import annotations
import tensorrt as trt
def good(config: trt.IBuilderConfig) -> trt.ITimingCache:
    return config.create_timing_cache(b"")
def bad(config: trt.IBuilderConfig, engine: trt.ICudaEngine) -> None:
    config.create_timing_cash(b"")
    engine.get_tensor_name("input")
"""


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    if not typing_stubs.write(tmp_path / "stubs"):
        missing("tensorrt-stubs")
    return tmp_path / "stubs"


def test_the_repaired_stubs_are_python(stubs: Path) -> None:
    copies = sorted(stubs.rglob("*.pyi"))
    assert {path.parent.name for path in copies} == {"tensorrt", "tensorrt_bindings"}
    for path in copies:
        ast.parse(path.read_text())


def test_only_broken_signatures_are_changed() -> None:
    text = "def f(self, in: list[int], out: list[int]) -> int:\n    '''in: a thing'''\n"
    assert typing_stubs.repaired(text) == text.replace("in: list", "in_: list")
    text = "def f(a: int = None, channel_axis: int) -> int: ...\n"
    assert typing_stubs.repaired(text) == text.replace("axis: int)", "axis: int = ...)")
    assert typing_stubs.repaired("def f(channel_axis: int) -> int: ...") == "def f(channel_axis: int) -> int: ..."


def test_mypy_checks_against_them(stubs: Path, tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(SOURCE)
    configuration = tmp_path / "pyproject.toml"
    configuration.write_text((ROOT / "pyproject.toml").read_text().replace("src:.stubs", str(stubs)))
    command = [sys.executable, "-m", "mypy", "--config-file", str(configuration), "--follow-imports", "silent"]
    result = subprocess.run([*command, "snippet.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    lines = [line for line in result.stdout.splitlines() if ": error:" in line]
    assert [line.split(":")[1] for line in lines] == ["7", "8"], result.stdout + result.stderr
    assert '"IBuilderConfig" has no attribute "create_timing_cash"' in lines[0]


def test_without_the_package_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old.pyi").touch()

    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(typing_stubs, "files", missing)
    assert typing_stubs.write(tmp_path) == 0
    assert not (tmp_path / "old.pyi").exists()
