"""The images: where they come from, how they are split, and how batches of them are made on the training device."""

from __future__ import annotations

import difflib
import http.client
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from artifacts.errors import ToolError, UsageError
from artifacts.images import Preprocessing, normalize

CIFAR10_ROOT = "data/cifar10"
# Not CIFAR-10's own statistics but ImageNet's: the published CIFAR-10 weights were trained with these.
CIFAR10_PREPROCESSING = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DIGITS_TRAINING = 1000


@dataclass(frozen=True)
class Dataset:
    """A labeled data set, complete in memory, on the CPU.

    Attributes:
        train_images: uint8 of shape [N, C, H, W].
        train_labels: int64 of shape [N], each an index into `class_names`.
        test_images: uint8 of shape [M, C, H, W].
        test_labels: int64 of shape [M].
        class_names: One name per class.
        preprocessing: How the network wants its input normalized; one mean and one std per channel.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    preprocessing: Preprocessing


def load(source: str, root: str | None, download: bool, key: str = "data.source") -> Dataset:
    """The data set that a recipe names.

    Args:
        source: "digits", "cifar10" or "package.module:function". The function is called with `root` if it has a
            parameter of that name, else without arguments, and returns a `Dataset`.
        root: Folder of an on-disk source; None is "data/cifar10" for "cifar10".
        download: Fetch "cifar10" into `root` if it is not there.
        key: The recipe's key that `source` stands under, for messages.

    Raises:
        UsageError: The source is unknown, missing, damaged or not a valid `Dataset`.
        ToolError: The download failed.
    """
    if source == "digits":
        dataset = _digits()
    elif source == "cifar10":
        dataset = _cifar10(Path(root or CIFAR10_ROOT).expanduser(), download)
    elif ":" in source:
        dataset = _from_function(source, root, key)
    else:
        near = difflib.get_close_matches(source, ("digits", "cifar10"), n=1)
        hint = f'; did you mean "{near[0]}"?' if near else ""
        msg = f'{key}: "{source}" is none of "digits", "cifar10", "package.module:function"{hint}'
        raise UsageError(msg)
    validate(dataset, f"{key}: {source}")
    return dataset


def load_unlabeled(source: str, root: str | None, download: bool, labeled: Dataset) -> Dataset:
    """The recipe's `data.unlabeled`: its training images go through the same network as the labeled ones.

    Raises:
        UsageError: As `load`, or the images' shape is not that of the labeled images.
        ToolError: As `load`.
    """
    dataset = load(source, root, download, key="data.unlabeled")
    shape, expected = list(dataset.train_images.shape[1:]), list(labeled.train_images.shape[1:])
    if shape != expected:
        msg = f"data.unlabeled: images of {source} have shape {shape}, those of data.source {expected}; resize them"
        raise UsageError(msg)
    return dataset


def validate(dataset: Dataset, source: str) -> None:
    """Check that a data set is what its class promises.

    Args:
        dataset: What a source returned.
        source: What to call it in a message.

    Raises:
        UsageError: It is not; the message names the source and the field.
    """

    def require(condition: bool, problem: str) -> None:
        if not condition:
            msg = f"{source}: {problem}"
            raise UsageError(msg)

    names = dataset.class_names
    require(
        isinstance(names, tuple) and all(isinstance(name, str) for name in names), "class_names must be a tuple of str"
    )
    for part, images, labels in (
        ("train", dataset.train_images, dataset.train_labels),
        ("test", dataset.test_images, dataset.test_labels),
    ):
        for field, value, dtype, ndim in (
            (f"{part}_images", images, torch.uint8, 4),
            (f"{part}_labels", labels, torch.int64, 1),
        ):
            require(isinstance(value, Tensor), f"{field} must be a torch.Tensor, got {type(value).__name__}")
            require(value.dtype == dtype, f"{field} must be {dtype}, got {value.dtype}")
            require(value.ndim == ndim, f"{field} must have {ndim} dimensions, got shape {list(value.shape)}")
            require(value.numel() > 0, f"{field} is empty: shape {list(value.shape)}")
            require(value.device.type == "cpu", f"{field} must be on the CPU, got {value.device}")
        require(len(images) == len(labels), f"{len(images)} {part}_images but {len(labels)} {part}_labels")
        classes, low, high = len(names), int(labels.min()), int(labels.max())
        require(
            low >= 0 and high < classes,
            f"{part}_labels must be in 0..{classes - 1}, one class_names entry each; got {low}..{high}",
        )
    shape, test_shape = list(dataset.train_images.shape[1:]), list(dataset.test_images.shape[1:])
    require(shape == test_shape, f"train_images are {shape} each but test_images {test_shape}")
    preprocessing = dataset.preprocessing
    require(isinstance(preprocessing, Preprocessing), "preprocessing must be an artifacts.images.Preprocessing")
    _, mean, std = preprocessing.constants()
    require(
        mean.size == std.size == shape[0],
        f"preprocessing must have one mean and std per channel ({shape[0]}), got {mean.size} and {std.size}",
    )
    require(bool(np.isfinite(mean).all() and np.isfinite(std).all()), "preprocessing mean and std must be finite")
    require(bool((std > 0).all()), f"preprocessing std must be positive, got {preprocessing.std}")


def import_function(name: str, key: str) -> Callable[..., Any]:
    """The function that a recipe names as "package.module:function".

    Args:
        name: As in the recipe; the module may also lie in the current folder.
        key: The recipe's key, for messages.

    Raises:
        UsageError: It cannot be imported or is not a function.
    """
    module_name, _, function_name = name.partition(":")
    # A console script does not search the current folder as `python -m` does. It comes last, so that nothing there
    # takes the place of an installed package.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's: whatever it raises is why it cannot be imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        msg = f"{key}: cannot import {module_name!r} ({reason}); install it or run in the folder it is in"
        raise UsageError(msg) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        msg = f"{key}: module {module_name!r} ({module.__file__}) has no function {function_name!r}"
        raise UsageError(msg)
    return function  # type: ignore[no-any-return]


def call_function(function: Callable[..., Any], name: str, key: str, arguments: dict[str, Any]) -> Any:
    """Call a recipe's function; what it raises itself passes through.

    Raises:
        UsageError: Its parameters do not fit.
    """
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        call = ", ".join(f"{argument}=" for argument in arguments)
        msg = f"{key}: {name} must be callable as {name.partition(':')[2]}({call}) ({error})"
        raise UsageError(msg) from error
    return function(**arguments)


def _from_function(source: str, root: str | None, key: str) -> Dataset:
    function = import_function(source, key)
    takes_root = "root" in inspect.signature(function).parameters
    dataset = call_function(function, source, key, {"root": root} if takes_root else {})
    if not isinstance(dataset, Dataset):
        msg = f"{key}: {source} must return a crqat_train.data.Dataset, got {type(dataset).__name__}"
        raise UsageError(msg)
    return dataset


def _digits() -> Dataset:
    # Imported here because other sources do without scikit-learn.
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    # Pixels are 0..16. The spread over 0..255 is one-to-one: rint(code * 16 / 255) is the pixel again.
    images: npt.NDArray[np.uint8] = np.rint(pixels * 255 / 16).astype(np.uint8).reshape(-1, 1, 8, 8)
    labels: npt.NDArray[np.int64] = digits.astype(np.int64)
    train = images[:DIGITS_TRAINING] / 255
    return Dataset(
        torch.from_numpy(images[:DIGITS_TRAINING]),
        torch.from_numpy(labels[:DIGITS_TRAINING]),
        torch.from_numpy(images[DIGITS_TRAINING:]),
        torch.from_numpy(labels[DIGITS_TRAINING:]),
        tuple(str(digit) for digit in range(10)),
        Preprocessing((float(train.mean()),), (float(train.std()),)),
    )


def _cifar10(root: Path, download: bool) -> Dataset:
    # Imported here because other sources do without torchvision, which takes a second.
    from torchvision.datasets import CIFAR10  # type: ignore[import-untyped]

    if not download and not (root / CIFAR10.base_folder).is_dir():
        msg = (
            f"data.root: no folder {CIFAR10.base_folder} in {root}; set data.root to the folder that contains it, "
            "or `download: true`"
        )
        raise UsageError(msg)
    # CIFAR-10's files are pickles, which can run code. torchvision compares each file's MD5 with the published one, the
    # batches in the constructor, batches.meta in _load_meta, before it unpickles the first byte, and raises
    # RuntimeError; a test puts a hostile pickle in their place. `download: true` does not skip the check.
    try:
        with warnings.catch_warnings():
            # These files were pickled by a numpy of 2009; newer ones warn of how they spell a dtype.
            warnings.simplefilter("ignore", category=np.exceptions.VisibleDeprecationWarning)
            train, test = (CIFAR10(root, train=part, download=download) for part in (True, False))
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        if download:
            msg = f"data.download: cannot fetch CIFAR-10 into {root} ({error}); check the network and the disk"
            raise ToolError(msg) from error
        if isinstance(error, OSError):
            msg = f"data.root: cannot read {root / CIFAR10.base_folder} ({error})"
            raise ToolError(msg) from error
        msg = (
            f"data.root: a file in {root / CIFAR10.base_folder} is missing or damaged (its MD5 is not the published "
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


def _channels_first(images: npt.NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


@dataclass(frozen=True)
class Split:
    """Which training images train and which select; int64 indices on the CPU."""

    train: Tensor
    validation: Tensor


def split(n: int, fraction: float, seed: int) -> Split:
    """Divide n images at random, the same way for the same seed whatever the training device.

    Args:
        n: Number of images.
        fraction: Share of the validation part, in 0..1.
        seed: Of the drawing.

    Raises:
        UsageError: One of the two parts would be empty.
    """
    count = round(n * fraction)
    if not 0 < count < n:
        msg = f"data.validation: a share of {fraction} of {n} training images leaves one part empty; change it"
        raise UsageError(msg)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return Split(train=order[count:], validation=order[:count])


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Shift each image by its own random offset of -padding..padding pixels; what comes in is 0, black.

    Args:
        images: uint8 of shape [N, C, H, W].
        padding: Pixels.
        generator: On the images' device; gives one [N, 2] draw of (row, column) offsets in 0..2 padding.

    Returns:
        Of the same shape and type.
    """
    n, _, height, width = images.shape
    # All windows of the padded image, as a view: [N, C, 2 padding + 1, 2 padding + 1, H, W].
    windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    offsets = torch.randint(0, 2 * padding + 1, (n, 2), generator=generator, device=images.device)
    return windows[torch.arange(n, device=images.device), :, offsets[:, 0], offsets[:, 1]]


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2.

    Args:
        images: uint8 of shape [N, C, H, W].
        generator: On the images' device; gives one [N] draw in 0..1, below 0.5 is flipped.

    Returns:
        Of the same shape and type.
    """
    flipped = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    return torch.where(flipped[:, None, None, None], images.flip(3), images)


class Batches:
    """Augmented training batches, made on the device where the images lie, without a wait for the host.

    All batches have the same shape, so that a compiled step is compiled once: of n images, `min(n, batch_size)` go into
    each, and the incomplete rest of an epoch is dropped, other images each time.

    Args:
        images: uint8 of shape [N, C, H, W].
        labels: int64 of shape [N].
        preprocessing: Of the network's input.
        batch_size: Images a step.
        crop_padding: See `random_crop`; 0 switches it off.
        flip: See `random_flip`.
        device: Where images and labels are kept and batches are made.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        preprocessing: Preprocessing,
        batch_size: int,
        crop_padding: int,
        flip: bool,
        device: torch.device,
    ) -> None:
        self.images = images.to(device)
        self.labels = labels.to(device)
        self.constants = [torch.from_numpy(constant).to(device) for constant in preprocessing.constants()]
        self.batch_size = min(batch_size, len(images))
        self.crop_padding = crop_padding
        self.flip = flip

    def __len__(self) -> int:
        """Steps of an epoch."""
        return len(self.images) // self.batch_size

    def epoch(self, generator: torch.Generator, views: int = 1) -> Iterator[tuple[Tensor, ...]]:
        """Each image at most once, in random order.

        Args:
            generator: On the training device; the same state gives the same batches.
            views: How many independent augmentations of the same images.

        Yields:
            The views, normalized float32 of shape [B, C, H, W] each, and the labels, int64 of shape [B].
        """
        order = torch.randperm(len(self.images), generator=generator, device=self.images.device)
        for step in range(len(self)):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            images = self.images[chosen]
            yield *(self._augment(images, generator) for _ in range(views)), self.labels[chosen]

    def stream(self, generator: torch.Generator, views: int = 1) -> Iterator[tuple[Tensor, ...]]:
        """Epochs without end and without labels: yields the views alone, as `epoch` does."""
        while True:
            for batch in self.epoch(generator, views):
                yield batch[:-1]

    def _augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        if self.crop_padding:
            images = random_crop(images, self.crop_padding, generator)
        if self.flip:
            images = random_flip(images, generator)
        return normalize(images.float(), self.constants)


def evaluation_batches(images: Tensor, preprocessing: Preprocessing, batch_size: int) -> Iterator[Tensor]:
    """All images in order, without augmentation, on the device they lie on.

    Args:
        images: uint8 of shape [N, C, H, W].
        preprocessing: Of the network's input.
        batch_size: Images a batch; the last one may be smaller.

    Yields:
        Normalized float32 of shape [B, C, H, W].
    """
    constants = [torch.from_numpy(constant).to(images.device) for constant in preprocessing.constants()]
    for start in range(0, len(images), batch_size):
        yield normalize(images[start : start + batch_size].float(), constants)
