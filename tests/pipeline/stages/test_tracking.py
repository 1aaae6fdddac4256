"""Event files as TensorBoard itself reads them, of real trainings."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from torch import Tensor

from crqat.core.errors import Interrupted, ToolError
from crqat.core.progress import quiet
from crqat.core.results.benchmark import Results
from crqat.core.typed_json import from_json
from crqat.pipeline import cli
from crqat.pipeline.recipe import recipe
from crqat.pipeline.stages import run as stages
from crqat.pipeline.stages import tracking
from crqat.train.training import loop
from crqat.train.training.optimizer import Fit
from tests.needs import needs
from tests.pipeline.conftest import measured

RECIPE = """
name: tracked
compile: never
tracker: tensorboard
data: {source: digits, crop_padding: 0, flip: false}
model: {name: "tracked_network:network"}
float: {epochs: 2, batch_size: 300, lr: 0.1}
quantization: {calibration_images: 20}
qat: {epochs: 3, batch_size: 300, lr: 0.01}
"""
NETWORK = """
from torch import nn


def network(classes: int, channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(72, classes))
"""
RUN = Path("runs/tracked")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> recipe.Recipe:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tracked_network", raising=False)
    Path("tracked_network.py").write_text(NETWORK)
    Path("recipe.yaml").write_text(RECIPE)
    return recipe.load(Path("recipe.yaml"))


def scalars(series: str, run: Path = RUN) -> dict[str, list[tuple[int, float]]]:
    """Tag to (step, value), of every event in the files: not only of those that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted((run / tracking.FOLDER / series).glob("events.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                number = float(tensor_util.make_ndarray(value.tensor))
                found.setdefault(value.tag, []).append((event.step, number))
    return found


def history() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RUN / "train" / "history.jsonl").read_text().splitlines()]


def check_epochs() -> None:
    """Each value of the history is there, once."""
    for phase in ("float", "qat"):
        found, rows = scalars(phase), [row for row in history() if row["phase"] == phase]
        expected = {(name, row["epoch"]): row[name] for row in rows for name in row if name not in ("phase", "epoch")}
        assert Counter((tag, step) for tag, values in found.items() for step, _ in values) == Counter(expected.keys())
        for tag, values in found.items():
            assert [value for _, value in values] == [
                pytest.approx(expected[tag, step], rel=1e-6) for step, _ in values
            ]


@needs("tensorboard")
def test_epochs_and_final_results_of_float_training_and_qat(config: recipe.Recipe) -> None:
    stages.train(config, Path("runs"), False, quiet)
    check_epochs()
    assert {"loss", "validation", "validation_teacher", "lr", "lambda", "seconds"} == scalars("qat").keys()
    assert {"loss", "validation", "lr", "seconds"} == scalars("float").keys()
    lr = [value for _, value in scalars("float")["lr"]]
    assert 0.1 > lr[0] > lr[1] > 0
    final = scalars("train")
    ((step, student),) = final["final validation/student"]
    assert step == 0 and student == pytest.approx(history()[-1]["validation"], abs=0.02)
    assert {"final validation/float", "final validation/teacher", "final validation/calibrated"} < final.keys()
    stages.train(config, Path("runs"), False, quiet)  # up to date
    check_epochs()
    stages.train(config, Path("runs"), True, quiet)
    check_epochs()
    assert scalars("train").keys() == final.keys()


@needs("tensorboard")
@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_training_writes_no_epoch_twice(
    config: recipe.Recipe, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Cut off behind an epoch that is saved and tracked, of the float training and of QAT."""
    write = tracking.TensorBoard.epochs
    calls = 0

    def cut(self: tracking.TensorBoard, rows: Any) -> None:
        nonlocal calls
        write(self, rows)
        calls += 1
        if calls > stop:
            msg = "cut off"
            raise Interrupted(msg, 15)

    monkeypatch.setattr(tracking.TensorBoard, "epochs", cut)
    with pytest.raises(Interrupted):
        stages.train(config, Path("runs"), False, quiet)
    assert scalars("float")["loss"] and not (RUN / "train").exists()
    monkeypatch.setattr(tracking.TensorBoard, "epochs", write)
    steps: list[str] = []
    update = loop.update

    def counted(fit: Fit, loss: Tensor) -> None:
        steps.append(fit.name)
        update(fit, loss)

    monkeypatch.setattr(loop, "update", counted)
    stages.train(config, Path("runs"), False, quiet)
    assert 0 < len(steps) < 5 * 3  # it went on, and did not begin anew
    check_epochs()


@needs("tensorboard")
def test_a_tracker_makes_no_stage_stale_and_a_finished_training_is_written_too(config: recipe.Recipe) -> None:
    Path("recipe.yaml").write_text(RECIPE.replace("tracker: tensorboard", "tracker: null"))
    plain = recipe.load(Path("recipe.yaml"))
    made = stages.train(plain, Path("runs"), False, quiet).resolve()
    assert not (RUN / tracking.FOLDER).exists()
    assert stages.train(config, Path("runs"), False, quiet).resolve() == made
    check_epochs()
    assert "final validation/float" in scalars("train")


@needs("tensorboard")
def test_results_of_a_benchmark_take_the_place_of_earlier_ones(tmp_path: Path) -> None:
    tracker = tracking.TensorBoard(tmp_path)
    for drop in (0.4, 0.2):
        tracker.measured("benchmark", from_json(Results, measured(drop, (0.1, 0.5))))
    found = scalars("benchmark", tmp_path)
    ((_, drop),), ((_, top1),) = found["accuracy drop, points/onnxruntime.onnx"], found["top-1/float.onnx"]
    assert drop == pytest.approx(0.2) and top1 == pytest.approx(0.95)
    assert "latency p50, ms/tensorrt.onnx" not in found  # was not run


def test_a_missing_package_is_one_line_before_anything_is_trained(
    config: recipe.Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ToolError, match=r"^tracker: tensorboard is not installed; pip install crqat-edge\[tensorboard\]"
    ):
        CliRunner().invoke(cli.crqat, ["run", "recipe.yaml"], standalone_mode=False, catch_exceptions=False)
    assert [path.name for path in RUN.iterdir()] == [".lock"]
    assert ToolError.exit_code == 3
