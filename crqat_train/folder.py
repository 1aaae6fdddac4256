"""Images in class folders, root/train/CLASS/... and root/test/CLASS/..., and how stored images are decoded."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from artifacts.errors import CrqatError, ToolError, UsageError
from artifacts.images import load_image
from artifacts.progress import Progress

EXTENSIONS = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# Decoded parts up to this size are kept in memory; larger ones are decoded again whenever they are needed.
IN_MEMORY_BYTES = 2 * 2**30
_CHUNK = 256
Items = TypeVar("Items", bound=Sized)


@dataclass(frozen=True)
class ImageFile:
    """A file as it was when the folder was listed."""

    path: Path
    label: int
    size: int
    modified: int


@dataclass(frozen=True)
class StoredImages(ABC, Generic[Items]):
    """Images that are decoded when they are asked for; behaves like a uint8 tensor of shape [N, 3, crop, crop].

    Attributes:
        items: Where each image lies, in the order of the indices.
        size: Of the shorter side after resizing.
        crop: Of the square.
        convert: See `artifacts.images.decode_image`.
        device: Where decoded images go.
        interpolation: See `artifacts.images.decode_image`.
    """

    items: Items
    size: int
    crop: int
    convert: bool
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    interpolation: str = "bilinear"

    def __len__(self) -> int:
        return len(self.items)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[N, 3, crop, crop]."""
        return len(self), 3, self.crop, self.crop

    def to(self: Images, device: torch.device) -> Images:
        """The same images, decoded to another device."""
        return replace(self, device=device)

    def subset(self: Images, chosen: Tensor) -> Images:
        """Some of the images, not decoded; `chosen` is int64 of shape [M]."""
        return replace(self, items=self._items_of(chosen))

    @abstractmethod
    def _items_of(self, chosen: Tensor) -> Items:
        """Some of the items."""

    @abstractmethod
    def _decode(self, index: int) -> Any:
        """One image, uint8 of shape [3, crop, crop]; raises as `__getitem__`."""

    def __getitem__(self, chosen: slice | Tensor | Sequence[int]) -> Tensor:
        """Decode: uint8 of shape [M, 3, crop, crop].

        Raises:
            UsageError: An image is no RGB image; see `artifacts.images.decode_image`.
            ToolError: A file is gone, cannot be read or is another one than when it was listed.
        """
        indices = range(len(self))[chosen] if isinstance(chosen, slice) else [int(index) for index in chosen]
        with ThreadPoolExecutor() as pool:  # Pillow decodes without Python's lock
            arrays = list(pool.map(self._decode, indices))
        return torch.from_numpy(np.stack(arrays)).to(self.device)


Images = TypeVar("Images", bound=StoredImages[Any])


class FolderImages(StoredImages[tuple[ImageFile, ...]]):
    """Image files."""

    def _items_of(self, chosen: Tensor) -> tuple[ImageFile, ...]:
        return tuple(self.items[index] for index in chosen.tolist())

    def _decode(self, index: int) -> Any:
        file = self.items[index]
        check_unchanged(file.path, (file.size, file.modified))
        return load_image(file.path, self.size, self.crop, self.convert, self.interpolation)


def check_unchanged(path: Path, state: tuple[int, int]) -> None:
    """Compare a file with what `file_state` said of it.

    Raises:
        ToolError: It is gone or another one.
    """
    if file_state(path) != state:
        msg = f"{path}: changed while the data set was read; leave the folder alone and start again"
        raise ToolError(msg)


