"""CIFAR-10 as WebDataset shards and as a saved Hugging Face data set: the same bits as from memory."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from crqat.core.run_directory import read_manifest
from crqat.pipeline import cli
from crqat.train.config import DataConfig
from crqat.train.data import sources, streaming
from crqat.train.data.batches import Batches, Feed, Generators, evaluation_batches, subset
from crqat.train.data.dataset import Dataset
from crqat.train.training import loop
from crqat.train.training.optimizer import Fit
from tests.crqat_train.stored_sets import PER_SHARD, write_saved, write_shards

TRAIN, TEST = 3000, 60
SOURCES = ("webdataset", "huggingface")
NETWORK = """
from torch import nn

def network(classes, channels):
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)]
    return nn.Sequential(nn.Conv2d(channels, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), *head)
"""
RECIPE = """
name: {name}
compile: never
targets: [onnxruntime]
data: {{source: webdataset, root: set, size: 16, crop: 16, crop_padding: 2, strong: randaugment}}
model: {{name: streamed_network:network}}
float: {{epochs: 1, batch_size: 60, lr: 0.05}}
quantization: {{calibration_images: 32}}
qat: {{epochs: 1, batch_size: 60, lr: 0.01}}
"""


@pytest.fixture(scope="module")
def cifar(cifar10_root: Path) -> Dataset:
    whole = sources.load("cifar10", str(cifar10_root), False)
    parts = {f"train_{kind}": getattr(whole, f"train_{kind}")[:TRAIN].clone() for kind in ("images", "labels")}
    parts |= {f"test_{kind}": getattr(whole, f"test_{kind}")[:TEST].clone() for kind in ("images", "labels")}
    return replace(whole, **parts)


@pytest.fixture(scope="module")
def roots(cifar: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("sets")
    return {
        "webdataset": write_shards(place / "shards", cifar, TRAIN, TEST),
        "huggingface": write_saved(place / "saved", cifar, TRAIN, TEST),
    }


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few images would be decoded once and kept."""
    monkeypatch.setattr(streaming, "IN_MEMORY_BYTES", 0)


def loaded(source: str, root: Path) -> Dataset:
    dataset = sources.of_recipe(DataConfig(source, str(root), size=32, crop=32))
    assert isinstance(dataset.train_images, streaming.StoredImages)
    return dataset


def feed(dataset: Dataset, chosen: Tensor, seed: int, size: int = 32) -> tuple[Feed, Generators]:
    generators = Generators.of(seed, torch.device("cpu"))
    images, labels = subset(dataset.train_images, chosen), dataset.train_labels[chosen]
    batches = Batches(images, labels, dataset.preprocessing, size, 4, True, torch.device("cpu"), strong=True)
    return Feed(batches, generators, views=2), generators


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("source", SOURCES)
def test_two_views_have_the_bits_of_those_from_memory(cifar: Dataset, roots: dict[str, Path], source: str) -> None:
    """Same permutation, same augmentation; worker processes decode. Both normalize as ImageNet's networks want it."""
    dataset = loaded(source, roots[source])
    assert dataset.class_names == cifar.class_names and dataset.preprocessing.mean == cifar.preprocessing.mean
    chosen = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(7))[:330]
    assert torch.equal(dataset.train_labels, cifar.train_labels[:TRAIN])
    made = [list(feed(each, chosen, 1)[0].epoch()) for each in (cifar, dataset)]
    assert len(made[0]) == len(made[1]) == 10
    for own, other in zip(*made, strict=True):
        assert len(own) == 3 and not torch.equal(own[0], own[1])
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))
    tests = torch.cat(list(evaluation_batches(dataset.test_images, dataset.preprocessing, 25)))
    expected = torch.cat(list(evaluation_batches(cifar.test_images[:TEST], cifar.preprocessing, 25)))
    assert torch.equal(tests, expected) and torch.equal(dataset.test_labels, cifar.test_labels[:TEST])


