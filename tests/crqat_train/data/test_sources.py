from __future__ import annotations

import dataclasses
import hashlib
import pickle
import sys
import urllib.error
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets.cifar  # type: ignore[import-untyped]
from PIL import Image
from torch import Tensor

from crqat.core.errors import ToolError, UsageError
from crqat.core.preprocessing import Preprocessing
from crqat.train.config import DataConfig
from crqat.train.data import sources
from crqat.train.data.augment import random_crop, random_flip
from crqat.train.data.batches import Batches, Feed, Generators, evaluation_batches
from crqat.train.data.builtin import CIFAR10_PREPROCESSING
from crqat.train.data.dataset import Dataset, doubts, validate
from crqat.train.data.split import split as split_images
from crqat.train.data.split import split_of
from tests.hostile_pickle import Hostile, load_without_care

CPU = torch.device("cpu")
PLAIN = Preprocessing((0.0,), (1 / 255,))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return sources.load("digits", None, download=False)


@pytest.fixture(scope="module")
def cifar10(cifar10_root: Path) -> Dataset:
    return sources.load("cifar10", str(cifar10_root), download=False)


def numbered(n: int) -> Dataset:
    """A data set whose image i is all i and has the label i."""
    labels = torch.arange(n)
    images = labels.to(torch.uint8)[:, None, None, None].expand(n, 1, 4, 4).clone()
    return Dataset(images, labels, images, labels, tuple(map(str, range(n))), PLAIN)


def batches(dataset: Dataset, size: int, padding: int = 0, flip: bool = False) -> Batches:
    return Batches(dataset.train_images, dataset.train_labels, dataset.preprocessing, size, padding, flip, CPU)


def test_digits_keep_every_pixel_value(digits: Dataset) -> None:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.cat([digits.train_images[:], digits.test_images[:]])
    assert images.dtype == torch.uint8
    assert list(images.shape) == [1797, 1, 8, 8]
    assert np.array_equal(np.rint(images.numpy().reshape(1797, 64) * (16 / 255)), pixels)
    assert images.min() == 0
    assert images.max() == 255
    assert np.array_equal(torch.cat([digits.train_labels, digits.test_labels]).numpy(), labels)
    assert len(digits.train_images) == 1000


def test_digits_are_normalized_to_mean_0_and_std_1_on_the_training_images(digits: Dataset) -> None:
    normalized = digits.preprocessing(digits.train_images[:].numpy())
    assert normalized.mean() == pytest.approx(0, abs=1e-5)
    assert normalized.std() == pytest.approx(1, abs=1e-5)


def test_cifar10_is_complete_and_in_its_published_order(cifar10: Dataset) -> None:
    assert list(cifar10.train_images.shape) == [50000, 3, 32, 32]
    assert list(cifar10.test_images.shape) == [10000, 3, 32, 32]
    assert torch.equal(cifar10.train_labels.bincount(), torch.full((10,), 5000))
    assert [cifar10.class_names[i] for i in cifar10.train_labels[:3]] == ["frog", "truck", "truck"]
    # The first row of the first training image, red, then green, as the published array has it.
    assert cifar10.train_images[:1][0, :2, 0, :4].tolist() == [[59, 43, 50, 68], [62, 46, 48, 54]]
    assert cifar10.preprocessing.mean == (0.485, 0.456, 0.406)


def test_cifar10_without_files_asks_for_root_or_download(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^data\.root: no folder cifar-10-batches-py in .*`download: true`$"):
        sources.load("cifar10", str(tmp_path / "none"), download=False)


def test_cifar10_is_looked_for_in_a_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="in data/cifar10;"):
        sources.load("cifar10", None, download=False)


