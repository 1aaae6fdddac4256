"""Loaders of small public data sets: scikit-learn's digits, CIFAR-10 and CIFAR-100."""

from __future__ import annotations

import http.client
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crqat.core.errors import ToolError, UsageError
from crqat.core.preprocessing import Preprocessing
from crqat.train.data.dataset import Dataset
from crqat.train.data.streaming import StoredImages

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# ImageNet's statistics, not CIFAR-10's own: the published CIFAR-10 weights were trained with these.
CIFAR10_PREPROCESSING = Preprocessing(IMAGENET_MEAN, IMAGENET_STD)
DIGITS_TRAINING = 1000


def imagenet(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return ImageNet's mean and std; for grey images the averages over the channels, 0.449 and 0.226."""
    if channels == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    mean, std = (round(sum(values) / 3, 3) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (mean,), (std,)


def digits() -> Dataset:
    """Return scikit-learn's 1,797 digits, grey, 8 x 8 pixels."""
    # Imported here: other sources do not need scikit-learn.
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    # Pixels are 0..16. The mapping to 0..255 is one-to-one: rint(code * 16 / 255) is the pixel again.
    images: npt.NDArray[np.uint8] = np.rint(pixels * 255 / 16).astype(np.uint8).reshape(-1, 1, 8, 8)
    labels: npt.NDArray[np.int64] = targets.astype(np.int64)
    train = images[:DIGITS_TRAINING] / 255
    return Dataset(
        torch.from_numpy(images[:DIGITS_TRAINING]),
        torch.from_numpy(labels[:DIGITS_TRAINING]),
        torch.from_numpy(images[DIGITS_TRAINING:]),
        torch.from_numpy(labels[DIGITS_TRAINING:]),
        tuple(str(digit) for digit in range(10)),
        Preprocessing((float(train.mean()),), (float(train.std()),)),
    )


def cifar(name: str, root: Path, download: bool) -> Dataset:
    """Return CIFAR-10 or CIFAR-100, RGB, 32 x 32 pixels.

    Args:
        name: "cifar10" or "cifar100".
        root: Folder that contains torchvision's folder of the data set.
        download: Download the data set if it is missing.

    Raises:
        UsageError: The data set is missing or damaged.
        ToolError: The download failed, or files cannot be read.
    """
    # Imported here: torchvision takes a second, and other sources do not need it.
    from torchvision.datasets import CIFAR10, CIFAR100  # type: ignore[import-untyped]

    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    title = name.replace("cifar", "CIFAR-")
    if not download and not (root / kind.base_folder).is_dir():
        msg = (
            f"data.root: no folder {kind.base_folder} in {root}; set data.root to the folder that contains it, "
            "or `download: true`"
        )
        raise UsageError(msg)
    # These files are pickles, which can run code. torchvision compares each file's MD5 with the published one, the
    # batches in the constructor, batches.meta in _load_meta, before it unpickles the first byte, and raises
    # RuntimeError; a test puts a hostile pickle in their place. `download: true` does not skip the check.
    try:
        with warnings.catch_warnings():
            # Pickled by a numpy of 2009; newer versions warn about the spelling of a dtype.
            warnings.simplefilter("ignore", category=np.exceptions.VisibleDeprecationWarning)
            train, test = (kind(root, train=part, download=download) for part in (True, False))
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        if download:
            msg = f"data.download: cannot fetch {title} into {root} ({error}); check the network and the disk"
            raise ToolError(msg) from error
        if isinstance(error, OSError):
            msg = f"data.root: cannot read {root / kind.base_folder} ({error})"
            raise ToolError(msg) from error
        msg = (
            f"data.root: a file in {root / kind.base_folder} is missing or damaged (its MD5 is not the published "
            "one); remove the folder and set `download: true`"
        )
        raise UsageError(msg) from error
    return Dataset(
        _channels_first(train.data),
        torch.tensor(train.targets, dtype=torch.int64),
        _channels_first(test.data),
        torch.tensor(test.targets, dtype=torch.int64),
        tuple(train.classes),
        CIFAR10_PREPROCESSING,
    )


def grey(dataset: Dataset) -> Dataset:
    """Convert an RGB data set in memory to grey, with the luma that Pillow uses for files."""

    def luma(images: Tensor | StoredImages[Any]) -> Tensor:
        red, green, blue = (images[:][:, index].int() for index in range(3))
        return ((19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16).to(torch.uint8)[:, None]

    train, test = luma(dataset.train_images), luma(dataset.test_images)
    own = replace(dataset.preprocessing, mean=imagenet(1)[0], std=imagenet(1)[1])
    return replace(dataset, train_images=train, test_images=test, preprocessing=own)


def _channels_first(images: npt.NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
