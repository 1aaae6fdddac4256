"""A step is the recipe's own, and what it exchanges and reads is counted exactly."""

from __future__ import annotations

import math
import os
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from crqat.core.errors import UsageError
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
from crqat.train.scaling.worker import Work, endless, gradient_bytes, measure_alone, measure_data, message_sizes
from crqat.train.training import loop
from crqat.train.training.optimizer import Fit

CONFIG = TrainConfig(
    seed=0,
    targets=("onnxruntime",),
    data=DataConfig("digits", crop_padding=1, flip=False),
    model=ModelConfig("cifar/resnet20"),
    float_training=FloatConfig(epochs=0),
    quantization=QuantizationConfig(),
    qat=QATConfig(epochs=1, batch_size=64, lr=0.5),
    device="cpu",
    compile="never",
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def work() -> Work:
    torch.manual_seed(0)
    return Work(CONFIG, CPU, 0)


def test_frozen_parameters_have_no_gradients_to_share() -> None:
    model = torch.nn.Linear(3, 2)
    assert gradient_bytes(model) == 4 * 8
    assert gradient_bytes(model.double()) == 8 * 8
    model.bias.requires_grad_(False)
    assert gradient_bytes(model) == 8 * 6


def test_gradient_bytes_are_those_of_the_gradients(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = loop.update

    def step(self: Fit, loss: torch.Tensor) -> None:
        original(self, loss)
        gradients = [parameter.grad for parameter in self.model.parameters()]
        seen.append(sum(g.numel() * g.element_size() for g in gradients if g is not None))

    monkeypatch.setattr(loop, "update", step)
    work.step(8)()  # on a copy: the work's own student stays as it is
    assert all(parameter.grad is None for parameter in work.student.parameters())
    assert seen == [gradient_bytes(work.student)]
    # ResNet-20 for one channel and ten classes has 269,434 parameters; the quantizers' steps come on top.
    steps = sum(p.numel() for name, p in work.student.named_parameters() if name.startswith("quantizers."))
    assert steps > 0
    assert gradient_bytes(work.student) == 4 * (269_434 + steps)


def test_an_image_is_its_pixels_and_those_of_the_unlabeled_one_beside_it(work: Work) -> None:
    assert work.image_bytes == 8 * 8
    unlabeled = replace(CONFIG, data=replace(CONFIG.data, unlabeled="digits"))
    both = Work(unlabeled, CPU, 0)
    assert both.image_bytes == 2 * 8 * 8
    both.step(4)()


@pytest.mark.parametrize(("teacher", "views"), [("none", 1), ("float", 2)])
def test_steps_without_an_ema_teacher(work: Work, teacher: str, views: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, float]] = []
    original = loop.objective

    def loss(images: Sequence[torch.Tensor], *rest: Any) -> torch.Tensor:
        made = original(images, *rest)
        seen.append((len(images), len(images[0]), float(made.detach())))
        return made

    monkeypatch.setattr(loop, "objective", loss)
    monkeypatch.setattr(work, "config", replace(CONFIG, consistency=ConsistencyConfig(teacher=teacher)))  # type: ignore[arg-type]
    work.step(4)()
    assert [(made, size) for made, size, _ in seen] == [(views, 4)]
    assert math.isfinite(seen[0][2]) and seen[0][2] > 0


def test_a_data_batch_is_counted_in_bytes(work: Work) -> None:
    pairs = measure_data(work)
    assert {size for size, _ in pairs} == {64 * 64}
    assert all(seconds > 0 for _, seconds in pairs)


def test_more_processes_than_images_are_refused(work: Work) -> None:
    with pytest.raises(UsageError, match="--processes 65: a step has 64 images"):
        measure_alone(work, {"processes": [2, 65], "holds": 2, "between": False})


def test_messages_are_around_the_gradients_and_never_far_above_them() -> None:
    assert message_sizes(1 << 20) == [1 << 16, 1 << 20, 1 << 22, 1 << 24]
    assert message_sizes(1 << 30) == [1 << 26, 1 << 30, round(2**30.5) // 4 * 4, 1 << 31]
    assert message_sizes(8) == [4, 8, 32, 128]


@pytest.fixture
def images(tmp_path: Path) -> DataConfig:
    """A folder of images."""
    for part, name in product(("train", "test"), ("cat", "dog")):
        (tmp_path / part / name).mkdir(parents=True)
        for index in range(20):
            pixels = torch.randint(0, 256, (20, 20, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / part / name / f"{index}.png")
    return DataConfig("imagefolder", root=str(tmp_path), size=16, crop=16)


def test_what_workers_decode_at_once_is_not_taken_for_a_faster_source(
    images: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "IN_MEMORY_BYTES", 100)
    work = Work(replace(CONFIG, data=images, qat=QATConfig(epochs=1, batch_size=1)), CPU, 0)

    def decode(self: imagefolder.FolderImages, chosen: list[int]) -> torch.Tensor:
        time.sleep(0.4)
        return torch.zeros(len(chosen), 3, 16, 16, dtype=torch.uint8)

    monkeypatch.setattr(imagefolder.FolderImages, "__getitem__", decode)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of more workers than cores
        rates = [size / seconds for size, seconds in measure_data(work)]
    assert statistics.median(rates) < 2 * 4 * 3 * 16 * 16 / 0.4  # four workers sleep at once


@pytest.mark.slow
def test_files_that_stream_are_decoded_for_the_data_and_in_memory_for_the_step(
    images: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "IN_MEMORY_BYTES", 100)
    work = Work(replace(CONFIG, data=images, qat=QATConfig(epochs=1, batch_size=8)), CPU, 0)
    assert isinstance(work.batches(8, in_memory=False).images, imagefolder.FolderImages)
    in_memory = work.batches(8, in_memory=True)
    assert isinstance(in_memory.images, torch.Tensor)
    assert list(in_memory.images.shape) == [8, 3, 16, 16]
    assert torch.equal(in_memory.images, work.dataset.train_images[work.chosen[:8]])
    assert [labels.shape for (labels,) in islice(endless(work.batches(8, False), work.generators.order, 0), 2)] == [
        (8,),
        (8,),
    ]
    work.step(8)()
