from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from crqat.runtime_eval.__main__ import main
from tests.runtime_eval.conftest import Digits, WriteExport

SOURCES = Path(__file__).parents[2] / "src"
HEAVY = ("torch", "onnx", "nncf", "pydantic", "click")
# What a board may have and loads only where it is used.
LAZY = (*HEAVY, "tensorrt", "pycuda", "cuda")
MODULES = sorted(
    ".".join(path.relative_to(SOURCES).with_suffix("").parts)
    for package in ("core", "runtime_eval")
    for path in (SOURCES / "crqat" / package).rglob("*.py")
    if path.stem not in ("__init__", "__main__")
)


def test_no_module_pulls_in_what_a_board_does_not_have() -> None:
    code = f"import sys\nfor name in {MODULES}: __import__(name)\nprint(*(m for m in {LAZY} if m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=SOURCES)
    assert "crqat.runtime_eval.runners.onnxruntime" in MODULES
    assert result.stdout.strip() == ""


@pytest.mark.slow
def test_it_runs_on_a_board(board: Path, write_export: WriteExport, digits: Digits, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(SOURCES)}
    for name in HEAVY:
        command = [str(board), "-c", f"import {name}"]
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert "ModuleNotFoundError" in result.stderr
    out = tmp_path / "results.json"
    result = subprocess.run(
        [board, "-m", "crqat.runtime_eval", write_export(), "--out", out],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    results = json.loads(out.read_text())
    assert results["device"]["python"].startswith("3.10.")
    right = int((digits.logits().argmax(axis=1) == digits.labels).sum())
    assert results["models"]["float.onnx"]["accuracy"]["top1"] == right / 797
    assert f"{100 * right / 797:.2f}" in result.stdout


def test_without_onnxruntime_nothing_is_run_and_that_is_said(write_export: WriteExport, tmp_path: Path) -> None:
    """A board may have TensorRT alone."""
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('not here')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(SOURCES)])}
    command = [sys.executable, "-m", "crqat.runtime_eval", str(write_export()), "--out", str(tmp_path / "results.json")]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, "Traceback" in result.stderr) == (0, False)
    models = json.loads((tmp_path / "results.json").read_text())["models"]
    assert {model["status"] for model in models.values()} == {"not run: onnxruntime is not installed"}
    assert "onnxruntime not installed" in result.stdout


def test_an_error_is_one_line_and_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"runtime_eval: {tmp_path}")
    assert error.count("\n") == 1


def test_results_that_cannot_be_written_and_models_that_failed(
    tmp_path: Path, write_export: WriteExport, digits: Digits, capsys: pytest.CaptureFixture[str]
) -> None:
    # No model loads, so nothing is timed: the command line has no shorter measurement to ask for.
    broken = dict.fromkeys(("float.onnx", "onnxruntime.onnx", "tensorrt.onnx"), b"not a model")
    export = write_export({**broken, "images.npy": digits.images[:3], "labels.npy": np.zeros(3, np.int64)})
    assert main([str(export), "--out", str(tmp_path / "nowhere" / "results.json")]) == 3
    captured = capsys.readouterr()
    assert captured.out.count("failed: ") == 3
    assert captured.err.startswith("runtime_eval: cannot write ")
    assert captured.err.count("\n") == 1


def test_the_number_of_threads_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["export", "--threads", "0"])
    assert stopped.value.code == 2
    assert "--threads must be at least 1" in capsys.readouterr().err
