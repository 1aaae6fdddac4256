"""Defines `Dataset`, which every data source and every data function of a user returns, and checks its values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crqat.core.errors import UsageError
from crqat.core.preprocessing import Preprocessing
from crqat.train.config import LARGEST_UNIT
from crqat.train.data.streaming import StoredImages


@dataclass(frozen=True)
class Dataset:
    """A labeled data set on the CPU, in memory or in files that are decoded on demand.

    A data function of yours returns a `Dataset`. A recipe names it as `data.source: my_module:my_images`:

        def my_images(root: str) -> crqat.Dataset:  # root is the recipe's `data.root`; leave it out if you need none
            arrays = numpy.load(f"{root}/images.npz", allow_pickle=False)
            parts = [torch.from_numpy(arrays[name]) for name in ("train_x", "train_y", "test_x", "test_y")]
            names = ("cat", "dog")
            return crqat.Dataset(*parts, names, crqat.Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)))

    Before training, the returned data set is checked against these attributes.

    Attributes:
        train_images: uint8 of shape [N, C, H, W].
        train_labels: int64 of shape [N], each an index into `class_names`.
        test_images: uint8 of shape [M, C, H, W].
        test_labels: int64 of shape [M].
        class_names: One name per class.
        preprocessing: Normalization of the network's input; one mean and one std per channel.
        notes: Facts about the data that the user should know, one line each.
    """

    train_images: Tensor | StoredImages[Any]
    train_labels: Tensor
    test_images: Tensor | StoredImages[Any]
    test_labels: Tensor
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    notes: tuple[str, ...] = ()


def validate(dataset: Dataset, source: str) -> None:
    """Check that a data set keeps the contract of `Dataset`.

    Args:
        dataset: Data set that a source returned.
        source: Name of the source in messages.

    Raises:
        UsageError: The data set breaks the contract; the message names the source and the field.
    """

    def require(condition: bool, problem: str) -> None:
        if not condition:
            msg = f"{source}: {problem}"
            raise UsageError(msg)

    names = dataset.class_names
    require(
        isinstance(names, tuple) and all(isinstance(name, str) for name in names), "class_names must be a tuple of str"
    )
    require(not _places_mixed(dataset), _ORDER)
    for part, images, labels in (
        ("train", dataset.train_images, dataset.train_labels),
        ("test", dataset.test_images, dataset.test_labels),
    ):
        for field, value, dtype, ndim in (
            (f"{part}_images", images, torch.uint8, 4),
            (f"{part}_labels", labels, torch.int64, 1),
        ):
            if isinstance(value, StoredImages):
                continue
            require(isinstance(value, Tensor), f"{field} must be a torch.Tensor, got {type(value).__name__}")
            require(value.device.type == "cpu", f"{field} must be on the CPU, got {value.device}")
            hint = _type_hint(value, ndim)
            require(value.dtype == dtype, f"{field} must be {dtype}, got {value.dtype}{hint}")
            require(value.ndim == ndim, f"{field} must have {ndim} dimensions, got shape {list(value.shape)}")
            require(value.numel() > 0, f"{field} is empty: shape {list(value.shape)}")
        exchanged = (len(dataset.train_images), len(dataset.test_images)) == (
            len(dataset.test_labels),
            len(dataset.train_labels),
        )
        swapped = "; train_labels and test_labels seem to be swapped" if exchanged else ""
        require(len(images) == len(labels), f"{len(images)} {part}_images but {len(labels)} {part}_labels{swapped}")
        classes, low, high = len(names), int(labels.min()), int(labels.max())
        from_one = "; they begin at 1: subtract 1" if (low, high) == (1, classes) else ""
        require(
            low >= 0 and high < classes,
            f"{part}_labels must be in 0..{classes - 1}, one class_names entry each; got {low}..{high}{from_one}",
        )
    shape, test_shape = list(dataset.train_images.shape[1:]), list(dataset.test_images.shape[1:])
    require(shape == test_shape, f"train_images are {shape} each but test_images {test_shape}")
    require(
        shape[0] in (1, 3) or shape[2] not in (1, 3) or shape[2] == shape[1],
        f"images are [channels, height, width] each, got {shape}; images.permute(0, 3, 1, 2) puts the channels first",
    )
    preprocessing = dataset.preprocessing
    require(isinstance(preprocessing, Preprocessing), "preprocessing must be a crqat.core.preprocessing.Preprocessing")
    _, mean, std = preprocessing.constants()
    require(
        mean.size == std.size == shape[0],
        f"preprocessing must have one mean and std per channel ({shape[0]}), got {mean.size} and {std.size}",
    )
    require(bool(np.isfinite(mean).all() and np.isfinite(std).all()), "preprocessing mean and std must be finite")
    require(bool((std > 0).all()), f"preprocessing std must be positive, got {preprocessing.std}")


_ORDER = (
    "images and labels are in each other's places; the order is train_images, train_labels, test_images, test_labels"
)


def _places_mixed(dataset: Dataset) -> bool:
    """Whether images and labels seem to be swapped: the labels have the dimensions of images, the images of labels."""
    labels = [value for value in (dataset.train_labels, dataset.test_labels) if isinstance(value, Tensor)]
    images = [value for value in (dataset.train_images, dataset.test_images) if isinstance(value, Tensor)]
    return any(value.ndim > 2 for value in labels) and any(value.ndim == 1 for value in images)


def _type_hint(value: Tensor, ndim: int) -> str:
    """Return advice for a message about a tensor whose type is not that of images or labels; "" if there is none.

    Args:
        value: The tensor.
        ndim: Number of dimensions that it should have: 4 stands for images, 1 for labels.
    """
    if not value.numel():
        return ""
    if ndim == 1:
        if value.ndim == 2 and value.shape[1] > 1:
            return "; labels must be class numbers: for one-hot labels, use labels.argmax(1)"
        return "" if value.is_floating_point() and bool((value % 1 != 0).any()) else "; convert them: labels.long()"
    if not value.is_floating_point():
        return "; images must be bytes: if the values are in 0..255, use images.to(torch.uint8)"
    low, high = float(value.min()), float(value.max())
    if low < 0:
        return f" from {low:.3g} to {high:.3g}; pass bytes before normalization, which `preprocessing` does"
    scaled = "(images * 255).round()" if high <= 1 else "images.round()"
    return f" from {low:.3g} to {high:.3g}; images must be bytes in 0..255: use {scaled}.to(torch.uint8)"


def doubts(dataset: Dataset, listed: bool = False) -> tuple[str, ...]:
    """Return probable mistakes in a valid data set, one line each.

    Args:
        dataset: A valid data set.
        listed: Whether an image list assigns the images to the parts. Then fewer training than test images, and classes
            without training images, are not reported: the lists that `crqat quantize` writes have at most 100 training
            images.
    """
    found = []
    train, test = len(dataset.train_images), len(dataset.test_images)
    if test > train and not listed:
        found.append(
            f"more test images ({test}) than training images ({train}): are the two parts swapped? The network is "
            "trained and calibrated on the training part"
        )
    images = dataset.train_images
    if isinstance(images, Tensor) and len(dataset.class_names) > 1 and int(images.max()) <= 1:
        found.append(
            "no byte of the training images is above 1 of 255: were they floats in 0..1? (images * 255).round() before "
            ".to(torch.uint8) keeps them"
        )
    for name, constants in zip(("mean", "std"), dataset.preprocessing.constants()[1:], strict=True):
        if (largest := float(np.abs(constants).max())) > LARGEST_UNIT:
            found.append(
                f"the normalization's {name} is {largest:g}, but its unit is 0..1; should it be divided by 255?"
            )
    absent = sorted(set(dataset.test_labels.tolist()) - set(dataset.train_labels.tolist()))
    if absent and not listed:
        names = ", ".join(dataset.class_names[label] for label in absent[:3])
        found.append(f"{len(absent)} classes of the test images have no training image ({names})")
    return tuple(found)
