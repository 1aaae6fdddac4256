"""Makes batches of normalized images on the training device, from images in memory or streamed from files."""

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
    """Return the images at `chosen`, int64 indices of shape [M]; images in files are not decoded yet."""
    return images.subset(chosen) if isinstance(images, StoredImages) else images[chosen]


class Batches:
    """Augmented training batches, made on `device`; augmentation never makes the host wait for the device.

    All batches have the same shape, so that a compiled step is compiled only once. Of n images, each batch has
    `min(n, batch_size)`. The images left over at the end of an epoch are dropped; because the order is random, they
    differ from epoch to epoch.

    Args:
        images: uint8 tensor of shape [N, C, H, W], or `StoredImages`, which are decoded on demand.
        labels: int64 of shape [N].
        preprocessing: Preprocessing of the network's input.
        batch_size: Images in a step, over all ranks together; each rank makes its share of them.
        crop_padding: Padding of `random_crop` in pixels; 0 switches it off.
        flip: Apply `random_flip`.
        device: Device where images and labels are kept and batches are made.
        strong: Whether the first view, the student's, gets `strong_view` in addition to crop and flip.
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
        """Return the number of steps in an epoch."""
        return len(self.images) // self.batch_size

    def order(self, generator: torch.Generator) -> Tensor:
        """Return the indices of an epoch's images in random order, int64 of shape [steps * batch size]."""
        order = torch.randperm(len(self.images), generator=generator, device=self.images.device)
        return order[: len(self) * self.batch_size]

    def epoch(
        self, generator: torch.Generator, views: int = 1, order: Tensor | None = None, start: int = 0
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield the batches of an epoch in random order, each image at most once.

        Args:
            generator: Random generator on the training device; the same state gives the same batches.
            views: Number of independent augmentations of the same images.
            order: Order of the images, see `order`; None draws one.
            start: Number of batches to skip at the beginning; they are not read.

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
    """Random generators of a training run, on its device.

    Attributes:
        order: Generator for the order of images; the same on all ranks, for any number of them.
        augmentation: Generator for augmentation; seeded differently on each rank.
    """

    order: torch.Generator
    augmentation: torch.Generator

    @classmethod
    def of(cls, seed: int, device: torch.device) -> Generators:
        """Return this rank's generators for a training run with a given seed."""
        own = seed + 1_000_003 * (1 + distributed.rank())  # far from other recipes' small seeds
        return cls(torch.Generator(device).manual_seed(seed), torch.Generator(device).manual_seed(own))


class Feed:
    """Endless batches, epoch by epoch, with a position from which another process can resume.

    Args:
        batches: The batches to draw from.
        generators: Generators for order and augmentation.
        views: Number of augmented views; see `Batches.epoch`.

    Attributes:
        order: Order of the current epoch's images, None between two epochs; see `Batches.order`.
        done: Number of batches of the current epoch that were yielded.
    """

    def __init__(self, batches: Batches, generators: Generators, views: int = 1) -> None:
        self._batches, self._generators, self._views = batches, generators, views
        self.order: Tensor | None = None
        self.done = 0

    def epoch(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield the remaining batches of the current epoch, or of a new one if none has begun; see `Batches.epoch`."""
        if self.order is None:
            self.order = self._batches.order(self._generators.order)
        for batch in self._batches.epoch(self._generators.augmentation, self._views, self.order, self.done):
            self.done += 1
            yield batch
        self.order, self.done = None, 0

    def stream(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield batches without end: when an epoch is over, the next one begins."""
        while True:
            yield from self.epoch()


def evaluation_batches(images: Images, preprocessing: Preprocessing, batch_size: int) -> Iterator[Tensor]:
    """Yield batches of all images in order, without augmentation, on the images' device.

    Args:
        images: uint8 tensor of shape [N, C, H, W], or `StoredImages`, which are decoded on demand.
        preprocessing: Preprocessing of the network's input.
        batch_size: Images in a batch; the last one may be smaller.

    Yields:
        Normalized images, float32 of shape [B, C, H, W].
    """
    constants = [torch.from_numpy(constant).to(images.device) for constant in preprocessing.constants()]
    for start in range(0, len(images), batch_size):
        yield normalize(images[start : start + batch_size].float(), constants)
