"""Augments whole batches of images on their device, with random draws for each image.

No function makes the host wait for the device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Shift each image by its own random offset of -padding..padding pixels; uncovered pixels become 0, black.

    Args:
        images: uint8 of shape [N, C, H, W].
        padding: Largest offset in pixels.
        generator: Random generator on the images' device; one [N, 2] draw of integers in 0..2*padding gives each
            image's (row, column) offset plus `padding`.

    Returns:
        The shifted images, of the same shape and type.
    """
    n, _, height, width = images.shape
    # All windows of the padded image, as a view: [N, C, 2 padding + 1, 2 padding + 1, H, W].
    windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    offsets = torch.randint(0, 2 * padding + 1, (n, 2), generator=generator, device=images.device)
    return windows[torch.arange(n, device=images.device), :, offsets[:, 0], offsets[:, 1]]


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image horizontally with probability 1/2.

    Args:
        images: uint8 of shape [N, C, H, W].
        generator: Random generator on the images' device; one [N] draw in 0..1 is compared with 0.5.

    Returns:
        The images, of the same shape and type.
    """
    flipped = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    return torch.where(flipped[:, None, None, None], images.flip(3), images)


# Operations of `strong_view` and their largest magnitudes: the list of FixMatch (arXiv 2001.07685, appendix) without
# equalize, which needs sorting. Shears are in units of the side, shifts are shares of it.
OPERATIONS = (
    "identity", "autocontrast", "brightness", "color", "contrast", "posterize", "sharpness", "solarize",
    "rotate", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
_DEGREES, _SHEAR, _SHIFT, _ENHANCE = 30.0, 0.3, 0.3, 0.95
GREY = 127.0


def strong_view(images: Tensor, generator: torch.Generator) -> Tensor:
    """Apply RandAugment (arXiv 1909.13719) with two operations of random magnitude to each image, then cutout.

    Each image draws its own operations. All operations are computed for the whole batch and selected by masks, so that
    nothing waits for the device.

    Args:
        images: float32 in 0..255 of shape [N, C, H, W].
        generator: Random generator on the images' device.

    Returns:
        The augmented images, of the same shape, type and range.
    """
    n = len(images)
    for _ in range(2):
        chosen = torch.randint(len(OPERATIONS), (n,), generator=generator, device=images.device)
        magnitude = 2 * torch.rand(n, generator=generator, device=images.device) - 1
        images = apply_operation(images, chosen, magnitude)
    return cutout(images, images.shape[-1] // 2, generator)


def apply_operation(images: Tensor, chosen: Tensor, magnitude: Tensor) -> Tensor:
    """Apply one operation to each image.

    Args:
        images: float32 in 0..255 of shape [N, C, H, W].
        chosen: Index into OPERATIONS, int64 of shape [N].
        magnitude: float32 in -1..1 of shape [N]: the share of an operation's largest magnitude, with its direction;
            posterize and solarize take its absolute value.

    Returns:
        The changed images, float32 in 0..255 of shape [N, C, H, W].
    """

    def only(name: str, value: Tensor) -> Tensor:
        return torch.where(chosen == OPERATIONS.index(name), value, torch.zeros_like(value))

    # Rows of the matrix that maps a pixel of the result to one of the source, in coordinates from -1 to 1.
    angle = only("rotate", magnitude) * (_DEGREES * math.pi / 180)
    shear_x, shear_y = only("shear_x", magnitude) * _SHEAR, only("shear_y", magnitude) * _SHEAR
    shift_x, shift_y = only("translate_x", magnitude) * 2 * _SHIFT, only("translate_y", magnitude) * 2 * _SHIFT
    # A positive angle turns counter-clockwise, as in torchvision; height and width may differ.
    ratio = images.shape[2] / images.shape[3]
    top = torch.stack([angle.cos(), -angle.sin() * ratio + shear_x, shift_x], dim=1)
    bottom = torch.stack([angle.sin() / ratio + shear_y, angle.cos(), shift_y], dim=1)
    grid = F.affine_grid(torch.stack([top, bottom], dim=1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)

    column = magnitude[:, None, None, None]
    strength = 1 + _ENHANCE * column
    luma = torch.tensor([0.299, 0.587, 0.114], device=images.device)[:, None, None] if images.shape[1] == 3 else 1.0
    grey = (images * luma).sum(dim=1, keepdim=True) if images.shape[1] == 3 else images
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    level = torch.exp2((4 * column.abs()).floor())  # keep 4 to 8 bits
    results = {
        "autocontrast": torch.where(high > low, (images - low) * (255 / (high - low).clamp(min=1)), images),
        "brightness": images * strength,
        "color": grey + (images - grey) * strength,
        "contrast": (mean := grey.mean(dim=(1, 2, 3), keepdim=True).floor()) + (images - mean) * strength,
        "posterize": (images / level).floor() * level,
        "sharpness": (smooth := _smooth(images)) + (images - smooth) * strength,
        "solarize": torch.where(images >= 255 * (1 - column.abs()), 255 - images, images),
    }
    result = moved
    for name, changed in results.items():
        result = torch.where((chosen == OPERATIONS.index(name))[:, None, None, None], changed, result)
    return result.clamp(0, 255)


def _smooth(images: Tensor) -> Tensor:
    """Apply the 3x3 blur of Pillow's and torchvision's sharpness; border pixels stay unchanged."""
    channels = images.shape[1]
    kernel = torch.ones(3, 3, device=images.device)
    kernel[1, 1] = 5
    kernel = (kernel / kernel.sum()).expand(channels, 1, 3, 3)
    inner = F.conv2d(images, kernel, groups=channels)
    result = images.clone()
    result[:, :, 1:-1, 1:-1] = inner
    return result


def cutout(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Fill a square of `side` pixels around a random centre of each image with grey (arXiv 1708.04552).

    Args:
        images: float32 in 0..255 of shape [N, C, H, W].
        side: Side of the square in pixels; the square may extend beyond the image.
        generator: Random generator on the images' device; one [N, 2] draw in 0..1 gives the centres.
    """
    n, _, height, width = images.shape
    draw = torch.rand(n, 2, generator=generator, device=images.device)
    top, left = ((draw[:, i] * extent).floor() - side // 2 for i, extent in enumerate((height, width)))
    rows = torch.arange(height, device=images.device)[None, :]
    columns = torch.arange(width, device=images.device)[None, :]
    in_rows = (rows >= top[:, None]) & (rows < top[:, None] + side)
    in_columns = (columns >= left[:, None]) & (columns < left[:, None] + side)
    hole = (in_rows[:, :, None] & in_columns[:, None, :])[:, None]
    return torch.where(hole, torch.full_like(images, GREY), images)
