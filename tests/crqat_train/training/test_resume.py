"""A training that is cut off between any two steps and goes on in another process ends with the same bits."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from crqat.core.errors import Interrupted, ToolError, UsageError
from crqat.core.progress import quiet
from crqat.train.config import (
    ConsistencyConfig,
    DataConfig,
    FloatConfig,
    ModelConfig,
    QATConfig,
    QuantizationConfig,
    TrainConfig,
)
from crqat.train.data import imagefolder, streaming
from crqat.train.data.batches import Batches, Feed, Generators
from crqat.train.data.builtin import CIFAR10_PREPROCESSING
from crqat.train.training import loop
from crqat.train.training import stage as trainer
from crqat.train.training.evaluate import accuracy
from crqat.train.training.optimizer import Fit
from crqat.train.training.stage import train
from tests.needs import needs

STEPS = 3  # of an epoch
EPOCHS = 2  # of each phase


class Net(nn.Module):
    """Draws from three generators that are not the run's own."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn(self.conv(x)))
        x = functional.dropout(x, 0.1, self.training)
        return self.fc(torch.flatten(functional.max_pool2d(x, 2), 1))  # type: ignore[no-any-return]


def network(classes: int, channels: int) -> nn.Module:
    return Net(classes, channels)


def recipe(**changes: Any) -> TrainConfig:
    base = TrainConfig(
        seed=3,
        targets=("onnxruntime", "tensorrt"),
        data=DataConfig("digits", crop_padding=1, flip=True, strong="randaugment", unlabeled="digits"),
        model=ModelConfig(f"{__name__}:network"),
        float_training=FloatConfig(EPOCHS, 300, 0.1, strong="randaugment", consistency=ConsistencyConfig()),
        quantization=QuantizationConfig(first_layer=4, last_layer=4, calibration_images=64),
        qat=QATConfig(
            EPOCHS,
            300,
            0.01,
            progressive_bits=(8, 6, 4),
            damping=0.1,
            freeze_bn_at=0.8,
            freeze_ranges_at=0.7,
            scale_lr=0.5,
        ),
        consistency=ConsistencyConfig(),
        compile="never",
    )
    return replace(base, **changes)


def fingerprint(out: Path) -> dict[str, str]:
    """SHA-256 of every file; of the history without the times."""
    digests = {}
    for path in sorted(out.iterdir()):
        content = path.read_bytes()
        if path.name == "history.jsonl":
            rows = [json.loads(line) for line in content.splitlines()]
            content = json.dumps([{k: v for k, v in row.items() if k != "seconds"} for row in rows]).encode()
        digests[path.name] = hashlib.sha256(content).hexdigest()
    return digests


class Cut(Exception):
    """Stands for a process that ends here."""


def cut_after(patch: pytest.MonkeyPatch, steps: int, ends: Callable[[], None]) -> None:
    """Call `ends` after so many steps of this process."""
    original = loop.update
    done: list[int] = []

    def step(self: Fit, loss: Tensor) -> None:
        if len(done) == steps:
            ends()
        done.append(1)
        original(self, loss)

    patch.setattr(loop, "update", step)


def raise_cut() -> None:
    raise Cut


