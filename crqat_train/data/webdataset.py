"""Reads WebDataset shards, which are tar archives with images, in any order by the images' offsets in the archive.

A shard is indexed once: its headers and labels are read, its images are skipped. Nothing is extracted, and no name in
an archive is used as a path.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from torch import Tensor

from crqat.core.errors import CrqatError, ToolError, UsageError
from crqat.core.image_file import MAX_FILE_BYTES, decode_image, endings
from crqat.core.progress import Progress
from crqat.train.data.imagefolder import USUAL_ENDINGS, check_unchanged, file_state
from crqat.train.data.streaming import StoredImages

CLASSES = "classes.txt"
PARTS = {"train": ("train",), "test": ("test", "val", "validation")}
_BLOCK = tarfile.BLOCKSIZE
# Largest header. A long name or a pax header is read into memory, and an archive may claim any length.
_MAX_HEADER = 64 * 2**10
_MAX_LABEL = 32


@dataclass(frozen=True)
class Shard:
    """An archive's state when it was indexed: size in bytes, modification time in ns."""

    path: Path
    state: tuple[int, int]


@dataclass(frozen=True)
class Members:
    """Location and label of each training or each test image.

    The fields are arrays, not a list of objects, because every worker process would get a copy of millions of objects.

    Attributes:
        shards: All archives.
        shard: Index of each image's archive, int32 of shape [N].
        offset: First byte of each image in its archive, int64 of shape [N].
        length: Size of each image in bytes, int32 of shape [N].
        labels: Class of each image, int64 of shape [N].
    """

    shards: tuple[Shard, ...]
    shard: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    length: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


class ShardImages(StoredImages[Members]):
    """Images in tar archives, decoded when they are needed."""

    def _items_of(self, chosen: Tensor) -> Members:
        rows, members = chosen.numpy(), self.items
        return replace(
            members,
            shard=members.shard[rows],
            offset=members.offset[rows],
            length=members.length[rows],
            labels=members.labels[rows],
        )

    def _decode(self, index: int) -> Any:
        members = self.items
        shard = members.shards[members.shard[index]]
        check_unchanged(shard.path, shard.state)
        try:
            with shard.path.open("rb") as file:
                file.seek(int(members.offset[index]) - _BLOCK)
                header, content = file.read(_BLOCK), file.read(int(members.length[index]))
        except OSError as error:
            msg = f"{shard.path}: cannot be read any more: {error.strerror}; leave its folder unchanged during the run"
            raise ToolError(msg) from error
        name = f"{shard.path}: {_shown(header[:100].split(bytes(1))[0].decode(errors='backslashreplace'))}"
        return decode_image(
            io.BytesIO(content), name, self.size, self.crop, self.convert, self.channels, self.interpolation
        )


def list_shards(root: Path, progress: Progress) -> tuple[tuple[str, ...], Members, Members]:
    """Return class names, training images and test images of the shards in a folder.

    Args:
        root: Folder of *.tar files. A shard's part is the word in its name: `train`, or `test`, `val` or `validation`.
            classes.txt names the classes, one a line; without it, they are numbers.
        progress: Reports indexed shards.

    Raises:
        UsageError: There are no shards, one is damaged, a sample lacks its image or label, or a label has no class.
        ToolError: A file cannot be read.
    """
    parts = {part: _find(root, words) for part, words in PARTS.items()}
    if not all(parts.values()):
        missing = next(part for part, paths in parts.items() if not paths)
        gz = " (uncompressed: unpack .tar.gz)" if any(root.glob("*.tar.gz")) or any(root.glob("*.tgz")) else ""
        msg = f"data.root: no {missing} shards in {root}; webdataset wants train-*.tar and test-*.tar there{gz}"
        raise UsageError(msg)
    names = _class_names(root / CLASSES)
    train = _index(parts["train"], "training shards", names, progress)
    if names is None:
        names = _numbers(train, root)
    return names, train, _index(parts["test"], "test shards", names, progress)


def _find(root: Path, words: tuple[str, ...]) -> list[Path]:
    found = sorted(root.glob("*.tar"))
    return [path for path in found if set(re.split("[^a-z]+", path.stem.lower())) & set(words)]


def _class_names(path: Path) -> tuple[str, ...] | None:
    if not path.exists():
        return None
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}"
        raise ToolError(msg) from error
    except UnicodeDecodeError as error:
        msg = f"{path}: not UTF-8; save it as UTF-8, with one class name a line"
        raise UsageError(msg) from error
    if not names or "" in names or len(set(names)) < len(names):
        msg = f"{path}: write one class name a line, the first for label 0, without empty or repeated names"
        raise UsageError(msg)
    return names


def _numbers(train: Members, root: Path) -> tuple[str, ...]:
    """Return the class numbers from 0 up to the largest label as names.

    A number that no label has is refused, because otherwise one wrong label could make a million classes.
    """
    present = np.unique(train.labels)
    if present[-1] != len(present) - 1:
        gap = int(np.flatnonzero(present != np.arange(len(present)))[0])
        msg = (
            f"{root}: labels go up to {present[-1]}, but no training image has label {gap}; number the classes from 0 "
            f"without gaps, or name them in {CLASSES}"
        )
        raise UsageError(msg)
    return tuple(str(label) for label in range(len(present)))


