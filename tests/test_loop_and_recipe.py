"""A loop of one's own and a recipe give the same bits: same seed, order of images, threads and learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import crqat
from crqat.core.grid import load_grids
from crqat.core.progress import quiet
from crqat.core.run_directory import Manifest, write_stage
from crqat.core.typed_json import to_json
from crqat.export import stage
from crqat.export.config import ExportConfig
from crqat.train.config import (
    ConsistencyConfig,
    DataConfig,
    FloatConfig,
    ModelConfig,
    QATConfig,
    QuantizationConfig,
    TrainConfig,
)
from crqat.train.data import sources
from crqat.train.data.dataset import Dataset
from crqat.train.data.split import Split
from crqat.train.data.split import split as split_images
from crqat.train.training.stage import train

SEED, BATCH, EPOCHS, DECAY, LR, LAMBDA = 3, 100, 2, 5e-4, 0.01, 0.7


class Net(nn.Module):
    """Two convolutions with BN and a classifier for the digits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def network() -> nn.Module:
    return Net()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe(weights: Path) -> TrainConfig:
    """Without augmentation and re-estimation of BN, so that everything which is drawn is the order of the images."""
    return TrainConfig(
        seed=SEED,
        targets=("onnxruntime", "tensorrt"),
        data=DataConfig("digits", crop_padding=0, flip=False),
        model=ModelConfig(f"{__name__}:network", str(weights)),
        float_training=FloatConfig(epochs=0),
        quantization=QuantizationConfig(weights=4, activations=4, calibration_images=200),
        qat=QATConfig(epochs=EPOCHS, batch_size=BATCH, lr=LR, weight_decay=DECAY, bn_images=0),
        consistency=ConsistencyConfig(weight=LAMBDA, ramp_up=0.0, ema_decay=0.9),
        device="cpu",
        compile="never",
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a float network that reads the digits a little."""
    torch.manual_seed(0)
    net, (images, labels) = network(), digits()[:2]
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(10):
        optimizer.zero_grad()
        functional.cross_entropy(net(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    path = tmp_path_factory.mktemp("weights") / "float.safetensors"
    save_file(net.state_dict(), path)
    return path


def digits() -> tuple[Tensor, Tensor, Dataset, Split]:
    """The recipe's training images, normalized, float32 of shape [N, 1, 8, 8], labels, and their source."""
    dataset = sources.load("digits", None, download=False)
    split = split_images(len(dataset.train_labels), 0.1, SEED)
    images = torch.from_numpy(dataset.preprocessing(dataset.train_images[split.train].numpy()))
    return images, dataset.train_labels[split.train], dataset, split


@pytest.fixture(scope="module")
def run(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory with its train and export stages."""
    run, trained = tmp_path_factory.mktemp("run"), recipe(weights)
    manifest = Manifest("train", "a key", None, {}, {})
    with write_stage(run, manifest) as out:
        manifest.payload = to_json(train(trained, out, quiet))
    manifest = Manifest("export", "a key", None, {}, {})
    with write_stage(run, manifest) as out:
        config = ExportConfig(candidate="teacher", verify_images=16)
        payload = stage.export(run / "train", trained, config, out, quiet, "out", "a revision")
        manifest.payload = to_json(payload)
    return run


def rate(step: int, steps: int) -> float:
    """The recipe's learning rate: linear warm-up over 5 % of the steps, then a cosine to zero."""
    return LR * min(1.0, (step + 1) / max(1.0, 0.05 * steps)) * (0.5 * (1 + math.cos(math.pi * step / steps)))


def own_loop(weights: Path) -> tuple[crqat.QuantizedModel, crqat.EMATeacher]:
    """The public API, and torch for the rest."""
    images, labels, *_ = digits()
    net = network()
    net.load_state_dict(load_file(weights))
    # The memory layout of the recipe: another one takes other kernels, which round otherwise.
    net.eval().to(memory_format=torch.channels_last)

    model = crqat.quantize(net, calibration=[images[:200]], weights=4, activations=4)
    teacher = crqat.EMATeacher(model, decay=0.9)
    groups = crqat.parameter_groups(model, weight_decay=DECAY)
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=0.9, nesterov=True)
    order, step, steps = torch.Generator().manual_seed(SEED), 0, EPOCHS * (len(images) // BATCH)
    model.train()
    for _ in range(EPOCHS):
        drawn = torch.randperm(len(images), generator=order)[: steps // EPOCHS * BATCH]
        for batch in torch.split(drawn, BATCH):
            for group in optimizer.param_groups:
                group["lr"] = rate(step, steps)
            x = images[batch].contiguous(memory_format=torch.channels_last)
            logits = model(x)
            loss = functional.cross_entropy(logits, labels[batch])
            loss = loss + LAMBDA * crqat.consistency_loss(logits, teacher(x))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            teacher.update()
            step += 1
    model.eval()
    return model, teacher


def test_weights_scales_and_files_have_the_same_bits(run: Path, weights: Path, tmp_path: Path) -> None:
    model, teacher = own_loop(weights)
    *_, dataset, split = digits()
    held_out = dataset.train_images[split.validation[:16]]
    files = crqat.export(
        teacher.model,
        tmp_path / "out",
        images=held_out,
        preprocessing=dataset.preprocessing,
        class_names=dataset.class_names,
    )
    for name, network in (("student", model), ("teacher", teacher.model)):
        network.finalize()
        expected = load_file(run / "train" / f"{name}.safetensors")
        assert expected.keys() == network.state_dict().keys()
        differing = [key for key, value in network.state_dict().items() if not torch.equal(value, expected[key])]
        assert differing == [], name
        grids = load_grids(run / "train" / f"{name}.grids.json")
        assert all(np.array_equal(grid.scale, grids[edge].scale) for edge, grid in network.grids().items())
    float_weights = load_file(weights)
    assert any(
        not torch.equal(value, float_weights[key]) for key, value in model.state_dict().items() if key in float_weights
    )
    for target, path in files.files.items():
        recipes = onnx.load(run / "export" / f"{target}.onnx")
        assert onnx.load(path).graph.SerializeToString() == recipes.graph.SerializeToString(), target
    codes = [directory / "onnxruntime.codes.npz" for directory in (files.directory, run / "export")]
    assert codes[0].read_bytes() == codes[1].read_bytes()
