"""The check before training: it changes nothing, comes first, and refuses what would fail after hours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune, weight_norm

from crqat.core.errors import UsageError
from crqat.core.progress import quiet
from crqat.pipeline.commands.check import check
from crqat.pipeline.recipe import recipe
from crqat.pipeline.stages import precheck
from crqat.train.training import loop
from crqat.train.training import stage as trainer
from crqat.train.training.optimizer import Fit

RECIPE = """
name: checked
compile: never
data: {source: digits, crop_padding: 0, flip: false}
model: {name: "tests.pipeline.stages.test_precheck:MODEL"}
float: {epochs: 1, batch_size: 300, lr: 0.05}
quantization: {calibration_images: 64}
qat: {epochs: 1, batch_size: 300, lr: 0.005}
"""


class Dropping(nn.Module):
    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(functional.relu(self.bn(self.conv(x))).mean((2, 3))))  # type: ignore[no-any-return]


def thirteen(classes: int, channels: int) -> nn.Module:
    return Dropping(13, channels)


def pruned(classes: int, channels: int) -> nn.Module:
    network = Dropping(classes, channels)
    prune.l1_unstructured(network.conv, "weight", 0.5)  # type: ignore[no-untyped-call]
    return network


def weight_normed(classes: int, channels: int) -> nn.Module:
    network = Dropping(classes, channels)
    weight_norm(network.fc)
    return network


def needs_width(width: int) -> nn.Module:
    return Dropping(width, width)


@pytest.fixture
def of(tmp_path: Path) -> Callable[..., Path]:
    def write(model: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE.replace("MODEL", model))
        return path

    return write


def test_training_behind_it_has_the_same_bits(of: Callable[..., Path], tmp_path: Path) -> None:
    config = recipe.load(of("Dropping"))
    said: list[str] = []

    def tell(task: str, done: int, total: int, note: str = "") -> None:
        if task == "check" and done == total:
            said.append(note)

    for name, hook in (("with", partial(precheck.before_training, config, tell)), ("without", None)):
        (tmp_path / name).mkdir()
        trainer.train(recipe.train_config(config), tmp_path / name, quiet, precheck=hook)
    assert len(said) == 1
    assert "quantizers, onnxruntime.onnx, tensorrt.onnx; codes equal on 2 images" in said[0]
    for file in ("float", "student", "teacher"):
        one, other = ((tmp_path / name / f"{file}.safetensors").read_bytes() for name in ("with", "without"))
        assert one == other, file


def test_a_recipe_is_tried_and_nothing_is_trained(of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = of("Dropping")
    keys: list[str] = []
    step = loop.update

    def counted(self: Fit, loss: Tensor) -> None:
        keys.append(self.name)
        step(self, loss)

    monkeypatch.setattr(loop, "update", counted)
    lines = check(path)
    assert keys == ["float", "qat"]  # one of each, on copies
    assert lines[1:] == [
        f"{path}: untrained: 5 quantizers, onnxruntime.onnx, tensorrt.onnx",
        f"{path}: untrained: codes equal on 2 images",
    ]
    assert len(check(path, syntax=True)) == 1
    with pytest.raises(UsageError, match="the network gives 13 logits, the data has 10 classes"):
        check(of("thirteen"))


@pytest.mark.parametrize("name", ["pruned", "weight_normed"])
def test_weights_that_hooks_compute_are_folded_from_check_to_training(
    of: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    """What such a hook has computed is a tensor that `copy.deepcopy` alone refuses."""
    config = recipe.load(of(name))
    hook = partial(precheck.before_training, config, quiet)
    trained = trainer.train(recipe.train_config(config), tmp_path, quiet, precheck=hook)
    assert any("its weight is computed" in note for note in trained.notes)
    assert (tmp_path / "student.safetensors").stat().st_size > 1000


def test_what_cannot_be_called_is_told_before_data_is_read(
    of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crqat.train.data.sources.of_recipe", lambda *_: pytest.fail("data was read"))
    with pytest.raises(UsageError, match="must be callable as"):
        check(of("needs_width"))
    with pytest.raises(UsageError, match="did you mean"):
        check(of("Dropping"), ("model.name=cifar/resnet21",))


@pytest.mark.parametrize("stage", ["layout", "export", "verification"])
def test_an_error_that_no_stage_expects_is_a_refusal(
    stage: str, of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        msg = "odd shape"
        raise ValueError(msg)

    place = {"layout": "quantize_model", "export": "_file", "verification": "verify"}[stage]
    monkeypatch.setattr(precheck, place, broken)
    with pytest.raises(UsageError, match=r"^model.name: .*ValueError: odd shape.*Nothing was trained"):
        check(of("Dropping"))


def test_where_nothing_trains_the_forward_is_enough(of: Callable[..., Path], tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(Dropping(10, 1).state_dict(), weights)
    config = recipe.load(of("Dropping"), (f"model.weights={weights}", "qat.epochs=0"))
    notes: list[str] = []
    precheck_only = partial(precheck.before_training, config, lambda _, done, total, note="": notes.append(note))
    trainer.check(recipe.train_config(config), quiet, precheck_only)
    assert notes[0] == "forward"
    assert notes[1].startswith("2 images through the float network")
