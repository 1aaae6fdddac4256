"""The validation split: which training images train and which select."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crqat.core.errors import UsageError


@dataclass(frozen=True)
class Split:
    """Which training images train and which select; int64 indices on the CPU."""

    train: Tensor
    validation: Tensor


def split(n: int, fraction: float, seed: int) -> Split:
    """Divide n images at random, the same way for the same seed whatever the training device.

    Args:
        n: Number of images.
        fraction: Share of the validation part, in 0..1.
        seed: Of the drawing.

    Raises:
        UsageError: One of the two parts would be empty.
    """
    count = round(n * fraction)
    if not 0 < count < n:
        msg = f"data.validation: a share of {fraction} of {n} training images leaves one part empty; change it"
        raise UsageError(msg)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return Split(train=order[count:], validation=order[:count])