@pytest.fixture
def cifar100_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files in the format of CIFAR-100 with noise in them, which torchvision is told to take for the published."""
    kind, folder = torchvision.datasets.CIFAR100, tmp_path / "cifar-100-python"
    folder.mkdir()
    hashes = {}
    for name, count in (("train", 300), ("test", 200)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 3072), dtype=np.uint8)
        content = {"data": pixels, "fine_labels": [i % 100 for i in range(count)], "coarse_labels": [0] * count}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {i:02}" for i in range(100)]}))
    for path in folder.iterdir():
        hashes[path.name] = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(kind, "train_list", [["train", hashes["train"]]])
    monkeypatch.setattr(kind, "test_list", [["test", hashes["test"]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": hashes["meta"]})
    return tmp_path


def test_cifar100_has_its_fine_classes(cifar100_root: Path) -> None:
    dataset = sources.load("cifar100", str(cifar100_root), download=False)
    assert list(dataset.train_images.shape) == [300, 3, 32, 32] and list(dataset.test_images.shape) == [200, 3, 32, 32]
    assert dataset.train_labels[:3].tolist() == [0, 1, 2] and len(dataset.class_names) == 100
    assert dataset.class_names[7] == "class 07"
    pixels = np.random.default_rng(300).integers(0, 256, (300, 3072), dtype=np.uint8)
    np.testing.assert_array_equal(dataset.train_images[:].numpy().reshape(300, 3072), pixels)


def test_a_cifar100_file_that_is_not_the_published_one_is_refused_unread(cifar100_root: Path) -> None:
    marker = cifar100_root / "the pickle ran"
    (cifar100_root / "cifar-100-python" / "train").write_bytes(pickle.dumps(Hostile(marker)))
    with pytest.raises(UsageError, match=r"^data\.root: .*cifar-100-python is missing or damaged .*`download: true`$"):
        sources.load("cifar100", str(cifar100_root), download=False)
    assert not marker.exists()
    with pytest.raises(UsageError, match="in data/cifar100;"):
        sources.load("cifar100", None, download=False)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_cifar10_file_that_is_not_the_published_one_is_refused_unread(
    cifar10_root: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for file in (cifar10_root / folder.name).iterdir():
        (folder / file.name).symlink_to(file)
    marker = tmp_path / "the pickle ran"
    (folder / name).unlink()
    (folder / name).write_bytes(pickle.dumps(Hostile(marker)))
    with pytest.raises(UsageError, match=r"^data\.root: .* missing or damaged .*`download: true`$"):
        sources.load("cifar10", str(tmp_path), download=False)
    assert not marker.exists()
    load_without_care(folder / name, "pickle")
    assert marker.exists()


@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), OSError(28, "No space left on device")])
def test_a_failed_download_is_the_environments_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", fail)
    with pytest.raises(ToolError, match=r"^data\.download: cannot fetch CIFAR-10 .*(no route|No space left)"):
        sources.load("cifar10", str(tmp_path), download=True)


USER_MODULE = """
import torch
from crqat.core.preprocessing import Preprocessing
from crqat.train.data.dataset import Dataset

def make(size=3, value=7):
    images = torch.full((2, 1, size, size), value, dtype=torch.uint8)
    labels = torch.tensor([0, 1])
    return Dataset(images, labels, images, labels, ("a", "b"), Preprocessing((0.5,), (0.5,)))

def no_arguments(): return make()
def with_root(root): return make(value=len(root))
def greedy(root, mode): return make()
def wrong(): return [1, 2]
number = 3
"""


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a module of the user's, as the console script sees it: not on the path."""
    (tmp_path / "user_images.py").write_text(USER_MODULE)
    (tmp_path / "user_broken.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "user_images", raising=False)
    return tmp_path


@pytest.mark.usefixtures("user_folder")
def test_a_users_function_is_the_source() -> None:
    assert sources.load("user_images:no_arguments", "ignored", download=False).train_images[0, 0, 0, 0] == 7
    assert sources.load("user_images:with_root", "four", download=False).train_images[0, 0, 0, 0] == 4
    at_home = sources.load("user_images:with_root", "~/x", download=False).train_images[0, 0, 0, 0]
    assert at_home == len(str(Path.home() / "x"))
    with pytest.raises(UsageError, match=r"^data\.root: ~no such user/x: there is no home directory for its `~`"):
        sources.load("user_images:with_root", "~no such user/x", download=False)


@pytest.mark.usefixtures("user_folder")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("user_missing:f", r"cannot import 'user_missing' \(ModuleNotFoundError"),
        ("user_broken:f", r"cannot import 'user_broken' \(SyntaxError"),
        (":f", r"cannot import '' \(ValueError"),
        ("user_images:absent", r"module 'user_images' \(.*user_images\.py\) has no function or class 'absent'"),
        ("user_images:number", r"has no function or class 'number'"),
        ("user_images:wrong", r"must return a crqat\.train\.data\.dataset\.Dataset, got list"),
        ("user_images:greedy", r"must be callable as greedy\(root=\) \(missing a required argument: 'mode'\)"),
    ],
)
def test_a_users_function_that_does_not_fit_is_named(source: str, message: str) -> None:
    with pytest.raises(UsageError, match=rf"^data\.source: .*{message}") as caught:
        sources.load(source, None, download=False)
    assert "\n" not in str(caught.value)


