"""How an image becomes the network's input. This is the one place that normalizes, in training and on the board."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Float32 = TypeVar("Float32")


@dataclass(frozen=True)
class Preprocessing:
    """What turns a uint8 image into the network's float input.

    Attributes:
        mean: One number per channel, in units of 0..1.
        std: One number per channel, in units of 0..1.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def constants(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Maximum (255), mean and std as float32 arrays of shape [C, 1, 1].

        The maximum is an array, because a GPU turns a division by a Python number into a multiplication.
        """
        mean = np.array(self.mean, dtype=np.float32).reshape(-1, 1, 1)
        return np.full_like(mean, 255), mean, np.array(self.std, dtype=np.float32).reshape(-1, 1, 1)

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Normalized float32 images of uint8 images, both of shape [N, C, H, W]."""
        return normalize(images.astype(np.float32), self.constants())


def normalize(images: Float32, constants: Sequence[Any]) -> Float32:
    """``(images / maximum - mean) / std`` for float32 images in 0..255, as numpy arrays or as torch tensors.

    Each step is one correctly rounded float32 operation, so both libraries give the same bits.

    Args:
        images: float32 of shape [N, C, H, W].
        constants: What `Preprocessing.constants` gives, on the images' device.
    """
    maximum, mean, std = constants
    return (images / maximum - mean) / std  # type: ignore[no-any-return]
