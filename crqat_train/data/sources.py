"""Loads the images of a recipe: the table of sources, and each source's data set."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crqat.core.errors import UsageError
from crqat.core.field_bounds import user_path
from crqat.core.preprocessing import Preprocessing
from crqat.core.progress import Progress, quiet
from crqat.train.config import FOLDER_CROP, FOLDER_SIZE, DataConfig
from crqat.train.data import builtin, imagelist
from crqat.train.data.batches import Images
from crqat.train.data.dataset import Dataset, doubts, validate
from crqat.train.data.huggingface import TableImages, fetch, open_saved
from crqat.train.data.imagefolder import FolderImages, ImageFile, duplicates, list_folder, list_images
from crqat.train.data.streaming import StoredImages, decode
from crqat.train.data.webdataset import ShardImages, list_shards
from crqat.train.own_code import call_function, import_function

SOURCES = ("digits", "cifar10", "cifar100", "imagefolder", "imagelist", "webdataset", "huggingface")


def of_recipe(config: DataConfig, progress: Progress = quiet, in_memory: bool = True) -> Dataset:
    """Load the data set of a recipe's `data` section, with the section's own normalization if it sets one.

    `in_memory` is that of `load`.

    Raises:
        UsageError: See `load`; or mean and std do not fit the images.
        ToolError: See `load`.
    """
    dataset = load(config.source, config.root, config.download, config=config, progress=progress, in_memory=in_memory)
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
    in_memory: bool = True,
) -> Dataset:
    """Load the data set that a recipe names.

    Args:
        source: "digits", "cifar10", "cifar100", "imagefolder", "imagelist", "webdataset", "huggingface",
            "huggingface:NAME" or "package.module:function". The function returns a `Dataset`; it is called with `root`
            if it has a parameter of that name, otherwise without arguments.
        root: Folder of an on-disk source; None is "data/cifar10" for "cifar10" and "data/cifar100" for "cifar100".
        download: Download "cifar10", "cifar100" or "huggingface:NAME" into `root` if it is missing.
        key: The recipe's key of `source`; used in messages.
        config: Decoding and channels of stored images, and the columns of "huggingface".
        progress: Reports decoded images.
        in_memory: Decode images in files now, if they fit into memory; otherwise each is decoded when it is needed,
            which is faster for a few.

    Raises:
        UsageError: The source is unknown, missing, damaged or not a valid `Dataset`.
        ToolError: The download failed, files cannot be read or change while they are read, or a package is missing.
    """
    config = config or DataConfig(source)
    if source == "digits":
        dataset = builtin.digits()
    elif source in ("cifar10", "cifar100"):
        dataset = builtin.cifar(source, user_path(root or f"data/{source}", "data.root"), download)
        dataset = builtin.grey(dataset) if config.channels == 1 else dataset
    elif source == "imagefolder":
        dataset = _imagefolder(root, config, progress)
    elif source == "imagelist":
        dataset = _imagelist(root, config, progress)
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
        msg = f'{key}: "{source}" is not a data source; use {known} or "package.module:function"{hint}'
        raise UsageError(msg)
    if in_memory:
        dataset = _decoded(dataset, progress)
    validate(dataset, f"{key}: {source}")
    found = doubts(dataset, listed=source == "imagelist")
    for doubt in found:
        progress("images", 0, len(dataset.train_images), f"warning: {doubt}")
    return replace(dataset, notes=(*dataset.notes, *found))


def normalization_note(config: DataConfig, preprocessing: Preprocessing) -> str | None:
    """Describe the default normalization if neither the recipe nor its data function sets one; otherwise None."""
    missing = [key for key in ("mean", "std") if getattr(config, key) is None]
    if not missing or (":" in config.source and not config.source.startswith("huggingface:")):
        return None
    keys = " and ".join(f"data.{key}" for key in missing)
    published = (preprocessing.mean, preprocessing.std) == builtin.imagenet(preprocessing.channels)
    mean, std = ("/".join(f"{value:.4g}" for value in values) for values in (preprocessing.mean, preprocessing.std))
    whose = "ImageNet's values" if published else f"the values of {config.source}"
    return (
        f"{keys} not given: images are normalized by {whose}, mean {mean}, std {std}; if your weights were trained "
        "with another mean and std, set these"
    )


def load_unlabeled(source: str, config: DataConfig, labeled: Dataset) -> Images:
    """Load the unlabeled images of a recipe, which its `data.unlabeled` names.

    These are the source's training images, or all images of the folder `data.unlabeled_root`. They must have the shape
    of the labeled images. The result is a uint8 tensor of shape [N, C, H, W], or `StoredImages`, which are decoded on
    demand.

    Raises:
        UsageError: See `load`; or the images have another shape than the labeled images.
        ToolError: See `load`.
    """
    if source == "imagefolder" and config.unlabeled_root is not None:
        images = _unlabeled_folder(user_path(config.unlabeled_root, "data.unlabeled_root"), config)
    else:
        root = config.unlabeled_root or config.root
        images = load(source, root, config.download, "data.unlabeled", config).train_images
    shape, expected = list(images.shape[1:]), list(labeled.train_images.shape[1:])
    if shape != expected:
        msg = f"data.unlabeled: images of {source} have shape {shape}, those of data.source {expected}; resize them"
        raise UsageError(msg)
    return images


def _unlabeled_folder(root: Path, config: DataConfig) -> Images:
    """Return all images in a folder and its subfolders."""
    files = list_images(root, "data.unlabeled_root")
    size, crop = config.size or FOLDER_SIZE, config.crop or FOLDER_CROP
    images = FolderImages(files, size, crop, config.convert, channels=config.channels or 3)
    images = replace(images, interpolation=config.interpolation or "bilinear")
    return decode(images, "unlabeled images", quiet)


def _from_function(source: str, root: str | None, key: str) -> Dataset:
    function = import_function(source, key)
    takes_root = "root" in inspect.signature(function).parameters
    folder = None if root is None else str(user_path(root, "data.root")) if root.startswith("~") else root
    dataset = call_function(function, source, key, {"root": folder} if takes_root else {})
    if not isinstance(dataset, Dataset):
        msg = f"{key}: {source} must return a crqat.train.data.dataset.Dataset, got {type(dataset).__name__}"
        raise UsageError(msg)
    return dataset


def _imagefolder(root: str | None, config: DataConfig, progress: Progress) -> Dataset:
    if root is None:
        msg = "data.root: missing; imagefolder needs the folder with train/CLASS/* and test/CLASS/*"
        raise UsageError(msg)
    names, train, test, left_out = list_folder(user_path(root, "data.root"))
    size, crop = config.size or FOLDER_SIZE, config.crop or FOLDER_CROP
    notes: tuple[str, ...] = ()
    if left_out:
        notes = (f"ignored in {root}: {left_out}",)
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
    return _stored(names, parts, labels, config, notes)


def _imagelist(root: str | None, config: DataConfig, progress: Progress) -> Dataset:
    if root is None or config.image_list is None:
        msg = (
            "data.image_list: missing, or data.root is; imagelist needs both: the JSON file of the list and the folder "
            "of its images"
        )
        raise UsageError(msg)
    found = imagelist.read(user_path(config.image_list, "data.image_list"))
    size, crop, channels = config.size or FOLDER_SIZE, config.crop or FOLDER_CROP, config.channels or 3
    files = [imagelist.files_of(user_path(root, "data.root"), part) for part in (found.train, found.test)]
    parts = [FolderImages(own, size, crop, config.convert, channels=channels) for own in files]
    labels = [torch.tensor([file.label for file in own], dtype=torch.int64) for own in files]
    notes: tuple[str, ...] = ()
    if found.labels_of:
        notes = (f"the labels are the answers of {found.labels_of}: accuracy is the agreement with it",)
    return _stored(tuple(found.classes), parts, labels, config, notes)


def labeled_folder(
    folder: Path, key: str, dataset: Dataset, config: DataConfig, progress: Progress
) -> tuple[Images, Tensor]:
    """Load class folders as images and labels, decoded and numbered like those of a given data set.

    Args:
        folder: Contains a folder for each class, or for some of them.
        key: Option or key that names the folder; used in messages.
        dataset: Data set whose classes and image shape are required.
        config: Decoding of stored images.
        progress: Reports decoded images.

    Raises:
        UsageError: There are no images, or they are of other classes.
        ToolError: An image cannot be read.
    """
    folder = user_path(str(folder), key)
    files = list_images(folder, key)
    known = {name: index for index, name in enumerate(dataset.class_names)}
    names = [file.path.relative_to(folder).parts[0] for file in files]
    strange = next((name for name in names if name not in known), None)
    if strange is not None:
        some = ", ".join(dataset.class_names[:3])
        msg = f"{key}: {folder} has {strange}, which is not a class of the recipe's data ({some}, ...)"
        raise UsageError(msg)
    decoded = _like(dataset, files, config, progress)
    if decoded.shape[1:] != dataset.train_images.shape[1:]:
        shapes = f"{list(decoded.shape[1:])}, those of the recipe's data {list(dataset.train_images.shape[1:])}"
        msg = f"{key}: the images of {folder} have shape {shapes}; make both equal by data.size and data.crop"
        raise UsageError(msg)
    return decoded, torch.tensor([known[name] for name in names], dtype=torch.int64)


def listed_for_judging(dataset: Dataset, config: DataConfig, progress: Progress) -> tuple[Images, Tensor] | None:
    """Return the images that an image list reserves for `crqat advise`, and their labels; None if there are none.

    Raises:
        UsageError: See `load`.
        ToolError: See `load`.
    """
    if config.image_list is None or config.root is None:
        return None
    found = imagelist.read(user_path(config.image_list, "data.image_list"))
    files = imagelist.files_of(user_path(config.root, "data.root"), found.judging)
    return (_like(dataset, files, config, progress), _labels(files)) if files else None


def _like(dataset: Dataset, files: Sequence[ImageFile], config: DataConfig, progress: Progress) -> Images:
    """Return images in files, decoded and resized like the images of a given data set."""
    own, (channels, height, _) = dataset.preprocessing, dataset.train_images.shape[1:]
    images = FolderImages(tuple(files), own.size or height, own.crop or height, config.convert, channels=channels)
    return decode(replace(images, interpolation=own.interpolation), "judging images", progress)


def _labels(files: Sequence[ImageFile]) -> Tensor:
    return torch.tensor([file.label for file in files], dtype=torch.int64)


def _webdataset(root: str | None, config: DataConfig, progress: Progress) -> Dataset:
    if root is None:
        msg = "data.root: missing; webdataset needs the folder with train-*.tar and test-*.tar"
        raise UsageError(msg)
    names, train, test = list_shards(user_path(root, "data.root"), progress)
    size, crop, channels = config.size or FOLDER_SIZE, config.crop or FOLDER_CROP, config.channels or 3
    parts = [ShardImages(members, size, crop, config.convert, channels=channels) for members in (train, test)]
    return _stored(names, parts, [torch.from_numpy(members.labels) for members in (train, test)], config)


def _huggingface(source: str, root: str | None, download: bool, config: DataConfig, progress: Progress) -> Dataset:
    _, _, name = source.partition(":")
    if root is None:
        msg = (
            "data.root: missing; huggingface needs a folder written by a DatasetDict's save_to_disk, or a folder to "
            "download to"
        )
        raise UsageError(msg)
    folder = user_path(root, "data.root")
    if name and download and not folder.exists():
        fetch(name, folder)
    names, train, test = open_saved(folder, config.image_column, config.label_column)
    size, crop, channels = config.size or FOLDER_SIZE, config.crop or FOLDER_CROP, config.channels or 3
    parts = [TableImages(rows, size, crop, config.convert, channels=channels) for rows in (train, test)]
    return _stored(names, parts, [torch.from_numpy(rows.labels) for rows in (train, test)], config)


def _stored(
    names: tuple[str, ...],
    parts: Sequence[StoredImages[Any]],
    labels: Sequence[Tensor],
    config: DataConfig,
    notes: tuple[str, ...] = (),
) -> Dataset:
    """Build the data set of a training and a test part, whose images are not decoded yet."""
    interpolation = config.interpolation or "bilinear"
    train, test = (replace(part, interpolation=interpolation) for part in parts)
    preprocessing = Preprocessing(*builtin.imagenet(parts[0].channels), parts[0].size, parts[0].crop, interpolation)
    return Dataset(train, labels[0], test, labels[1], names, preprocessing, notes)


def _decoded(dataset: Dataset, progress: Progress) -> Dataset:
    """Decode the images of each part of a data set that are in files, if they fit into memory."""
    train, test = (
        decode(images, f"{part} images", progress) if isinstance(images, StoredImages) else images
        for images, part in ((dataset.train_images, "training"), (dataset.test_images, "test"))
    )
    return replace(dataset, train_images=train, test_images=test)
