"""Converts images to the network's input. Training and the measurement on a board normalize with this same code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from crqat.core.errors import UsageError
from crqat.core.image_file import FILTERS

Float32 = TypeVar("Float32")


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing that converts a uint8 image to the network's float input.

    Attributes:
        mean: Mean of each channel, in units of 0..1.
        std: Standard deviation of each channel, in units of 0..1.
        size: Length of an image file's shorter side after resizing, in pixels; None if images do not come from files.
        crop: Side length of the square cropped from the image's centre, in pixels.
        interpolation: Pillow's filter for resizing: "bilinear", "bicubic", "lanczos" or "nearest".
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int | None = None
    crop: int | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        """Reject a filter that Pillow does not have."""
        if self.interpolation not in FILTERS:
            msg = f"interpolation {self.interpolation!r} is not one of {', '.join(FILTERS)}"
            raise ValueError(msg)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preprocessing:
        """Return the Preprocessing of a JSON object, from a manifest or a model's metadata `crqat.preprocessing`.

        Raises:
            KeyError, TypeError, ValueError: The object is not a Preprocessing.
        """
        if not isinstance(data, Mapping):
            msg = f"the value is a {type(data).__name__}, not a JSON object"
            raise TypeError(msg)
        size, crop = (None if data.get(key) is None else int(data[key]) for key in ("size", "crop"))
        interpolation = str(data.get("interpolation", "bilinear"))
        return cls(tuple(map(float, data["mean"])), tuple(map(float, data["std"])), size, crop, interpolation)

    @property
    def channels(self) -> int:
        """Number of channels of the images: 1 for grey, 3 for RGB if the images come from files."""
        return len(self.mean)

    def constants(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return the maximum (255), mean and std as float32 arrays of shape [C, 1, 1].

        The maximum is an array because a GPU turns a division by a Python number into a multiplication.
        """
        mean = np.array(self.mean, dtype=np.float32).reshape(-1, 1, 1)
        return np.full_like(mean, 255), mean, np.array(self.std, dtype=np.float32).reshape(-1, 1, 1)

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return uint8 images [N, C, H, W] as normalized float32 images of the same shape."""
        return normalize(images.astype(np.float32), self.constants())


def checked_bytes(images: Any, preprocessing: Preprocessing | None = None) -> npt.NDArray[np.uint8]:
    """Check images that a caller of the Python API passed, and return them as a numpy array.

    Args:
        images: uint8 of shape [N, C, H, W], N >= 1, a numpy array or a torch tensor on any device.
        preprocessing: Preprocessing that will normalize the images; its number of channels must be that of the images.

    Returns:
        The images as a numpy array.

    Raises:
        UsageError: The images have another type or shape, or the preprocessing does not fit them.
    """
    array = np.asarray(images.detach().cpu() if hasattr(images, "detach") else images)
    if array.dtype != np.uint8 or array.ndim != 4 or not len(array):
        msg = (
            f"images: {array.dtype} of shape {list(array.shape)}; expected bytes before normalization, uint8 of shape "
            "[N, C, H, W] with N >= 1"
        )
        raise UsageError(msg)
    if preprocessing is not None:
        mean, std = (np.asarray(values, np.float64) for values in (preprocessing.mean, preprocessing.std))
        if not mean.shape == std.shape == (array.shape[1],):
            msg = (
                f"preprocessing: {mean.size} means and {std.size} stds; the images of shape {list(array.shape[1:])} "
                "need one of each per channel, and their shape must be [C, H, W]"
            )
            raise UsageError(msg)
        if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
            msg = (
                f"preprocessing: mean {mean.tolist()}, std {std.tolist()}; give finite numbers in units of 0..1, and "
                "positive stds"
            )
            raise UsageError(msg)
    return array


def normalize(images: Float32, constants: Sequence[Any]) -> Float32:
    """Compute ``(images / maximum - mean) / std`` for float32 images in 0..255, as numpy arrays or torch tensors.

    Each step is one correctly rounded float32 operation, so both libraries give the same bits.

    Args:
        images: float32 of shape [N, C, H, W].
        constants: Result of `Preprocessing.constants`, on the images' device.
    """
    maximum, mean, std = constants
    return (images / maximum - mean) / std  # type: ignore[no-any-return]
