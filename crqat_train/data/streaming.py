"""Images that stay in their files and are decoded for each batch, in worker processes."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from crqat.core.errors import CrqatError
from crqat.core.progress import Progress

# Decoded parts up to this size are kept in memory; larger ones are decoded again whenever they are needed.
IN_MEMORY_BYTES = 2 * 2**30
_CHUNK = 256
Items = TypeVar("Items", bound=Sized)


@dataclass(frozen=True)
class StoredImages(ABC, Generic[Items]):
    """Images that are decoded when they are asked for; behaves like a uint8 tensor of shape [N, C, crop, crop].

    Attributes:
        items: Where each image lies, in the order of the indices.
        size: Of the shorter side after resizing.
        crop: Of the square.
        convert: See `crqat.core.image_file.decode_image`.
        device: Where decoded images go.
        channels: 3 (RGB) or 1 (grey).
        interpolation: See `crqat.core.image_file.decode_image`.
    """

    items: Items
    size: int
    crop: int
    convert: bool
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    channels: int = 3
    interpolation: str = "bilinear"

    def __len__(self) -> int:
        return len(self.items)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[N, C, crop, crop]."""
        return len(self), self.channels, self.crop, self.crop

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
        """One image, uint8 of shape [C, crop, crop]; raises as `__getitem__`."""

    def __getitem__(self, chosen: slice | Tensor | Sequence[int]) -> Tensor:
        """Decode: uint8 of shape [M, C, crop, crop].

        Raises:
            UsageError: An image is of another mode; see `crqat.core.image_file.decode_image`.
            ToolError: A file is gone, cannot be read or is another one than when it was listed.
        """
        indices = range(len(self))[chosen] if isinstance(chosen, slice) else [int(index) for index in chosen]
        with ThreadPoolExecutor() as pool:  # Pillow decodes without Python's lock
            arrays = list(pool.map(self._decode, indices))
        return torch.from_numpy(np.stack(arrays)).to(self.device)


Images = TypeVar("Images", bound=StoredImages[Any])


def decode(images: StoredImages[Any], task: str, progress: Progress) -> Tensor | StoredImages[Any]:
    """The images in memory if they fit, uint8 of shape [N, C, crop, crop]; else as they are."""
    if math.prod(images.shape) > IN_MEMORY_BYTES:
        return images
    decoded = torch.empty(images.shape, dtype=torch.uint8)
    for start in range(0, len(images), _CHUNK):
        decoded[start : start + _CHUNK] = images[start : start + _CHUNK]
        progress(task, min(start + _CHUNK, len(images)), len(images))
    return decoded


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
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # SIGTERM has been blocked since the worker's start
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """A process started meanwhile inherits the blocked signals: none ends it before `_leave_signals` has run there."""
    if sys.platform != "linux":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def workers() -> int:
    """How many processes decode batches, each a whole one."""
    return min(8, os.cpu_count() or 1)


def stream_batches(images: StoredImages[Any], batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """Decode batches in worker processes, ahead of the training, in the order given.

    Args:
        images: All of them.
        batches: The indices of each batch, int64 of shape [B].

    Yields:
        uint8 of shape [B, C, crop, crop] on the images' device.

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
    with _signals_wait():
        decoded = iter(loader)
    for batch in decoded:
        if isinstance(batch, CrqatError):
            raise batch
        yield batch.to(images.device, non_blocking=on_gpu)