def test_an_unknown_source_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r'^data\.source: "cifar-10" .*did you mean "cifar10"\?$'):
        sources.load("cifar-10", None, download=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_images": torch.rand(3, 1, 4, 4)},
            r"must be torch.uint8, got torch.float32 from .*; .*\(images \* 255\)",
        ),
        (
            {"train_images": torch.full((3, 1, 4, 4), 99.0)},
            r"float32 from 99 to 99; .* 0..255: use images\.round\(\)\.to",
        ),
        ({"train_images": torch.full((3, 1, 4, 4), -1.0)}, "from -1 to -1; pass bytes before normalization"),
        ({"train_images": torch.zeros(3, 1, 4, 4, dtype=torch.int64)}, r"torch\.int64; .* images\.to\(torch\.uint8\)"),
        ({"train_labels": torch.tensor([1, 3, 2])}, r"must be in 0..2, .* got 1..3; they begin at 1: subtract 1$"),
        ({"train_labels": torch.eye(3)}, r"train_labels must be torch.int64, .* labels\.argmax\(1\)"),
        (
            {"train_labels": torch.zeros(3, 1, 4, 4), "test_images": torch.zeros(3)},
            "in each other's places; the order is",
        ),
        (
            {
                "train_images": torch.zeros(3, 32, 16, 3, dtype=torch.uint8),
                "test_images": torch.zeros(3, 32, 16, 3, dtype=torch.uint8),
            },
            r"got \[32, 16, 3\]; images\.permute\(0, 3, 1, 2\)",
        ),
        ({"test_images": torch.zeros(3, 4, 4, dtype=torch.uint8)}, "test_images must have 4 dimensions"),
        ({"train_images": np.zeros((3, 1, 4, 4))}, "train_images must be a torch.Tensor, got ndarray"),
        ({"train_images": torch.zeros(0, 1, 4, 4, dtype=torch.uint8)}, "train_images is empty"),
        ({"test_labels": torch.zeros(3, dtype=torch.int32)}, "test_labels must be torch.int64"),
        ({"train_labels": torch.tensor([0, 1])}, "3 train_images but 2 train_labels"),
        ({"train_labels": torch.tensor([0, 1, 3])}, "train_labels must be in 0..2, .* got 0..3"),
        ({"test_labels": torch.tensor([0, -1, 2])}, "test_labels must be in 0..2, .* got -1..2"),
        ({"test_images": torch.zeros(3, 3, 4, 4, dtype=torch.uint8)}, r"\[1, 4, 4\] each but test_images \[3, 4, 4\]"),
        ({"class_names": None}, "class_names must be a tuple of str"),
        ({"preprocessing": Preprocessing((0.5,) * 3, (0.5,) * 3)}, r"one mean and std per channel \(1\), got 3 and 3"),
        ({"preprocessing": Preprocessing((0.5,), (0.0,))}, "std must be positive"),
        ({"preprocessing": Preprocessing((float("nan"),), (0.5,))}, "must be finite"),
        ({"preprocessing": (0.5, 0.5)}, "must be a crqat.core.preprocessing.Preprocessing"),
        ({"train_images": torch.zeros(3, 1, 4, 4, dtype=torch.uint8, device="meta")}, "must be on the CPU, got meta"),
    ],
)
def test_an_invalid_data_set_is_named(changes: dict[str, Any], message: str) -> None:
    validate(numbered(3), "here")
    with pytest.raises(UsageError, match=f"^here: .*{message}"):
        validate(dataclasses.replace(numbered(3), **changes), "here")


def test_swapped_labels_are_told() -> None:
    few, many = numbered(3), numbered(5)
    mixed = dataclasses.replace(
        many, test_images=few.test_images, test_labels=many.test_labels, train_labels=few.train_labels
    )
    with pytest.raises(UsageError, match=r"5 train_images but 3 train_labels; train_labels and test_labels seem to be"):
        validate(mixed, "here")