def _index(paths: list[Path], task: str, names: tuple[str, ...] | None, progress: Progress) -> Members:
    shards: list[Shard] = []
    numbers: list[npt.NDArray[np.int32]] = []
    columns: list[npt.NDArray[np.int64]] = []
    for number, path in enumerate(paths):
        shards.append(Shard(path, file_state(path)))
        samples = np.array(list(_samples(path, names)), dtype=np.int64).reshape(-1, 3)
        columns.append(samples)
        numbers.append(np.full(len(samples), number, dtype=np.int32))
        progress(task, number + 1, len(paths))
    offset, length, labels = np.concatenate(columns).T.copy()
    if not len(labels):
        msg = f"{paths[0]}: no images ({USUAL_ENDINGS}) in any of the {task}, of which this is the first; add some"
        raise UsageError(msg)
    return Members(tuple(shards), np.concatenate(numbers), offset, length.astype(np.int32), labels)


def _samples(path: Path, names: tuple[str, ...] | None) -> Iterator[tuple[int, int, int]]:
    """Yield offset, length and label of each image. A sample's files share their name up to the first dot."""
    key, place = "", (0, 0)
    found: dict[str, int] = {}

    def finished() -> Iterator[tuple[int, int, int]]:
        if not found:
            return
        for kind, wanted in (("label", "a .cls with its class number"), ("image", "an image beside its .cls")):
            if kind not in found:
                msg = f"{path}: {_shown(key)}: a sample without {wanted}; add it or leave the sample out"
                raise UsageError(msg)
        yield *place, found["label"]

    for name, offset, length, file in _members(path):
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        if not stem or not extension:
            continue
        if f"{folder}/{stem}" != key:
            yield from finished()
            key, found = f"{folder}/{stem}", {}
        kind = "label" if extension == "cls" else "image" if f".{extension.lower()}" in endings() else None
        if kind is None:
            continue
        where = f"{path}: {_shown(name)}"
        if kind in found:
            msg = f"{where}: a second {kind} of the same sample; give each sample a name of its own"
            raise UsageError(msg)
        if kind == "label":
            found[kind] = _label(file.read(min(length, _MAX_LABEL + 1)), where, names)
        elif length > MAX_FILE_BYTES:
            msg = f"{where}: {length / 2**20:.0f} MiB; image files above {MAX_FILE_BYTES // 2**20} MiB are refused"
            raise UsageError(msg)
        else:
            found[kind], place = 0, (offset, length)
    yield from finished()


def _label(text: bytes, where: str, names: tuple[str, ...] | None) -> int:
    if not re.fullmatch(rb"\s*\d{1,9}\s*", text):
        msg = f"{where}: holds {_shown(text[:_MAX_LABEL].decode(errors='backslashreplace'))!r}, not a class number"
        raise UsageError(msg)
    label = int(text)
    if names is not None and label >= len(names):
        from_one = " (classes are numbered from 0)" if label == len(names) else ""
        numbers = f"a class number, 0..{len(names) - 1}{from_one}"
        msg = f"{where}: label {label} is not {numbers}; correct the label, or {CLASSES}"
        raise UsageError(msg)
    return label


class _Headers(io.RawIOBase):
    """File from which tarfile reads a shard; refuses headers of excessive length."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            msg = f"a header claims {size} bytes, only 0 to {_MAX_HEADER} are allowed"
            raise tarfile.ReadError(msg)
        return self._file.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _members(path: Path) -> Iterator[tuple[str, int, int, BinaryIO]]:
    """Yield name, offset and length of each file in an archive, and the archive opened at the file's first byte."""
    end = 0
    try:
        with path.open("rb") as file:
            with tarfile.open(fileobj=_Headers(file), mode="r:") as archive:
                for member in archive:
                    if member.offset < end or member.size < 0:  # would read the same headers in an endless loop
                        msg = f"the header at byte {member.offset} lies inside the file before it, or its size is < 0"
                        raise tarfile.ReadError(msg)
                    start = member.offset_data
                    end = start + (-(-member.size // _BLOCK) * _BLOCK if member.isreg() else 0)
                    if member.isdir():
                        continue
                    if not member.isreg() or member.issparse():
                        msg = f"{path}: {_shown(member.name)}: a link, a device or a sparse file; store it as a file"
                        raise UsageError(msg)
                    file.seek(start)
                    yield member.name, start, member.size, file
            _check_end(path, file, end)
    except CrqatError:
        raise
    except OSError as error:
        if error.errno is None:
            raise _damaged(path, error) from error
        msg = f"{path}: cannot be read: {error.strerror}"
        raise ToolError(msg) from error
    except Exception as error:  # tarfile raises many kinds of errors for damaged archives
        raise _damaged(path, error) from error


def _check_end(path: Path, file: BinaryIO, end: int) -> None:
    """Check that only zeros follow an archive's end: tarfile also takes an unreadable header for the end."""
    file.seek(end)
    rest = file.read(2**20)
    if len(rest) < _BLOCK or any(rest) or file.read(1):
        reason = f"it is cut off at byte {end}" if len(rest) < _BLOCK else f"no header at byte {end}"
        raise _damaged(path, ValueError(reason))


def _damaged(path: Path, error: Exception) -> UsageError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UsageError(f"{path}: a damaged tar archive ({_shown(reason)}); write or copy it again")


def _shown(name: str) -> str:
    """Return a name from an archive as one short printable line."""
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name.lstrip("/"))
    return text if len(text) <= 120 else f"{text[:117]}..."
