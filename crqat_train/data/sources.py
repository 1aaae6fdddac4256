"""The images: where they come from and how they are split."""

from __future__ import annotations

import difflib
import http.client
import importlib
import inspect
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crqat.core.errors import CrqatError, ToolError, UsageError
from crqat.core.field_bounds import user_path
from crqat.core.preprocessing import Preprocessing
from crqat.core.progress import Progress, quiet
from crqat.train.config import FOLDER_CROP, FOLDER_SIZE, DataConfig
from crqat.train.data.huggingface import TableImages, fetch, open_saved
from crqat.train.data.imagefolder import FolderImages, StoredImages, decode, duplicates, list_folder
from crqat.train.data.webdataset import ShardImages, list_shards

SOURCES = ("digits", "cifar10", "cifar100", "imagefolder", "webdataset", "huggingface")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Not CIFAR-10's own statistics but ImageNet's: the published CIFAR-10 weights were trained with these.
CIFAR10_PREPROCESSING = Preprocessing(IMAGENET_MEAN, IMAGENET_STD)
DIGITS_TRAINING = 1000


def imagenet(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """ImageNet's mean and std; for grey images the averages of its three channels', 0.449 and 0.226."""
    if channels == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    mean, std = (round(sum(values) / 3, 3) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (mean,), (std,)


@dataclass(frozen=True)
class Dataset:
    """A labeled data set on the CPU, in memory or in files that are decoded when needed.

    A recipe's own function returns one, and the recipe names it as `data.source: my_module:my_images`::

        def my_images(root: str) -> crqat.Dataset:  # root is the recipe's `data.root`; leave it out if you need none
            arrays = numpy.load(f"{root}/images.npz", allow_pickle=False)
            parts = [torch.from_numpy(arrays[name]) for name in ("train_x", "train_y", "test_x", "test_y")]
            names = ("cat", "dog")
            return crqat.Dataset(*parts, names, crqat.Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)))

    What it returns is checked against what stands below before anything is trained.

    Attributes:
        train_images: uint8 of shape [N, C, H, W].
        train_labels: int64 of shape [N], each an index into `class_names`.
        test_images: uint8 of shape [M, C, H, W].
        test_labels: int64 of shape [M].
        class_names: One name per class.
        preprocessing: How the network wants its input normalized; one mean and one std per channel.
        notes: What a user should know of the data, one line each.
    """

    train_images: Tensor | StoredImages[Any]
    train_labels: Tensor
    test_images: Tensor | StoredImages[Any]
    test_labels: Tensor
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    notes: tuple[str, ...] = ()


def of_recipe(config: DataConfig, progress: Progress = quiet) -> Dataset:
    """The data set of a recipe's `data` section, with the section's own normalization if it has one.

    Raises:
        UsageError: As `load`, or mean and std do not fit the images.
        ToolError: As `load`.
    """
    dataset = load(config.source, config.root, config.download, config=config, progress=progress)
    if config.mean is None and config.std is None:
        return dataset
    own = replace(
        dataset.preprocessing,
        mean=config.mean or dataset.preprocessing.mean,
        std=config.std or dataset.preprocessing.std,
    )
    dataset = replace(dataset, preprocessing=own)
    validate(dataset, "data.mean and data.std")
    return dataset


def load(
    source: str,
    root: str | None,
    download: bool,
    key: str = "data.source",
    config: DataConfig | None = None,
    progress: Progress = quiet,
) -> Dataset:
    """The data set that a recipe names.

    Args:
        source: "digits", "cifar10", "cifar100", "imagefolder", "webdataset", "huggingface", "huggingface:NAME" or
            "package.module:function". The function is called with `root` if it has a parameter of that name, else
            without arguments, and returns a `Dataset`.
        root: Folder of an on-disk source; None is "data/cifar10" for "cifar10" and likewise for "cifar100".
        download: Fetch "cifar10", "cifar100" or "huggingface:NAME" into `root` if it is not there.
        key: The recipe's key that `source` stands under, for messages.
        config: How stored images are decoded, their channels, and the columns of "huggingface".
        progress: Told of decoded images.

    Raises:
        UsageError: The source is unknown, missing, damaged or not a valid `Dataset`.
        ToolError: The download failed, files cannot be read or change meanwhile, or a package is missing.
    """
    config = config or DataConfig(source)
    if source == "digits":
        dataset = _digits()
    elif source in ("cifar10", "cifar100"):
        dataset = _cifar(source, user_path(root or f"data/{source}", "data.root"), download)
        dataset = grey(dataset) if config.channels == 1 else dataset
    elif source == "imagefolder":
        dataset = _imagefolder(root, config, progress)
    elif source == "webdataset":
        dataset = _webdataset(root, config, progress)
    elif source == "huggingface" or source.startswith("huggingface:"):
        dataset = _huggingface(source, root, download, config, progress)
    elif ":" in source:
        dataset = _from_function(source, root, key)
    else:
        near = difflib.get_close_matches(source, SOURCES, n=1)
        hint = f'; did you mean "{near[0]}"?' if near else ""
        known = ", ".join(f'"{name}"' for name in SOURCES)
        msg = f'{key}: "{source}" is none of {known}, "package.module:function"{hint}'
        raise UsageError(msg)
    validate(dataset, f"{key}: {source}")
    found = doubts(dataset)
    for doubt in found:
        progress("images", 0, len(dataset.train_images), f"warning: {doubt}")
    return replace(dataset, notes=(*dataset.notes, *found))


def grey(dataset: Dataset) -> Dataset:
    """An RGB data set in memory as grey images, by the luma that Pillow takes for files."""

    def luma(images: Tensor | StoredImages[Any]) -> Tensor:
        red, green, blue = (images[:][:, index].int() for index in range(3))
        return ((19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16).to(torch.uint8)[:, None]

    train, test = luma(dataset.train_images), luma(dataset.test_images)
    own = replace(dataset.preprocessing, mean=imagenet(1)[0], std=imagenet(1)[1])
    return replace(dataset, train_images=train, test_images=test, preprocessing=own)


def normalization_note(config: DataConfig, preprocessing: Preprocessing) -> str | None:
    """What the images are normalized with where the recipe does not say it; None where it, or its function, does."""
    missing = [key for key in ("mean", "std") if getattr(config, key) is None]
    if not missing or (":" in config.source and not config.source.startswith("huggingface:")):
        return None
    keys = " and ".join(f"data.{key}" for key in missing)
    published = (preprocessing.mean, preprocessing.std) == imagenet(preprocessing.channels)
    mean, std = ("/".join(f"{value:.4g}" for value in values) for values in (preprocessing.mean, preprocessing.std))
    whose = "ImageNet's" if published else f"those of {config.source}"
    return (
        f"{keys} not given: images are normalized by {whose}, mean {mean}, std {std}; weights that were trained with "
        "others need theirs"
    )


def load_unlabeled(source: str, config: DataConfig, labeled: Dataset) -> Dataset:
    """The recipe's `data.unlabeled`: its training images go through the same network as the labeled ones.

    Raises:
        UsageError: As `load`, or the images' shape is not that of the labeled images.
        ToolError: As `load`.
    """
    dataset = load(source, config.root, config.download, "data.unlabeled", config)
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
    require(isinstance(preprocessing, Preprocessing), "preprocessing must be an crqat.core.preprocessing.Preprocessing")
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
    """Whether a field of labels holds what can only be images, and a field of images what can only be labels."""
    labels = [value for value in (dataset.train_labels, dataset.test_labels) if isinstance(value, Tensor)]
    images = [value for value in (dataset.train_images, dataset.test_images) if isinstance(value, Tensor)]
    return any(value.ndim > 2 for value in labels) and any(value.ndim == 1 for value in images)


def _type_hint(value: Tensor, ndim: int) -> str:
    """What to do about images or labels of another type, for a message; "" where that is not known."""
    if not value.numel():
        return ""
    if ndim == 1:
        if value.ndim == 2 and value.shape[1] > 1:
            return "; labels are class numbers: labels.argmax(1), if these are one per class"
        return "" if value.is_floating_point() and bool((value % 1 != 0).any()) else "; convert them: labels.long()"
    if not value.is_floating_point():
        return "; images are bytes, 0..255: images.to(torch.uint8), if they are in that range"
    low, high = float(value.min()), float(value.max())
    if low < 0:
        return f" from {low:.3g} to {high:.3g}; give the bytes before normalization, which `preprocessing` describes"
    scaled = "(images * 255).round()" if high <= 1 else "images.round()"
    return f" from {low:.3g} to {high:.3g}; images are bytes, 0..255: {scaled}.to(torch.uint8)"


def doubts(dataset: Dataset) -> tuple[str, ...]:
    """What of a valid data set is probably a mistake, one line each."""
    found = []
    train, test = len(dataset.train_images), len(dataset.test_images)
    if test > train:
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
    absent = sorted(set(dataset.test_labels.tolist()) - set(dataset.train_labels.tolist()))
    if absent:
        names = ", ".join(dataset.class_names[label] for label in absent[:3])
        found.append(f"{len(absent)} classes of the test images have no training image ({names})")
    return tuple(found)


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
    except (Exception, SystemExit) as error:  # the module is the user's: whatever it raises is why
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        msg = f"{key}: cannot import {module_name!r} ({reason}); install it or run in the folder it is in"
        raise UsageError(msg) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        msg = f"{key}: module {module_name!r} ({module.__file__}) has no function {function_name!r}"
        raise UsageError(msg)
    return function  # type: ignore[no-any-return]


def call_function(function: Callable[..., Any], name: str, key: str, arguments: dict[str, Any]) -> Any:
    """Call a recipe's function.

    Raises:
        UsageError: Its parameters do not fit, or it raises something; the message has the line of the function's file.
    """
    try:
        inspect.signature(function).bind(**arguments)
    except (TypeError, ValueError) as error:
        call = ", ".join(f"{argument}=" for argument in arguments)
        msg = f"{key}: {name} must be callable as {name.partition(':')[2]}({call}) ({error})"
        raise UsageError(msg) from error
    try:
        return function(**arguments)
    except (CrqatError, MemoryError):
        raise
    except Exception as error:  # the function is the user's
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
        own = inspect.getsourcefile(inspect.unwrap(function)) if callable(function) else None
        frame = next((frame for frame in reversed(frames) if frame.filename == own), frames[-1] if frames else None)
        where = f", {frame.filename}:{frame.lineno}" if frame else ""
        msg = f"{key}: {name} raised {type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"
        raise UsageError(msg) from error


def _from_function(source: str, root: str | None, key: str) -> Dataset:
    function = import_function(source, key)
    takes_root = "root" in inspect.signature(function).parameters
    folder = None if root is None else str(user_path(root, "data.root")) if root.startswith("~") else root
    dataset = call_function(function, source, key, {"root": folder} if takes_root else {})
    if not isinstance(dataset, Dataset):
        msg = f"{key}: {source} must return a crqat.train.data.sources.Dataset, got {type(dataset).__name__}"
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


def _cifar(name: str, root: Path, download: bool) -> Dataset:
    # Imported here because other sources do without torchvision, which takes a second.
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
            # These files were pickled by a numpy of 2009; newer ones warn of how they spell a dtype.
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


def _imagefolder(root: str | None, config: DataConfig, progress: Progress) -> Dataset:
    if root is None:
        msg = "data.root: imagefolder needs it: the folder with train/CLASS/* and test/CLASS/*"
        raise UsageError(msg)
    names, train, test, left_out = list_folder(user_path(root, "data.root"))
    size, crop = config.size or FOLDER_SIZE, config.crop or FOLDER_CROP
    notes: tuple[str, ...] = ()
    if left_out:
        notes = (f"left out of {root}: {left_out}",)
        progress("folder", 1, 1, notes[0])
    same = duplicates(train, test)
    if same:
        notes += (
            f"{len(same)} of {len(test)} test images are training images too, byte for byte, first {same[0][1]} and "
            f"{same[0][0]}: the test accuracy is not that of unseen images",
        )
        progress("images", 0, len(train), f"warning: {notes[-1]}")
    channels = config.channels or 3
    parts = [FolderImages(files, size, crop, config.convert, channels=channels) for files in (train, test)]
    labels = [torch.tensor([file.label for file in files], dtype=torch.int64) for files in (train, test)]
    return _stored(names, parts, labels, config, progress, notes)


def _webdataset(root: str | None, config: DataConfig, progress: Progress) -> Dataset:
    if root is None:
        msg = "data.root: webdataset needs it: the folder with train-*.tar and test-*.tar"
        raise UsageError(msg)
    names, train, test = list_shards(user_path(root, "data.root"), progress)
    size, crop, channels = config.size or FOLDER_SIZE, config.crop or FOLDER_CROP, config.channels or 3
    parts = [ShardImages(members, size, crop, config.convert, channels=channels) for members in (train, test)]
    return _stored(names, parts, [torch.from_numpy(members.labels) for members in (train, test)], config, progress)


def _huggingface(source: str, root: str | None, download: bool, config: DataConfig, progress: Progress) -> Dataset:
    _, _, name = source.partition(":")
    if root is None:
        msg = "data.root: huggingface needs it: a folder that save_to_disk of a DatasetDict wrote, or to fetch it into"
        raise UsageError(msg)
    folder = user_path(root, "data.root")
    if name and download and not folder.exists():
        fetch(name, folder)
    names, train, test = open_saved(folder, config.image_column, config.label_column)
    size, crop, channels = config.size or FOLDER_SIZE, config.crop or FOLDER_CROP, config.channels or 3
    parts = [TableImages(rows, size, crop, config.convert, channels=channels) for rows in (train, test)]
    return _stored(names, parts, [torch.from_numpy(rows.labels) for rows in (train, test)], config, progress)


def _stored(
    names: tuple[str, ...],
    parts: Sequence[StoredImages[Any]],
    labels: Sequence[Tensor],
    config: DataConfig,
    progress: Progress,
    notes: tuple[str, ...] = (),
) -> Dataset:
    """The data set of a training and a test part, in memory as far as they fit."""
    interpolation = config.interpolation or "bilinear"
    parts = [replace(part, interpolation=interpolation) for part in parts]
    train, test = (
        decode(images, f"{part} images", progress) for images, part in zip(parts, ("training", "test"), strict=True)
    )
    preprocessing = Preprocessing(*imagenet(parts[0].channels), parts[0].size, parts[0].crop, interpolation)
    return Dataset(train, labels[0], test, labels[1], names, preprocessing, notes)


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