def test_what_is_probably_a_mistake_is_a_note() -> None:
    few, many = numbered(3), numbered(5)
    assert doubts(many) == ()
    swapped = dataclasses.replace(many, train_images=few.train_images, train_labels=few.train_labels)
    larger, absent = doubts(swapped)
    assert larger.startswith("more test images (5) than training images (3): are the two parts swapped?")
    assert doubts(swapped, listed=True) == ()
    assert absent == "2 classes of the test images have no training image (3, 4)"
    (dark,) = doubts(dataclasses.replace(many, train_images=many.train_images[:].clamp(max=1)))
    assert dark.startswith("no byte of the training images is above 1 of 255: were they floats in 0..1?")
    channels = many.train_images.shape[1]
    bytes_ = dataclasses.replace(many, preprocessing=Preprocessing((0.4,) * channels, (58.0,) * channels))
    assert doubts(bytes_) == ("the normalization's std is 58, but its unit is 0..1; should it be divided by 255?",)


def test_cifar_can_be_grey(cifar100_root: Path) -> None:
    colour = sources.load("cifar100", str(cifar100_root), False)
    made = sources.load("cifar100", str(cifar100_root), False, config=DataConfig("cifar100", channels=1))
    assert made.train_images.shape == (300, 1, 32, 32) and made.preprocessing.channels == 1
    image = Image.fromarray(colour.train_images[7:8][0].permute(1, 2, 0).numpy()).convert("L")
    np.testing.assert_array_equal(made.train_images[7:8][0, 0].numpy(), np.asarray(image))


@pytest.mark.usefixtures("user_folder")
def test_unlabeled_images_must_have_the_shape_of_the_labeled_ones(digits: Dataset) -> None:
    config = DataConfig("digits")
    unlabeled = sources.load_unlabeled("digits", config, digits)
    assert torch.equal(unlabeled[:], digits.train_images[:])
    with pytest.raises(UsageError, match=r"^data\.unlabeled: .*shape \[1, 3, 3\], those of data\.source \[1, 8, 8\]"):
        sources.load_unlabeled("user_images:no_arguments", config, digits)
    with pytest.raises(UsageError, match=r"^data\.unlabeled: "):
        sources.load_unlabeled("digit", config, digits)


def test_a_split_is_disjoint_complete_and_repeatable() -> None:
    parts = split_images(1000, 0.1, seed=3)
    assert len(parts.validation) == 100
    assert torch.equal(torch.cat([parts.train, parts.validation]).sort().values, torch.arange(1000))
    again, other = split_images(1000, 0.1, seed=3), split_images(1000, 0.1, seed=4)
    assert torch.equal(parts.train, again.train)
    assert torch.equal(parts.validation, again.validation)
    assert not torch.equal(parts.validation, other.validation)
    # Drawn, not cut off at an end.
    assert parts.validation.max() > 900
    assert parts.validation.min() < 100


def test_few_labels_are_balanced_and_the_other_images_are_left() -> None:
    labels = torch.tensor([0] * 500 + [1] * 300 + [2] * 4)
    config = DataConfig("digits", validation=0.25, labeled=100)
    parts, again = split_of(labels, config, seed=3), split_of(labels, config, seed=3)
    kept = torch.cat([parts.train, parts.validation])
    assert labels[kept].bincount().tolist() == [48, 48, 4]  # as many as there are
    assert (len(parts.train), len(parts.validation)) == (75, 25)
    assert torch.equal(torch.cat([kept, parts.unlabeled]).sort().values, torch.arange(804))
    assert all(torch.equal(*pair) for pair in zip(astuple(parts), astuple(again), strict=True))
    assert not torch.equal(split_of(labels, config, seed=4).train, parts.train)
    with pytest.raises(UsageError, match=r"^data\.labeled: 805 is more than the 804 training images"):
        split_of(labels, replace(config, labeled=805), seed=3)


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_a_split_with_an_empty_part_is_refused(fraction: float) -> None:
    with pytest.raises(UsageError, match=r"^data\.validation: "):
        split_images(10, fraction, seed=0)


