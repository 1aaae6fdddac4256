"""The formula is what it says, and the fit finds the constants that timings were made from."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crqat.core.errors import ToolError, UsageError
from crqat.core.progress import quiet
from crqat.train.config import DataConfig, FloatConfig, ModelConfig, QATConfig, QuantizationConfig, TrainConfig
from crqat.train.scaling import model as scaling
from crqat.train.scaling.model import Constants, Link, all_reduce_terms, fit, fit_rounds, predict

CONSTANTS = Constants(
    batch=64,
    gradient_bytes=1_000_000,
    image_bytes=3000,
    step_seconds=0.01,
    image_seconds=0.001,
    data_rate=1e9,
    holds=4,
    local=Link(latency=1e-4, bandwidth=1e9),
    between=Link(latency=1e-3, bandwidth=1e8),
)
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


def test_one_process_exchanges_nothing() -> None:
    row = predict(CONSTANTS, 1)
    assert row["step_seconds"] == pytest.approx(0.01 + 64 * 0.001)
    assert row["all_reduce_seconds"] == 0
    assert row["efficiency"] == 1
    assert row["images_per_second"] == pytest.approx(64 / 0.074)
    assert row["limit"] == "compute"


def test_processes_of_one_machine_use_the_measured_link() -> None:
    row = predict(CONSTANTS, 4)
    # Six steps of the ring, in which each process sends one and a half times the gradients.
    assert row["all_reduce_seconds"] == pytest.approx(6e-4 + 1.5e6 / 1e9)
    assert row["compute_seconds"] == pytest.approx(0.026)
    assert row["step_seconds"] == pytest.approx(0.0281)
    assert row["efficiency"] == pytest.approx(0.074 / (4 * 0.0281))
    assert row["machines"] == 1


def test_more_machines_use_the_given_link() -> None:
    row = predict(CONSTANTS, 8)
    assert row["machines"] == 2
    assert row["all_reduce_seconds"] == pytest.approx(14e-3 + 2 * 7 / 8 * 1e6 / 1e8)
    assert row["limit"] == "all-reduce"


@pytest.mark.parametrize(
    ("constants", "processes", "reason"),
    [
        (replace(CONSTANTS, between=None), 8, "the link between machines was not given"),
        (replace(CONSTANTS, local=None), 2, "the link on one machine was not measured"),
    ],
)
def test_nothing_is_predicted_from_a_constant_that_is_not_known(
    constants: Constants, processes: int, reason: str
) -> None:
    row = predict(constants, processes)
    assert reason in row["not_predicted"]
    assert "step_seconds" not in row


def test_an_indivisible_batch_is_that_of_the_fullest_process() -> None:
    assert predict(CONSTANTS, 3)["local_batch"] == 22


def test_the_source_is_shared_by_the_processes_of_a_machine() -> None:
    slow = replace(CONSTANTS, data_rate=1e6)
    one, four, eight = (predict(slow, number) for number in (1, 4, 8))
    assert one["data_seconds"] == four["data_seconds"] == pytest.approx(64 * 3000 / 1e6)
    assert eight["data_seconds"] == pytest.approx(four["data_seconds"] / 2)
    assert four["limit"] == "data"
    assert four["step_seconds"] == four["data_seconds"]
    assert four["efficiency"] == pytest.approx(0.25)


def test_the_fit_recovers_the_constants_of_compute() -> None:
    terms = [(1.0, size) for size in (8, 23, 64)]
    assert fit(terms, [0.01 + 0.002 * size for _, size in terms]) == pytest.approx((0.01, 0.002))


def test_the_fit_recovers_latency_and_bandwidth() -> None:
    terms = [all_reduce_terms(4, size) for size in (1e4, 1e6, 4e6)]
    seconds = [2e-5 * steps + sent / 3e9 for steps, sent in terms]
    assert fit(terms, seconds) == pytest.approx((2e-5, 1 / 3e9))


def test_no_constant_is_negative() -> None:
    # The line through these points begins below zero.
    constant, slope = fit([(1.0, 1.0), (1.0, 2.0)], [1.0, 3.0])
    assert constant == 0
    assert slope == pytest.approx(15 / 13)  # where (1 - s)^2 + (1 - 2 s / 3)^2, the relative errors, is smallest


def test_rounds_give_the_spread_of_each_constant() -> None:
    chance, terms = np.random.default_rng(0), [(1.0, size) for size in (8, 64)]
    rounds = [[(0.01 + 0.002 * size) * chance.uniform(0.99, 1.01) for _ in range(101)] for _, size in terms]
    constant, slope = fit_rounds(terms, rounds)
    assert constant["value"] == pytest.approx(0.01, rel=0.05)
    assert slope["value"] == pytest.approx(0.002, rel=0.01)
    assert slope["n"] == 101
    low, high = slope["quartiles"]
    assert 0.00198 < low < slope["value"] < high < 0.00202


def test_processes_asked_for_by_default() -> None:
    assert scaling.default_processes(1, 64, between=False) == [1]
    assert scaling.default_processes(8, 256, between=False) == [1, 2, 4, 8]
    assert scaling.default_processes(6, 256, between=False) == [1, 2, 4]
    assert scaling.default_processes(8, 256, between=True) == [1, 2, 4, 8, 16, 32, 64]
    assert scaling.default_processes(8, 16, between=True) == [1, 2, 4]  # four images a process, not fewer


def test_compute_is_measured_from_the_largest_to_the_smallest_batch_asked_for() -> None:
    assert scaling.local_batches(64, [1, 2, 16]) == [4, 16, 64]
    assert scaling.local_batches(64, [1]) == [32, 45, 64]
    assert scaling.local_batches(2, [2]) == [1, 2]
    assert scaling.local_batches(1, [1]) == [1, 2]


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
