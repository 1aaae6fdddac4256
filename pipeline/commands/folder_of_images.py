"""Detects how a folder stores its images and which `data` section of a recipe reads them; for `crqat init`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crqat.core.errors import UsageError
from crqat.core.field_bounds import user_path
from crqat.core.progress import Progress
from crqat.train.config import FOLDER_SIZE

if TYPE_CHECKING:
    from crqat.train.data.imagefolder import ImageFile
    from crqat.train.data.imagelist import ImageList
    from crqat.train.data.streaming import StoredImages

# Number of files whose image sizes are read.
_HEADERS = 1000
# Fewest images that are accepted as a data set.
_FEWEST = 20


@dataclass(frozen=True)
class Folder:
    """Contents of a folder of images.

    Attributes:
        data: Entries of the recipe's `data` section for this folder.
        classes: Class names.
        sides: Number of images of each (width, height), counted on a sample of the images; empty if no sizes were
            read.
        modes: Number of images of each Pillow mode, counted on the same sample.
        parts: Function of `size`, `crop`, `convert` and `channels`, as in a recipe's `data` section; returns the
            training images and the test images.
        labels: Labels of the test images.
        listed: Image list to write for `data.image_list`; None if the recipe needs none.
    """

    data: dict[str, Any]
    classes: tuple[str, ...]
    sides: Counter[tuple[int, int]]
    modes: Counter[str]
    parts: Callable[[int, int, bool, int], tuple[StoredImages[Any], StoredImages[Any]]]
    labels: Sequence[int]
    listed: ImageList | None = None


def read(images: Path, image_list: Path, progress: Progress) -> Folder:
    """Detect how a folder stores its images and return its contents.

    Args:
        images: Folder as given with `--images`.
        image_list: Path for `data.image_list`, in case that the recipe needs one; the file is not written here.
        progress: Callback that reports which files of the folder are ignored.

    Raises:
        UsageError: `images` is not a folder, or stores its images in a way that no `data.source` reads.
    """
    root = user_path(str(images), "--images")
    if not root.is_dir():
        msg = f"--images: {root} is not a folder"
        raise UsageError(msg)
    if (root / "dataset_dict.json").is_file():
        return _table(images, root)
    held_out = [name for name in ("test", "val") if (root / name).is_dir()]
    if (root / "train").is_dir() and held_out:
        return _split_folders(images, root, progress)
    if any(root.glob("train-*.tar")):
        return _shards(images, root, progress)
    if root.name in ("train", "test", "val") and (root.resolve().parent / "train").is_dir():
        msg = f"--images: {root} is only one part of a data set; give the folder of all parts, {root.resolve().parent}"
        raise UsageError(msg)
    return _class_folders(images, root, image_list)


def _split_folders(images: Path, root: Path, progress: Progress) -> Folder:
    from crqat.train.data.imagefolder import list_folder

    names, train, test, left_out = list_folder(root)
    if left_out:
        progress("folder", 1, 1, f"ignored in {root}: {left_out}")
    return _of_files({"source": "imagefolder", "root": str(images)}, names, train, test)


def _class_folders(images: Path, root: Path, image_list: Path) -> Folder:
    """Return the contents of a folder of class folders; a random half of each class trains, the other half tests."""
    import torch

    from crqat.train.data.imagefolder import list_images
    from crqat.train.data.imagelist import ImageList, files_of

    paths = [file.path.relative_to(root) for file in list_images(root, "--images")]
    loose = next((path for path in paths if len(path.parts) == 1), None)
    if loose is not None:
        msg = (
            f"--images: {root} has images outside of class folders, such as {loose}; give one folder for each class, "
            "or use `crqat quantize`, which needs no labels"
        )
        raise UsageError(msg)
    by_class: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        by_class[path.parts[0]].append(str(path))
    if len(by_class) < 2 or len(paths) < _FEWEST:
        msg = (
            f"--images: {root} has {len(paths)} images in {len(by_class)} class folders; at least {_FEWEST} images of "
            "two classes are needed"
        )
        raise UsageError(msg)
    names, generator = tuple(sorted(by_class)), torch.Generator().manual_seed(0)
    parts: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for label, name in enumerate(names):
        own = by_class[name]
        order = torch.randperm(len(own), generator=generator).tolist()
        for place, index in enumerate(order):
            parts[place % 2][own[index]] = label
    train, test = (dict(sorted(part.items())) for part in parts)
    listed = ImageList(list(names), train, test)
    data = {"source": "imagelist", "root": str(images), "image_list": str(image_list)}
    return _of_files(data, names, files_of(root, train), files_of(root, test), listed)


def _of_files(
    data: dict[str, Any],
    names: tuple[str, ...],
    train: tuple[ImageFile, ...],
    test: tuple[ImageFile, ...],
    listed: ImageList | None = None,
) -> Folder:
    from crqat.train.data.imagefolder import FolderImages

    sides: Counter[tuple[int, int]] = Counter()
    modes: Counter[str] = Counter()
    for size, mode in map(_header, spread(train, _HEADERS)):
        sides[size] += 1
        modes[mode] += 1

    def parts(size: int, crop: int, convert: bool, channels: int) -> tuple[StoredImages[Any], StoredImages[Any]]:
        made = [FolderImages(files, size, crop, convert, channels=channels) for files in (train, test)]
        return made[0], made[1]

    return Folder(data, names, sides, modes, parts, [file.label for file in test], listed)


def sides_of(files: Sequence[ImageFile]) -> Counter[tuple[int, int]]:
    """Count the images of each (width, height) in a sample of at most 1000 files, spread evenly over `files`."""
    return Counter(size for size, _ in map(_header, spread(files, _HEADERS)))


def common_side(sides: Iterable[tuple[int, int]]) -> int | None:
    """Return the shorter side in pixels if all images share it and it is at most `FOLDER_SIZE`; None otherwise."""
    shorter = {min(size) for size in sides}
    return max(shorter) if len(shorter) == 1 and max(shorter) <= FOLDER_SIZE else None


def _header(file: ImageFile) -> tuple[tuple[int, int], str]:
    """Return ((width, height), Pillow mode) of an image file without decoding it; EXIF rotation is applied."""
    from PIL import Image

    from crqat.core.image_file import formats

    try:
        with Image.open(file.path, formats=formats()) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) >= 5
            return (height, width) if turned else (width, height), image.mode
    except Exception as error:  # what a reader raises on a damaged file depends on the file's bytes
        msg = f"{file.path}: cannot be read as an image ({type(error).__name__}); replace or remove it"
        raise UsageError(msg) from error


def _shards(images: Path, root: Path, progress: Progress) -> Folder:
    from crqat.train.data.webdataset import ShardImages, list_shards

    names, train, test = list_shards(root, progress)

    def parts(size: int, crop: int, convert: bool, channels: int) -> tuple[StoredImages[Any], StoredImages[Any]]:
        made = [ShardImages(members, size, crop, convert, channels=channels) for members in (train, test)]
        return made[0], made[1]

    data = {"source": "webdataset", "root": str(images)}
    return Folder(data, names, Counter(), Counter(), parts, test.labels.tolist())


def _table(images: Path, root: Path) -> Folder:
    from crqat.train.data.huggingface import TableImages, open_saved

    names, train, test = open_saved(root, None, None)

    def parts(size: int, crop: int, convert: bool, channels: int) -> tuple[StoredImages[Any], StoredImages[Any]]:
        made = [TableImages(rows, size, crop, convert, channels=channels) for rows in (train, test)]
        return made[0], made[1]

    data = {"source": "huggingface", "root": str(images)}
    return Folder(data, names, Counter(), Counter(), parts, test.labels.tolist())


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """Return at most `count` items, spread evenly over all items."""
    return [items[index * len(items) // count] for index in range(count)] if len(items) > count else list(items)
