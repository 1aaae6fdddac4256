"""Measurements become constants, and a measuring process that fails is named."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crqat.core.errors import ToolError, UsageError
from crqat.core.progress import quiet
from crqat.train.config import DataConfig, FloatConfig, ModelConfig, QATConfig, QuantizationConfig, TrainConfig
from crqat.train.scaling import measure as scaling
from crqat.train.scaling.model import all_reduce_terms, predict
from tests.crqat_train.scaling.test_model import CONSTANTS

CONFIG = TrainConfig(
    seed=0,
    targets=("onnxruntime",),
    data=DataConfig("digits"),
    model=ModelConfig("cifar/resnet20"),
    float_training=FloatConfig(epochs=0),
    quantization=QuantizationConfig(),
    qat=QATConfig(epochs=1, batch_size=64),
    device="cpu",
    compile="never",
)


def _alone() -> dict[str, Any]:
    """What one process would measure on a machine with the constants of `CONSTANTS`."""
    return {
        "device": "cpu",
        "batch": 64,
        "processes": [1, 4, 8],
        "gradient_bytes": 1_000_000,
        "image_bytes": 3000,
        "compiled": "no",
        "compute": [{"local_batch": size, "seconds": [0.01 + 0.001 * size] * 7} for size in (8, 16, 64)],
        "data": [[3000, 3e-6]] * 7,
    }


def _group() -> dict[str, Any]:
    """Likewise four at once."""
    points = []
    for size in (62_500, 1_000_000, 2_000_000):
        steps, sent = all_reduce_terms(4, size)
        points.append({"bytes": size, "seconds": [steps * 1e-4 + sent / 1e9] * 7})
    return {"backend": "gloo", "all_reduce": points, "step": [0.0562] * 7, "compute": [0.05] * 7}


def test_what_was_measured_becomes_the_constants_of_the_predictions() -> None:
    result = scaling.assemble(_alone(), _group(), 4, 4, 1, CONSTANTS.between)
    constants = result["constants"]
    assert constants["step_seconds"]["value"] == pytest.approx(0.01)
    assert constants["image_seconds"]["value"] == pytest.approx(0.001)
    assert constants["data_rate"]["value"] == pytest.approx(1e9)
    assert constants["local"]["latency"]["value"] == pytest.approx(1e-4)
    assert constants["local"]["bandwidth"]["value"] == pytest.approx(1e9)
    assert "not measured" in constants["between"]["source"]
    for row in result["predictions"]:
        assert row == pytest.approx(predict(CONSTANTS, row["processes"]))
    assert result["check"]["measured_to_predicted"] == pytest.approx(2, rel=1e-3)
    assert result["check"]["predicted_compute_seconds"] == pytest.approx(0.026)
    assert result["check"]["measured_compute_seconds"]["median"] == 0.05
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(("given", "threads"), [("2", 2), ("3,1", 3), ("0", 1), ("", 1), ("many", 1)])
def test_threads_are_openmps_own_reading_of_its_variable(
    given: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert scaling._machine("cpu")[1] == threads


def test_a_machine_for_one_process_checks_nothing_and_says_so() -> None:
    result = scaling.assemble(_alone(), None, 1, 1, 1, None)
    assert result["check"] == {"status": "not run: this machine holds 1 process"}
    assert result["constants"]["local"] is None
    assert [("not_predicted" in row) for row in result["predictions"]] == [False, True, True]


def test_an_all_reduce_that_costs_nothing_a_byte_is_no_measurement() -> None:
    group = _group()
    for point in group["all_reduce"]:
        point["seconds"] = [1e-3] * 7
    with pytest.raises(ToolError, match="of more bytes took no longer"):
        scaling.assemble(_alone(), group, 4, 4, 1, None)


def test_a_recipe_that_does_not_train_has_no_step() -> None:
    with pytest.raises(UsageError, match=r"qat\.epochs: 0"):
        scaling.measure(replace(CONFIG, qat=QATConfig(epochs=0)), (), None, quiet)


def _rank_program(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Put a program in the place of `crqat.train.scaling.worker`."""
    program = folder / "rank.py"
    program.write_text(text)
    real = subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        return real([sys.executable, str(program), *command[3:]], **options)

    monkeypatch.setattr(subprocess, "Popen", start)


def test_one_process_that_dies_ends_all_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import sys, time\nif sys.argv[2] == '0': time.sleep(60)\nsys.exit('no such thing')\n"
    _rank_program(tmp_path, monkeypatch, text)
    with pytest.raises(ToolError, match="process 1 of 2 ended with 1: no such thing"):
        scaling._run_processes(2, {}, 1)


def test_a_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _rank_program(tmp_path, monkeypatch, "import time\ntime.sleep(60)\n")
    monkeypatch.setattr(scaling, "TIME_LIMIT", 0.2)
    with pytest.raises(ToolError, match="takes longer than"):
        scaling._run_processes(2, {}, 1)


@pytest.mark.parametrize(("usage", "kind"), [("true", UsageError), ("false", ToolError)])
def test_what_a_process_says_is_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, usage: str, kind: type[Exception]
) -> None:
    said = f'{{"text": "data.root: gone", "usage": {usage}}}'
    text = f"import sys, pathlib\npathlib.Path(sys.argv[1], '0.error.json').write_text('{said}')\nsys.exit(1)\n"
    _rank_program(tmp_path, monkeypatch, text)
    with pytest.raises(kind, match=r"^data\.root: gone$"):
        scaling._run_processes(1, {}, 1)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 always searches the current folder first")
def test_a_file_of_the_users_takes_the_place_of_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pydantic.py").write_text("raise RuntimeError('of the user')")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # for its traceback
    with pytest.raises(ToolError, match="internal error in scale: KeyError"):  # the real process finds the job empty
        scaling._run_processes(1, {}, 1)