def go_on(config: TrainConfig, out: Path, states: Path, save_every: float = 300.0) -> list[str]:
    """Train to the end in a fresh folder, as a new process would; give what was told of where it went on."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    torch.manual_seed(99)  # another process's generators are anywhere
    random.seed(98)
    np.random.seed(97)  # noqa: NPY002
    told: list[str] = []
    train(config, out, lambda task, done, total, note="": told.append(f"{task} {note}"), states, save_every)
    return [line for line in told if line.startswith(("continued", "state "))]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed")
    train(recipe(), out, quiet)
    return fingerprint(out)


def test_states_change_nothing(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    assert go_on(recipe(), tmp_path / "out", tmp_path / "states", save_every=0.0) == []
    assert fingerprint(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("steps", [1, 3, 5, 6, 8, 9])
def test_cut_off_between_two_steps_it_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str], steps: int
) -> None:
    """Augmentation, unlabeled images, strong views, dropout, optimizer, EMA and both schedules included."""
    states = tmp_path / "states"
    (tmp_path / "first").mkdir()
    with monkeypatch.context() as patch:
        cut_after(patch, steps, raise_cut)
        with pytest.raises(Cut):
            train(recipe(), tmp_path / "first", quiet, states, save_every=0.0)
    (told,) = go_on(recipe(), tmp_path / "out", states)
    phase, place = ("float", steps) if steps < EPOCHS * STEPS else ("qat", steps - EPOCHS * STEPS)
    inside = f", step {place % STEPS} in it" if place % STEPS else ""
    assert told == f"continued from {phase} epoch {-(-place // STEPS)} of {EPOCHS}{inside}"
    assert fingerprint(tmp_path / "out") == undisturbed


def test_cut_off_in_the_validation_behind_an_epoch_it_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str]
) -> None:
    """The network's widths there are not those that it ends with."""
    states, calls = tmp_path / "states", iter(range(100))
    (tmp_path / "first").mkdir()

    def validate(*arguments: Any) -> float:
        # After two of each float epoch, the float and the calibrated network's: QAT's first.
        if next(calls) == 2 * EPOCHS + 2:
            raise Cut
        return accuracy(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "accuracy", validate)
        with pytest.raises(Cut):
            train(recipe(), tmp_path / "first", quiet, states, save_every=0.0)
    (told,) = go_on(recipe(), tmp_path / "out", states)
    assert told == f"continued from qat epoch 1 of {EPOCHS}, step {STEPS} in it"
    assert fingerprint(tmp_path / "out") == undisturbed


def test_without_a_state_in_an_epoch_it_goes_on_from_the_epochs_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str]
) -> None:
    (tmp_path / "first").mkdir()
    with monkeypatch.context() as patch:
        cut_after(patch, STEPS + 2, raise_cut)
        with pytest.raises(Cut):
            train(recipe(), tmp_path / "first", quiet, tmp_path / "states")
    assert go_on(recipe(), tmp_path / "out", tmp_path / "states") == [f"continued from float epoch 1 of {EPOCHS}"]
    assert fingerprint(tmp_path / "out") == undisturbed


@pytest.mark.slow
def test_the_last_state_damaged_it_goes_on_from_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str]
) -> None:
    states = tmp_path / "states"
    (tmp_path / "first").mkdir()
    with monkeypatch.context() as patch:
        cut_after(patch, 10, raise_cut)
        with pytest.raises(Cut):
            train(recipe(), tmp_path / "first", quiet, states, save_every=0.0)
    newest = max(int(path.stem) for path in states.glob("*.json"))
    path = states / f"{newest}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    warning, told = go_on(recipe(), tmp_path / "out", states)
    assert warning.startswith(f"state {newest} warning: cannot be read")
    assert told == f"continued from qat epoch 1 of {EPOCHS}"
    assert fingerprint(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("steps", [2, 8])
def test_a_signal_saves_and_ends_with_a_line_that_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, str], number: signal.Signals, steps: int
) -> None:
    (tmp_path / "first").mkdir()
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        cut_after(patch, steps, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Interrupted, match=r"saved at \w+ epoch 1 of 2.*: run the same command to resume") as caught:
            train(recipe(), tmp_path / "first", quiet, tmp_path / "states")
    assert caught.value.exit_code == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert signal.getsignal(number) == before
    assert go_on(recipe(), tmp_path / "out", tmp_path / "states")
    assert fingerprint(tmp_path / "out") == undisturbed


def test_asked_twice_it_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    cut_after(monkeypatch, 1, twice)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(), tmp_path, quiet, tmp_path / "states")


@pytest.mark.slow
@needs("compiler")
def test_compiled_it_ends_with_the_same_bits_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("whole", "first"):
        (tmp_path / name).mkdir()
    torch.manual_seed(0)
    torch.save(network(10, 1).state_dict(), tmp_path / "net.pth")  # one training less to compile
    model = ModelConfig(f"{__name__}:network", str(tmp_path / "net.pth"))
    plain = QATConfig(EPOCHS, 300, 0.01)  # one width: the network is compiled once
    config = recipe(compile="auto", model=model, qat=plain, consistency=ConsistencyConfig("none"))
    train(config, tmp_path / "whole", quiet)
    with monkeypatch.context() as patch:
        cut_after(patch, 4, raise_cut)
        with pytest.raises(Cut):
            train(config, tmp_path / "first", quiet, tmp_path / "states", save_every=0.0)
    torch.compiler.reset()
    assert len(go_on(config, tmp_path / "out", tmp_path / "states")) == 1
    assert fingerprint(tmp_path / "out") == fingerprint(tmp_path / "whole")