def file_state(path: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns.

    Raises:
        ToolError: It cannot be read.
    """
    try:
        status = path.stat()
    except OSError as error:
        msg = f"{path}: cannot be read any more: {error.strerror}; did the folder change meanwhile?"
        raise ToolError(msg) from error
    return status.st_size, status.st_mtime_ns


def list_folder(root: Path) -> tuple[tuple[str, ...], tuple[ImageFile, ...], tuple[ImageFile, ...]]:
    """Class names (sorted), training files and test files of a data set; each class may hold a tree of folders.

    Raises:
        UsageError: The folders are not there, a class is empty, or the test part has a class of its own.
        ToolError: A folder cannot be read.
    """
    train = root / "train"
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if not train.is_dir() or test is None:
        msg = f"data.root: imagefolder wants {root}/train/CLASS/* and {root}/test/CLASS/* (or val/), with image files"
        raise UsageError(msg)
    names = _classes(train)
    unknown = [name for name in _classes(test) if name not in names]
    if unknown:
        msg = f"{test / unknown[0]}: a class that {train} does not have; remove it or add training images"
        raise UsageError(msg)
    return names, _files(train, names, every=True), _files(test, names, every=False)


def _classes(folder: Path) -> tuple[str, ...]:
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        msg = f"{folder}: cannot be read: {error.strerror}"
        raise ToolError(msg) from error
    if not names:
        msg = f"{folder}: no class folders; put the images of each class into a folder of its name"
        raise UsageError(msg)
    return tuple(names)


def _files(folder: Path, names: Sequence[str], every: bool) -> tuple[ImageFile, ...]:
    """All image files below the class folders, sorted; a class folder must not be empty, nor missing if `every`."""

    def refuse(error: OSError) -> None:
        msg = f"{error.filename}: cannot be read: {error.strerror}"
        raise ToolError(msg) from error

    files: list[ImageFile] = []
    for label, name in enumerate(names):
        if not every and not (folder / name).is_dir():
            continue
        paths = sorted(
            Path(parent) / file
            for parent, _, found in os.walk(folder / name, onerror=refuse)
            for file in found
            if Path(file).suffix.lower() in EXTENSIONS and not file.startswith(".")
        )
        if not paths:
            msg = f"{folder / name}: a class without images ({', '.join(sorted(EXTENSIONS))}); add some or remove it"
            raise UsageError(msg)
        files += [ImageFile(path, label, *file_state(path)) for path in paths]
    return tuple(files)


def decode(images: StoredImages[Any], task: str, progress: Progress) -> Tensor | StoredImages[Any]:
    """The images in memory if they fit, uint8 of shape [N, 3, crop, crop]; else as they are."""
    if len(images) * 3 * images.crop**2 > IN_MEMORY_BYTES:
        return images
    decoded = torch.empty(images.shape, dtype=torch.uint8)
    for start in range(0, len(images), _CHUNK):
        decoded[start : start + _CHUNK] = images[start : start + _CHUNK]
        progress(task, min(start + _CHUNK, len(images)), len(images))
    return decoded


def duplicates(train: Sequence[ImageFile], test: Sequence[ImageFile]) -> list[tuple[Path, Path]]:
    """Pairs of a training and a test file with the same bytes; one pair for each such test file."""
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
        msg = f"{path}: cannot be read: {error.strerror}; did the folder change meanwhile?"
        raise ToolError(msg) from error


class _Decoder(torch.utils.data.Dataset[Any]):
    """What a worker process gets: lists of indices. An exception's message would come back with a traceback in it."""

    def __init__(self, images: StoredImages[Any]) -> None:
        self.images = images

    def __getitem__(self, chosen: list[int]) -> Tensor | CrqatError:
        try:
            return self.images[chosen]
        except CrqatError as error:
            return error


def _leave_signals(_: int) -> None:
    """Signals are the training's to answer, and it ends its workers by SIGTERM: what others send is ignored.

    Ctrl-C reaches every process of a terminal, torchrun's SIGTERM a process's group, and SLURM's all of a job. A worker
    that ended of it would end the training before its state is saved.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":  # elsewhere nobody tells who sent it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.kill(os.getpid(), signal.SIGTERM)


def workers() -> int:
    """How many processes decode batches, each a whole one."""
    return min(8, os.cpu_count() or 1)


def stream_batches(images: StoredImages[Any], batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """Decode batches in worker processes, ahead of the training, in the order given.

    Args:
        images: All of them.
        batches: The indices of each batch, int64 of shape [B].

    Yields:
        uint8 of shape [B, 3, crop, crop] on the images' device.

    Raises:
        UsageError, ToolError: As `StoredImages.__getitem__`.
    """
    on_gpu = images.device.type == "cuda"
    loader = DataLoader(
        _Decoder(images.to(torch.device("cpu"))),
        sampler=[batch.tolist() for batch in batches],
        batch_size=None,
        num_workers=workers(),
        pin_memory=on_gpu,
        worker_init_fn=_leave_signals,
        # Its own, which draws nothing that training sees: an epoch may be read in two parts.
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, CrqatError):
            raise batch
        yield batch.to(images.device, non_blocking=on_gpu)
