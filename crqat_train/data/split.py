"""Splits the training images into training, validation and unlabeled images, and those reserved for `crqat advise`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crqat.core.errors import UsageError
from crqat.train.config import DataConfig


@dataclass(frozen=True)
class Split:
    """Indices of images for training and validation, of unlabeled images, and of those reserved for `crqat advise`.

    All are int64 on the CPU.
    """

    train: Tensor
    validation: Tensor
    unlabeled: Tensor
    judging: Tensor


def split_of(labels: Tensor, config: DataConfig, seed: int) -> Split:
    """Return the split of a recipe's training images.

    Args:
        labels: Labels of the training images, int64 of shape [N].
        config: `validation` is the validation share of the labeled images, `labeled` the number of labels to keep.
        seed: The recipe's seed.

    Raises:
        UsageError: See `split`; or there are fewer than `labeled` images.
    """
    if config.judging is not None:
        count = round(len(labels) * config.judging)
        if not 0 < count < len(labels):
            msg = (
                f"data.judging: a share of {config.judging} of {len(labels)} training images leaves one part empty; "
                "change it"
            )
            raise UsageError(msg)
        # Use another seed than for the validation images: the same order would select the same images.
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed + 1))
        held, left = order[:count].sort().values, order[count:].sort().values
        inside = split_of(labels[left], replace(config, judging=None), seed)
        return Split(left[inside.train], left[inside.validation], left[inside.unlabeled], held)
    if config.labeled is None:
        return split(len(labels), config.validation, seed)
    if config.labeled > len(labels):
        msg = (
            f"data.labeled: {config.labeled} is more than the {len(labels)} training images; set at most {len(labels)}"
        )
        raise UsageError(msg)
    drawn = _balanced(labels, seed)
    chosen, unlabeled = drawn[: config.labeled].sort().values, drawn[config.labeled :].sort().values
    inside = split(len(chosen), config.validation, seed)
    return Split(chosen[inside.train], chosen[inside.validation], unlabeled, inside.judging)


def split(n: int, fraction: float, seed: int) -> Split:
    """Split n labeled images at random into training and validation images.

    Args:
        n: Number of labeled images.
        fraction: Share of validation images, in 0..1.
        seed: Seed of the random order, on which alone the result depends, not on the training device.

    Raises:
        UsageError: One of the two parts would be empty.
    """
    count = round(n * fraction)
    if not 0 < count < n:
        msg = (
            f"data.validation: a share of {fraction} of {n} training images leaves one part empty; choose another share"
        )
        raise UsageError(msg)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return Split(train=order[count:], validation=order[:count], unlabeled=order[:0], judging=order[:0])


def _balanced(labels: Tensor, seed: int) -> Tensor:
    """Return an order of the images in which the first n have equally many of each class, for any n; int64 [N]."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    place = torch.empty_like(order)
    for label in set(labels.tolist()):
        own = (labels[order] == label).nonzero().squeeze(1)
        place[own] = torch.arange(len(own))
    return order[place.argsort(stable=True)]