@pytest.mark.parametrize(("padding", "shape"), [(4, (200, 3, 8, 8)), (1, (50, 1, 5, 9)), (9, (900, 1, 8, 8))])
def test_random_crop_is_the_crop_of_each_padded_image(padding: int, shape: tuple[int, ...]) -> None:
    images = torch.randint(1, 256, shape, dtype=torch.uint8, generator=generator(1))
    n, channels, height, width = shape
    offsets = torch.randint(0, 2 * padding + 1, (n, 2), generator=generator())
    assert {*offsets.flatten().tolist()} == {*range(2 * padding + 1)}
    expected = np.zeros(shape, np.uint8)
    for i, (row, column) in enumerate(offsets.tolist()):
        padded = np.zeros((channels, height + 2 * padding, width + 2 * padding), np.uint8)
        padded[:, padding : padding + height, padding : padding + width] = images[i]
        expected[i] = padded[:, row : row + height, column : column + width]
    cropped = random_crop(images, padding, generator())
    assert cropped.dtype == torch.uint8
    assert np.array_equal(cropped, expected)


def test_random_flip_mirrors_half_of_the_images_left_to_right() -> None:
    images = torch.randint(0, 256, (400, 3, 4, 6), dtype=torch.uint8, generator=generator(1))
    flipped = (torch.rand(400, generator=generator()) < 0.5).tolist()
    assert 150 < sum(flipped) < 250
    expected = np.stack(
        [image[:, :, ::-1] if flip else image for image, flip in zip(images.numpy(), flipped, strict=True)]
    )
    assert np.array_equal(random_flip(images, generator()), expected)


def test_an_epoch_gives_each_image_once_with_its_label() -> None:
    loader = batches(numbered(12), size=4)
    epoch = list(loader.epoch(generator()))
    assert len(epoch) == len(loader) == 3
    labels = torch.cat([labels for _, labels in epoch])
    assert torch.equal(labels.sort().values, torch.arange(12))
    assert not torch.equal(labels, torch.arange(12))
    for images, labels in epoch:
        assert images.dtype == torch.float32
        assert torch.allclose(images, labels.float()[:, None, None, None].expand(4, 1, 4, 4))


@pytest.mark.parametrize(("size", "steps", "shape"), [(5, 2, 5), (12, 1, 12), (100, 1, 12)])
def test_all_batches_have_one_shape(size: int, steps: int, shape: int) -> None:
    loader = batches(numbered(12), size)
    assert [list(images.shape) for images, _ in loader.epoch(generator())] == [[shape, 1, 4, 4]] * steps
    assert len(loader) == steps


def test_views_are_independent_augmentations_of_the_same_images(digits: Dataset) -> None:
    loader = batches(digits, 100, padding=2, flip=True)
    first, second, labels = next(loader.epoch(generator(), views=2))
    differ = (first != second).flatten(1).any(1).float().mean()
    # The same offset and flip again has a chance of 1/50.
    assert 0.8 < differ < 1
    # Each view must be a crop and flip of an image that has the label that comes with it.
    order = torch.randperm(1000, generator=generator())[:100]
    assert torch.equal(labels, digits.train_labels[order])
    mean, std = digits.preprocessing.mean[0], digits.preprocessing.std[0]
    for view in (first, second):
        pixels = ((view * std + mean) * 255).round().to(torch.uint8)
        for image, made in zip(digits.train_images[order], pixels, strict=True):
            padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
            crops = [padded[:, y : y + 8, x : x + 8] for y in range(5) for x in range(5)]
            assert any(torch.equal(made, crop) or torch.equal(made, crop.flip(2)) for crop in crops)


def test_crop_and_flip_can_be_switched_off(digits: Dataset) -> None:
    order = torch.randperm(1000, generator=generator())[:100]
    original = torch.from_numpy(digits.preprocessing(digits.train_images[order].numpy()))
    for padding, flip in ((0, False), (2, False), (0, True)):
        images, _ = next(batches(digits, 100, padding, flip).epoch(generator()))
        assert torch.equal(images, original) == (not padding and not flip)


