"""Loads images from class folders, root/train/CLASS/... and root/test/CLASS/..."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from crqat.core.errors import ToolError, UsageError
from crqat.core.folders import walk
from crqat.core.image_file import endings, load_image
from crqat.train.data.streaming import StoredImages

USUAL_ENDINGS = ".jpg, .png, .webp, .bmp and what else Pillow reads"


@dataclass(frozen=True)
class ImageFile:
    """An image file with its label, and its size and modification time when the folder was listed."""

    path: Path
    label: int
    size: int
    modified: int


class FolderImages(StoredImages[tuple[ImageFile, ...]]):
    """Images in ordinary files, decoded when they are needed."""

    def _items_of(self, chosen: Tensor) -> tuple[ImageFile, ...]:
        return tuple(self.items[index] for index in chosen.tolist())

    def _decode(self, index: int) -> Any:
        file = self.items[index]
        check_unchanged(file.path, (file.size, file.modified))
        return load_image(file.path, self.size, self.crop, self.convert, self.channels, self.interpolation)


def check_unchanged(path: Path, state: tuple[int, int]) -> None:
    """Check that a file still has `state`, the size and modification time that `file_state` returned earlier.

    Raises:
        ToolError: The file is gone or has changed.
    """
    if file_state(path) != state:
        msg = f"{path}: changed while the data set was read; leave the folder alone and start again"
        raise ToolError(msg)


def file_state(path: Path) -> tuple[int, int]:
    """Return a file's size in bytes and modification time in ns.

    Raises:
        ToolError: The file cannot be read.
    """
    try:
        status = path.stat()
    except OSError as error:
        msg = f"{path}: cannot be read any more: {error.strerror}; leave its folder unchanged during the run"
        raise ToolError(msg) from error
    return status.st_size, status.st_mtime_ns


def list_folder(root: Path) -> tuple[tuple[str, ...], tuple[ImageFile, ...], tuple[ImageFile, ...], str]:
    """Return class names (sorted), training files and test files of a data set, and what was left out.

    Subfolders of a class are included, and links to files and folders are followed. The last of the four values says in
    one line what was left out: hidden files and folders, files without an image's ending, files beside the class
    folders. It is "" if nothing was.

    Raises:
        UsageError: The folders are missing, a class is empty, or the test part has a class that the training part
            lacks.
        ToolError: A folder cannot be read.
    """
    train = root / "train"
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if not train.is_dir() or test is None:
        msg = f"data.root: imagefolder wants {root}/train/CLASS/* and {root}/test/CLASS/* (or val/), with image files"
        raise UsageError(msg + _layout_hint(root))
    left_out = _LeftOut()
    names, own = _classes(train, left_out), _classes(test, left_out)
    unknown = [name for name in own if name not in names]
    if unknown:
        # A correct split does not have all training classes and more in its test part.
        swapped = "; or are the two parts swapped?" if set(names) < set(own) else ""
        msg = f"{test / unknown[0]}: a class that {train} does not have; remove it or add training images{swapped}"
        raise UsageError(msg)
    if test.name == "test" and (root / "val").is_dir():
        left_out.add("folder beside test", root / "val")
    files = [_files(part, names, present, left_out) for part, present in ((train, names), (test, own))]
    return names, files[0], files[1], str(left_out)


def list_images(root: Path, key: str) -> tuple[ImageFile, ...]:
    """Return all image files in a folder and its subfolders, sorted, each with label 0; hidden ones are left out.

    Args:
        root: The folder.
        key: The recipe's key of the folder; used in messages.

    Raises:
        UsageError: The folder does not exist, or has no images.
        ToolError: A folder cannot be read.
    """
    if not root.is_dir():
        msg = f"{key}: {root} is not a folder"
        raise UsageError(msg)
    paths = sorted(
        parent / name
        for parent, found, _, _ in walk(root, hidden=False, refuse=_refuse)
        for name in found
        if not name.startswith(".") and Path(name).suffix.lower() in endings()
    )
    if not paths:
        msg = f"{key}: {root} has no images ({USUAL_ENDINGS})"
        raise UsageError(msg)
    return tuple(ImageFile(path, 0, *_state_of(path)) for path in paths)


def _refuse(error: OSError) -> None:
    msg = f"{error.filename}: cannot be read: {error.strerror}"
    raise ToolError(msg) from error


def _layout_hint(root: Path) -> str:
    """Return, for a message, what the folder seems to hold instead of a training and a test part."""
    if not root.is_dir():
        return "; there is no such folder"
    if root.name in ("train", "test", "val") and (root.parent / "train").is_dir():
        return f"; set data.root to {root.parent}"
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    inside = next((path for path in folders if (path / "train").is_dir()), None)
    if inside is not None:
        return f"; {inside}/train exists: set data.root to {inside}, or move the class folders into train and test"
    names = ", ".join(path.name for path in folders[:5])
    return f"; {root} has {names}{', ...' if len(folders) > 5 else ''}" if folders else f"; {root} has no folders"


class _LeftOut:
    """Counts the skipped files and folders of a data set by kind, and keeps the first of each kind."""

    # Maps each kind to its plural.
    KINDS: ClassVar[dict[str, str]] = {
        "hidden file": "hidden files",
        "hidden folder": "hidden folders",
        "file with another ending": "files with other endings",
        "file beside the class folders": "files beside the class folders",
        "folder beside test": "folders beside test",
        "link to a folder that is read already": "links to folders that are read already",
    }

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, Path] = {}
        self._endings: Counter[str] = Counter()

    def add(self, kind: str, path: Path) -> None:
        """Count one skipped file or folder; `kind` is one of KINDS."""
        self._counts[kind] += 1
        self._first.setdefault(kind, path)
        if kind == "file with another ending":
            self._endings[path.suffix.lower() or "without one"] += 1

    def __str__(self) -> str:
        """Return all counts on one line; "" if nothing was skipped."""
        parts = []
        for kind, count in self._counts.items():
            endings = ", ".join(f"{number} {ending}" for ending, number in self._endings.most_common(5))
            endings = f"{endings}; " if kind == "file with another ending" else ""
            parts.append(f"{count} {kind if count == 1 else self.KINDS[kind]} ({endings}first {self._first[kind]})")
        return ", ".join(parts)


def _classes(folder: Path, left_out: _LeftOut) -> tuple[str, ...]:
    try:
        paths = sorted(folder.iterdir())
        real = folder.resolve()
        names = []
        for path in paths:
            if path.name.startswith("."):
                left_out.add("hidden folder" if path.is_dir() else "hidden file", path)
            elif not path.is_dir():
                left_out.add("file beside the class folders", path)
            elif real.is_relative_to(path.resolve()):
                left_out.add("link to a folder that is read already", path)
            else:
                names.append(path.name)
    except OSError as error:
        msg = f"{folder}: cannot be read: {error.strerror}"
        raise ToolError(msg) from error
    if not names:
        loose = any(path.suffix.lower() in endings() for path in paths)
        fact = "its images lie in no class folders" if loose else "no class folders"
        msg = f"{folder}: {fact}; put the images of each class into a folder of its name"
        raise UsageError(msg)
    return tuple(names)


def _files(folder: Path, names: Sequence[str], present: Sequence[str], left_out: _LeftOut) -> tuple[ImageFile, ...]:
    """Return the image files of one part, sorted by path within each class.

    Args:
        folder: Folder of the part.
        names: All classes of the data set; a class's index in them is its label.
        present: Classes that have a folder in this part. A folder without images is refused.
        left_out: Counts the skipped files and folders.
    """
    by_class: dict[str, list[Path]] = {}
    reasons: dict[str, str] = {}
    for name in present:
        paths, others = [], list[tuple[str, Path]]()
        for parent, found, hidden, again in walk(folder / name, hidden=False, refuse=_refuse):
            others += [("hidden folder", parent / below) for below in hidden]
            others += [("link to a folder that is read already", parent / below) for below in again]
            for path in (parent / file for file in found):
                if path.name.startswith("."):
                    others.append(("hidden file", path))
                elif path.suffix.lower() in endings():
                    paths.append(path)
                else:
                    others.append(("file with another ending", path))
        for kind, path in others:
            left_out.add(kind, path)
        by_class[name] = sorted(paths)
        if not paths:
            only = _LeftOut()
            for kind, path in others:
                only.add(kind, path)
            reasons[name] = f"it holds only {only}" if others else "it is empty"
    if reasons:
        name, reason = next(iter(reasons.items()))
        every = len(reasons) == len(present) > 1
        what = f"{folder}: none of its {len(present)} class folders has an image" if every else ""
        what = what or f"{folder / name}: a class without images"
        remedy = "set data.root to the folder that has the images" if every else "add some or remove it"
        msg = f"{what} ({USUAL_ENDINGS}): {f'{name}: ' if every else ''}{reason}; {remedy}"
        raise UsageError(msg)
    return tuple(
        ImageFile(path, names.index(name), *_state_of(path)) for name, paths in by_class.items() for path in paths
    )


def _state_of(path: Path) -> tuple[int, int]:
    if path.is_symlink() and not path.exists():
        msg = f"{path}: a link to a file that does not exist; repair or remove it"
        raise UsageError(msg)
    return file_state(path)


def duplicates(train: Sequence[ImageFile], test: Sequence[ImageFile]) -> list[tuple[Path, Path]]:
    """Return pairs of a training and a test file with the same bytes, one pair for each such test file."""
    by_start: dict[tuple[int, bytes], list[Path]] = defaultdict(list)
    lengths = {file.size for file in test}
    for file in train:
        if file.size in lengths:
            by_start[file.size, _digest(file.path, 4096)].append(file.path)
    pairs = []
    for file in test:
        candidates = by_start.get((file.size, _digest(file.path, 4096)), ())
        own = _digest(file.path) if candidates else b""
        same = next((path for path in candidates if _digest(path) == own), None)
        if same is not None:
            pairs.append((same, file.path))
    return pairs


def _digest(path: Path, length: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.sha256(file.read(length)).digest()
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}; leave its folder unchanged during the run"
        raise ToolError(msg) from error
