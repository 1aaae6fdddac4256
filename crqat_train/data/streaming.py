"""Streams images from files: each batch is decoded in worker processes when it is needed."""

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

# Decoded parts up to this size are kept in memory; larger ones are decoded for every use.
IN_MEMORY_BYTES = 2 * 2**30
_CHUNK = 256
Items = TypeVar("Items", bound=Sized)


@dataclass(frozen=True)
class StoredImages(ABC, Generic[Items]):
    """Images that are decoded on demand; behaves like a uint8 tensor of shape [N, C, crop, crop].

    Attributes:
        items: Location of each image, in the order of the indices.
        size: Shorter side after resizing, in pixels.
        crop: Side of the centre square, in pixels.
        convert: Convert images of another mode instead of refusing them; see `crqat.core.image_file.decode_image`.
        device: Device for decoded images.
        channels: 3 (RGB) or 1 (grey).
        interpolation: Interpolation of the resizing; see `crqat.core.image_file.decode_image`.
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
        """Return [N, C, crop, crop]."""
        return len(self), self.channels, self.crop, self.crop

    def to(self: Images, device: torch.device) -> Images:
        """Return the same images; they will be decoded onto another device."""
        return replace(self, device=device)

    def subset(self: Images, chosen: Tensor) -> Images:
        """Return the images at `chosen`, int64 indices of shape [M], without decoding them."""
        return replace(self, items=self._items_of(chosen))

    @abstractmethod
    def _items_of(self, chosen: Tensor) -> Items:
        """Return the items at `chosen`, int64 indices of shape [M]."""

    @abstractmethod
    def _decode(self, index: int) -> Any:
        """Decode one image: uint8 of shape [C, crop, crop]. Raises what `__getitem__` raises."""

    def __getitem__(self, chosen: slice | Tensor | Sequence[int]) -> Tensor:
        """Decode images: uint8 of shape [M, C, crop, crop].

        Raises:
            UsageError: An image has another mode; see `crqat.core.image_file.decode_image`.
            ToolError: A file is gone, cannot be read or has changed since it was listed.
        """
        indices = range(len(self))[chosen] if isinstance(chosen, slice) else [int(index) for index in chosen]
        with ThreadPoolExecutor() as pool:  # Pillow releases Python's lock while it decodes
            arrays = list(pool.map(self._decode, indices))
        return torch.from_numpy(np.stack(arrays)).to(self.device)


Images = TypeVar("Images", bound=StoredImages[Any])


def decode(images: StoredImages[Any], task: str, progress: Progress) -> Tensor | StoredImages[Any]:
    """Return the decoded images, uint8 of shape [N, C, crop, crop], if they fit into memory; otherwise `images`."""
    if math.prod(images.shape) > IN_MEMORY_BYTES:
        return images
    decoded = torch.empty(images.shape, dtype=torch.uint8)
    for start in range(0, len(images), _CHUNK):
        decoded[start : start + _CHUNK] = images[start : start + _CHUNK]
        progress(task, min(start + _CHUNK, len(images)), len(images))
    return decoded


class _Decoder(torch.utils.data.Dataset[Any]):
    """Dataset for loader workers. Errors are returned, not raised: DataLoader would wrap them in a traceback."""

    def __init__(self, images: StoredImages[Any]) -> None:
        self.images = images

    def __getitem__(self, chosen: list[int]) -> Tensor | CrqatError:
        try:
            return self.images[chosen]
        except CrqatError as error:
            return error


def _leave_signals(_: int) -> None:
    """Make a worker ignore signals unless the training process sent them.

    The training process handles signals itself and ends its workers. Ctrl-C reaches every process of a terminal,
    torchrun's SIGTERM reaches a process group, and SLURM's SIGTERM reaches all processes of a job. If a worker ended by
    such a signal, the training would end before its state is saved.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":  # elsewhere the sender of a signal is unknown
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # SIGTERM has been blocked since the worker's start
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Within the context, processes are started with SIGINT and SIGTERM blocked (on Linux only).

    A signal therefore waits until `_leave_signals`, which decides about it, has run in the new process.
    """
    if sys.platform != "linux":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def workers() -> int:
    """Return the number of processes that decode images; each of them decodes whole batches."""
    return min(8, os.cpu_count() or 1)


def stream_batches(images: StoredImages[Any], batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """Decode batches in worker processes ahead of the training, in the given order.

    Args:
        images: All images.
        batches: The indices of each batch, int64 of shape [B].

    Yields:
        Images of one batch, uint8 of shape [B, C, crop, crop] on the images' device.

    Raises:
        UsageError: An image has another mode, such as grey instead of RGB.
        ToolError: A file is gone, cannot be read or has changed since it was listed.
    """
    on_gpu = images.device.type == "cuda"
    loader = DataLoader(
        _Decoder(images.to(torch.device("cpu"))),
        sampler=[batch.tolist() for batch in batches],
        batch_size=None,
        num_workers=workers(),
        pin_memory=on_gpu,
        worker_init_fn=_leave_signals,
        # A separate generator, so that the training's random state does not change: an epoch may be read in two parts.
        generator=torch.Generator(),
    )
    with _signals_wait():
        decoded = iter(loader)
    for batch in decoded:
        if isinstance(batch, CrqatError):
            raise batch
        yield batch.to(images.device, non_blocking=on_gpu)