def test_the_seed_decides_every_bit(digits: Dataset) -> None:
    def run(seed: int) -> list[Tensor]:
        return [part for batch in batches(digits, 300, 2, True).epoch(generator(seed), views=2) for part in batch]

    assert all(torch.equal(a, b) for a, b in zip(run(5), run(5), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(run(5), run(6), strict=True))


def test_the_order_of_images_is_the_same_whatever_augmentation_draws() -> None:
    """Of each of three epochs; the images are not."""
    digits = sources.load("digits", None, False)

    def run(own: int) -> tuple[list[Tensor], list[Tensor]]:
        feed = Feed(batches(digits, 300, 2, True), Generators(generator(5), generator(own)), views=2)
        made = [batch for _ in range(3) for batch in feed.epoch()]
        return [labels for *_, labels in made], [view for *views, _ in made for view in views]

    (labels, views), (others, other_views) = run(1), run(2)
    assert len(labels) == 9 and all(torch.equal(a, b) for a, b in zip(labels, others, strict=True))
    assert not torch.equal(torch.cat(labels[:3]), torch.cat(labels[3:6]))
    assert not any(torch.equal(a, b) for a, b in zip(views, other_views, strict=True))


def test_a_stream_goes_on_in_a_new_order() -> None:
    stream = Feed(batches(numbered(6), size=3), Generators(generator(), generator()), views=2).stream()
    drawn = [next(stream)[:-1] for _ in range(6)]
    assert all(len(views) == 2 and torch.equal(*views) for views in drawn)
    values = torch.stack([first[:, 0, 0, 0].round() for first, _ in drawn]).reshape(3, 6)
    assert torch.equal(values.sort().values, torch.arange(6.0).expand(3, 6))
    assert len({tuple(epoch) for epoch in values.tolist()}) > 1


def test_batches_are_normalized_to_the_bits_of_the_deployed_preprocessing(cifar10: Dataset, digits: Dataset) -> None:
    for dataset in (cifar10, digits):
        images = dataset.test_images[:500].clone()
        # All 256 values a pixel can have, in each channel, whatever the images contain.
        size = images[0, 0].numel()
        images[: 256 // size + 1] = (
            torch.arange((256 // size + 1) * size).to(torch.uint8).reshape(-1, 1, *images.shape[2:])
        )
        expected = dataset.preprocessing(images.numpy())
        made = torch.cat(list(evaluation_batches(images, dataset.preprocessing, 200)))
        assert made.dtype == torch.float32
        assert np.array_equal(made.numpy().view(np.uint32), expected.view(np.uint32))
        trained, _ = next(
            Batches(images, dataset.test_labels[:500], dataset.preprocessing, 500, 0, False, CPU).epoch(generator())
        )
        order = torch.randperm(500, generator=generator()).numpy()
        assert np.array_equal(trained.numpy().view(np.uint32), expected[order].view(np.uint32))


def test_evaluation_batches_keep_the_order_and_the_last_images() -> None:
    made = list(evaluation_batches(numbered(10).test_images, PLAIN, 4))
    assert [len(batch) for batch in made] == [4, 4, 2]
    assert torch.equal(torch.cat(made)[:, 0, 0, 0].round(), torch.arange(10.0))


def test_no_value_is_read_back_from_the_device() -> None:
    # A meta tensor has no values: what would make the host wait for a GPU raises an error here.
    meta = torch.device("meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(3, device=meta).nonzero()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(1, device=meta).item()
    images, labels = torch.zeros(10, 3, 8, 8, dtype=torch.uint8), torch.zeros(10, dtype=torch.int64)
    preprocessing = Preprocessing((0.5,) * 3, (0.5,) * 3)
    loader = Batches(images, labels, preprocessing, 4, 2, True, meta)
    made = [
        *loader.epoch(generator(), views=2),
        (*next(Feed(loader, Generators(generator(), generator())).stream()), labels.to(meta)[:4]),
    ]
    assert [[list(part.shape) for part in batch] for batch in made[:2]] == [[[4, 3, 8, 8], [4, 3, 8, 8], [4]]] * 2
    assert all(part.device == meta for batch in made for part in batch)
    assert next(evaluation_batches(images.to(meta), preprocessing, 4)).device == meta


def test_normalization_that_was_not_given_is_told() -> None:
    note = sources.normalization_note(DataConfig("cifar10"), CIFAR10_PREPROCESSING) or ""
    assert note.startswith(
        "data.mean and data.std not given: images are normalized by ImageNet's values, mean 0.485/0.456/0.40"
    )
    half = sources.normalization_note(DataConfig("digits", mean=(0.3,)), Preprocessing((0.3,), (0.4,))) or ""
    assert half.startswith("data.std not given: images are normalized by the values of digits, mean 0.3, std 0.4")
    assert sources.normalization_note(DataConfig("digits", mean=(0.3,), std=(0.4,)), PLAIN) is None
    assert sources.normalization_note(DataConfig("own:data"), PLAIN) is None, "the function gives its own"