def test_webdataset_reads_the_same(cifar: Dataset, roots: dict[str, Path]) -> None:
    """Its writer made the shards; its reader gives the same images and labels, in the same order."""
    import webdataset

    dataset = sources.of_recipe(DataConfig("webdataset", str(roots["webdataset"]), size=32, crop=32))
    images = dataset.train_images[:]
    assert torch.equal(images, cifar.train_images[:TRAIN])
    urls = [f"file:{path}" for path in sorted(roots["webdataset"].glob("train-*.tar"))[:5]]
    read = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("png", "cls")
    count = 0
    for index, (image, label) in enumerate(read):
        assert torch.equal(torch.from_numpy(image.copy()).permute(2, 0, 1), images[index])
        assert label == dataset.train_labels[index]
        count += 1
    assert count == 5 * PER_SHARD


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("source", SOURCES)
def test_an_epoch_goes_on_in_its_middle(roots: dict[str, Path], source: str) -> None:
    dataset, chosen = loaded(source, roots[source]), torch.arange(320)
    whole = list(feed(dataset, chosen, 2)[0].epoch())
    first, generators = feed(dataset, chosen, 2)
    batches = first.epoch()
    for _ in range(4):
        next(batches)
    state, order, done = generators.augmentation.get_state(), first.order, first.done
    batches.close()  # type: ignore[attr-defined]
    second, generators = feed(loaded(source, roots[source]), chosen, 99)
    generators.augmentation.set_state(state)
    second.order, second.done = order, done
    rest = list(second.epoch())
    assert len(rest) == 6
    for own, other in zip(whole[4:], rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))


def memory() -> int:
    """Anonymous bytes of this process and its children, shared ones once; the kernel takes back mapped files' pages."""
    children = [path.read_text().split() for path in Path("/proc/self/task").glob("*/children")]
    total = 0
    for number in [str(os.getpid()), *(number for numbers in children for number in numbers)]:
        lines = Path(f"/proc/{number}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon:"))
    return total


@pytest.mark.usefixtures("streamed")
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="reads memory from Linux's /proc")
@pytest.mark.parametrize("source", SOURCES)
def test_memory_is_flat_over_an_epoch(roots: dict[str, Path], source: str) -> None:
    """Three times the images; at first workers come to own pages that they shared, then nothing is left to grow.

    From batch 100 to the end within 5 %; from 300 on far from what the images between would take.
    """
    side, seen, count = 64, [], 0
    dataset = sources.of_recipe(DataConfig(source, str(roots[source]), size=side, crop=side))
    batches = Batches(
        dataset.train_images, dataset.train_labels, dataset.preprocessing, 8, 0, True, torch.device("cpu")
    )
    order = torch.cat([torch.randperm(TRAIN, generator=torch.Generator().manual_seed(seed)) for seed in range(3)])
    for count, _ in enumerate(batches.epoch(torch.Generator(), 2, order), start=1):
        if count in (100, 300, 1100):  # the workers end with the last batches
            seen.append(memory())
    assert count == 3 * TRAIN // 8
    decoded = 800 * 8 * 3 * side**2
    assert seen[2] - seen[1] < 0.25 * decoded, f"{seen} bytes"
    assert seen[2] < 1.05 * seen[0], f"{seen} bytes"


def crqat(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["crqat", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.usefixtures("streamed")
def test_a_training_from_recipe_to_weights(
    cifar: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted in the middle of an epoch and continued, it ends with the same bits; a damaged set is one line."""
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "set", cifar, 240, 20)
    (tmp_path / "streamed_network.py").write_text(NETWORK)
    for name in ("whole", "cut"):
        (tmp_path / f"{name}.yaml").write_text(RECIPE.format(name=name))
    assert crqat(monkeypatch, "train", "whole.yaml") == 0
    steps: list[int] = []
    original = loop.update

    def step(self: Fit, loss: Tensor) -> None:
        steps.append(1)
        if len(steps) == 5:  # the second of QAT's three
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, loss)

    monkeypatch.setattr(loop, "update", step)
    assert crqat(monkeypatch, "train", "cut.yaml", "--unchecked") == 143
    assert crqat(monkeypatch, "train", "cut.yaml") == 0
    assert len(steps) == 6
    said = capsys.readouterr()
    assert "from qat epoch 1 of 1, step 2 in it" in said.err
    whole, cut = (read_manifest(tmp_path / "runs" / name / "train").files for name in ("whole", "cut"))
    for file in ("float.safetensors", "student.safetensors", "teacher.safetensors", "student.grids.json"):
        assert whole[file] == cut[file]
    assert crqat(monkeypatch, "train", "whole.yaml") == 0
    said = capsys.readouterr()
    assert "up to date" in said.out + said.err
    broken = tmp_path / "set" / "train-0001.tar"
    broken.write_bytes(broken.read_bytes()[:100_000])
    assert crqat(monkeypatch, "train", "whole.yaml") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("crqat: error: set/train-0001.tar: a damaged tar archive (")
