"""Batches of normalized images, made on the training device, from memory or from files that stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crqat.core.preprocessing import Preprocessing, normalize
from crqat.train import distributed
from crqat.train.data.augment import random_crop, random_flip, strong_view
from crqat.train.data.streaming import StoredImages, stream_batches

Images = Tensor | StoredImages[Any]


def subset(images: Images, chosen: Tensor) -> Images:
    """Some of the images, int64 indices of shape [M]; files are not decoded yet."""
    return images.subset(chosen) if isinstance(images, StoredImages) else images[chosen]


class Batches:
    """Augmented training batches, made on the device where the images lie, without a wait for the host.

    All batches have the same shape, so that a compiled step is compiled once: of n images, `min(n, batch_size)` go into
    each, and the incomplete rest of an epoch is dropped, other images each time.

    Args:
        images: uint8 of shape [N, C, H, W], or files.
        labels: int64 of shape [N].
        preprocessing: Of the network's input.
        batch_size: Images a step, of all ranks together; each rank makes its share of them.
        crop_padding: See `random_crop`; 0 switches it off.
        flip: See `random_flip`.
        device: Where images and labels are kept and batches are made.
        strong: Whether the first view, the student's, gets `strong_view` on top.
    """

    def __init__(
        self,
        images: Images,
        labels: Tensor,
        preprocessing: Preprocessing,
        batch_size: int,
        crop_padding: int,
        flip: bool,
        device: torch.device,
        strong: bool = False,
    ) -> None:
        self.images = images.to(device)
        self.labels = labels.to(device)
        self.constants = [torch.from_numpy(constant).to(device) for constant in preprocessing.constants()]
        self.batch_size = min(batch_size, len(images))
        self.crop_padding = crop_padding
        self.flip = flip
        self.strong = strong

    def __len__(self) -> int:
        """Steps of an epoch."""
        return len(self.images) // self.batch_size

    def order(self, generator: torch.Generator) -> Tensor:
        """The images of an epoch in random order, int64 of shape [steps * batch size]."""
        order = torch.randperm(len(self.images), generator=generator, device=self.images.device)
        return order[: len(self) * self.batch_size]

    def epoch(
        self, generator: torch.Generator, views: int = 1, order: Tensor | None = None, start: int = 0
    ) -> Iterator[tuple[Tensor, ...]]:
        """Each image at most once, in random order.

        Args:
            generator: On the training device; the same state gives the same batches.
            views: How many independent augmentations of the same images.
            order: See `order`; None draws one.
            start: How many of its batches to leave out; they are not read.

        Yields:
            The views, normalized float32 of shape [B, C, H, W] each, and the labels, int64 of shape [B].
        """
        order = self.order(generator) if order is None else order
        chosen = [distributed.share(batch) for batch in torch.split(order, self.batch_size)[start:]]
        if isinstance(self.images, StoredImages):
            batches = stream_batches(self.images, chosen)
        else:
            in_memory = self.images
            batches = (in_memory[indices] for indices in chosen)
        for indices, images in zip(chosen, batches, strict=True):
            yield *(self._augment(images, generator, view) for view in range(views)), self.labels[indices]

    def _augment(self, images: Tensor, generator: torch.Generator, view: int) -> Tensor:
        if self.crop_padding:
            images = random_crop(images, self.crop_padding, generator)
        if self.flip:
            images = random_flip(images, generator)
        pixels = images.float()
        if self.strong and view == 0:
            pixels = strong_view(pixels, generator)
        return normalize(pixels, self.constants).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Generators:
    """What a training draws from, on its device.

    Attributes:
        order: Of images: the same on all ranks, and whatever their number.
        augmentation: Each rank's own.
    """

    order: torch.Generator
    augmentation: torch.Generator

    @classmethod
    def of(cls, seed: int, device: torch.device) -> Generators:
        """Those of this rank."""
        own = seed + 1_000_003 * (1 + distributed.rank())  # far from other recipes' small seeds
        return cls(torch.Generator(device).manual_seed(seed), torch.Generator(device).manual_seed(own))


class Feed:
    """Batches epoch by epoch, and the place in the current one, from which another process can go on.

    Args:
        batches: The images.
        generators: What their order and their augmentation are drawn from.
        views: See `Batches.epoch`.

    Attributes:
        order: The images of the current epoch, None between two epochs; see `Batches.order`.
        done: Batches of it that are behind.
    """

    def __init__(self, batches: Batches, generators: Generators, views: int = 1) -> None:
        self._batches, self._generators, self._views = batches, generators, views
        self.order: Tensor | None = None
        self.done = 0

    def epoch(self) -> Iterator[tuple[Tensor, ...]]:
        """What is left of the current epoch, or a new one; yields as `Batches.epoch` does."""
        if self.order is None:
            self.order = self._batches.order(self._generators.order)
        for batch in self._batches.epoch(self._generators.augmentation, self._views, self.order, self.done):
            self.done += 1
            yield batch
        self.order, self.done = None, 0

    def stream(self) -> Iterator[tuple[Tensor, ...]]:
        """Epochs without end."""
        while True:
            yield from self.epoch()


def evaluation_batches(images: Images, preprocessing: Preprocessing, batch_size: int) -> Iterator[Tensor]:
    """All images in order, without augmentation, on the device they lie on.

    Args:
        images: uint8 of shape [N, C, H, W], or files.
        preprocessing: Of the network's input.
        batch_size: Images a batch; the last one may be smaller.

    Yields:
        Normalized float32 of shape [B, C, H, W].
    """
    constants = [torch.from_numpy(constant).to(images.device) for constant in preprocessing.constants()]
    for start in range(0, len(images), batch_size):
        yield normalize(images[start : start + batch_size].float(), constants)