def test_another_network_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_after(monkeypatch, 2, raise_cut)
    with pytest.raises(Cut):
        train(recipe(), tmp_path, quiet, tmp_path / "states", save_every=0.0)
    other = recipe(model=ModelConfig("cifar/resnet20"))
    with pytest.raises(UsageError, match=r"does not fit the recipe's network .*--restart` discards it$"):
        train(other, tmp_path, quiet, tmp_path / "states")


def test_another_kind_of_device_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_after(monkeypatch, 2, raise_cut)
    states = tmp_path / "states"
    with pytest.raises(Cut):
        train(recipe(), tmp_path, quiet, states, save_every=0.0)
    monkeypatch.setattr("crqat.train.training.stage.choose_device", lambda _: torch.device("meta"))
    with pytest.raises(UsageError, match=r"a training on cpu cannot resume on meta; --restart discards it$"):
        train(recipe(), tmp_path, quiet, states)


@pytest.mark.slow
def test_a_folder_of_images_that_vanishes_mid_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One error that names a file; the folder back in its place, the training goes on and ends with the same bits."""
    drawn = np.random.default_rng(0)
    for part, count in (("train", 50), ("test", 2)):
        for name in ("cat", "dog"):
            place = tmp_path / "images" / part / name
            place.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(drawn.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(place / f"{index}.png")
    monkeypatch.setattr(streaming, "IN_MEMORY_BYTES", 0)  # so few images would be read once
    images = DataConfig("imagefolder", str(tmp_path / "images"), size=8, crop=8, crop_padding=1)
    config = recipe(data=images, float_training=FloatConfig(2, 6, 0.05), qat=QATConfig(1, 30, 0.01))
    for name in ("whole", "first"):
        (tmp_path / name).mkdir()
    train(config, tmp_path / "whole", quiet)
    with monkeypatch.context() as patch:
        cut_after(patch, 1, lambda: (tmp_path / "images").rename(tmp_path / "gone"))  # type: ignore[arg-type]
        with pytest.raises(
            ToolError,
            match=rf"^{tmp_path}/images/train/.*\.png: cannot be read( any more)?: No such file or directory; leave",
        ):
            train(config, tmp_path / "first", quiet, tmp_path / "states", save_every=0.0)
    (tmp_path / "gone").rename(tmp_path / "images")
    (told,) = go_on(config, tmp_path / "out", tmp_path / "states")
    assert told.startswith("continued from float epoch 1 of 2, step ")
    assert fingerprint(tmp_path / "out") == fingerprint(tmp_path / "whole")


def test_what_is_behind_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of batches that a state has behind it are not opened."""
    asked: list[Tensor] = []

    def spy(images: imagefolder.FolderImages, chosen: Sequence[Tensor]) -> Iterator[Tensor]:
        asked.extend(chosen)
        return iter([torch.zeros(5, 3, 8, 8, dtype=torch.uint8)] * len(chosen))

    monkeypatch.setattr("crqat.train.data.batches.stream_batches", spy)
    images = imagefolder.FolderImages((imagefolder.ImageFile(tmp_path / "none.png", 0, 0, 0),) * 20, 8, 8, False)
    labels, cpu = torch.zeros(20, dtype=torch.int64), torch.device("cpu")
    batches = Batches(images, labels, CIFAR10_PREPROCESSING, 5, 0, False, cpu)
    feed = Feed(batches, Generators.of(0, cpu))
    feed.order, feed.done = torch.randperm(20), 3
    order = feed.order
    assert len(list(feed.epoch())) == 1
    assert len(asked) == 1 and torch.equal(asked[0], order[15:])
    assert feed.order is None and feed.done == 0
