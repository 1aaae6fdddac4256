"""Decodes image files: accepted formats, size limits, resizing and cropping."""

from __future__ import annotations

import os
import warnings
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from crqat.core.errors import ToolError, UsageError

# Larger than any camera image for classification; anything above is a mistake or a decompression bomb.
MAX_FILE_BYTES = 64 * 2**20
MAX_PIXELS = 64 * 10**6
FILTERS = ("bilinear", "bicubic", "lanczos", "nearest")
# Pillow formats that are not decoded: EPS calls another program, the others are headers without a decoder.
REFUSED_FORMATS = frozenset({"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"})


@cache
def formats() -> tuple[str, ...]:
    """Return the names of the accepted formats: those that Pillow decodes without another program. Needs Pillow."""
    from PIL import Image

    Image.init()
    return tuple(sorted(set(Image.OPEN) - REFUSED_FORMATS))


@cache
def endings() -> frozenset[str]:
    """Return the file extensions of accepted images, such as ".jpg". Needs Pillow."""
    from PIL import Image

    known = set(formats())
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in known)


def load_image(
    path: Path, size: int, crop: int, convert: bool = False, channels: int = 3, interpolation: str = "bilinear"
) -> npt.NDArray[np.uint8]:
    """Return a decoded image file as uint8 [channels, crop, crop]; for the arguments, see `decode_image`.

    Raises:
        UsageError: The file is not an image, is damaged, is too large or has another number of channels.
        ToolError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return decode_image(file, str(path), size, crop, convert, channels, interpolation)
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}; check that the file still exists and may be read"
        raise ToolError(msg) from error


def decode_image(
    file: IO[bytes],
    name: str,
    size: int,
    crop: int,
    convert: bool = False,
    channels: int = 3,
    interpolation: str = "bilinear",
) -> npt.NDArray[np.uint8]:
    """Decode an image, rotate it by its EXIF tag, resize its shorter side and crop the centre.

    Resizing uses Pillow's antialiasing on uint8. Needs Pillow.

    Args:
        file: JPEG, PNG, WebP, BMP or another of the formats in `formats`.
        name: Name of the file for messages.
        size: Length of the shorter side after resizing, in pixels; at least `crop`.
        crop: Side length of the square crop, in pixels.
        convert: Whether to convert images of another mode (grey, palette, CMYK) to RGB or grey instead of rejecting
            them. Images with transparency or more than 8 bits have no standard conversion and are always rejected.
        channels: 3 for RGB, 1 for grey (colours are converted to ITU-R 601-2 luma).
        interpolation: Name of the filter for resizing, one of `FILTERS`.

    Returns:
        uint8 of shape [channels, crop, crop].

    Raises:
        UsageError: The file is not an image, is damaged, is too large or has another number of channels.
        OSError: The file cannot be read.
    """
    from PIL import Image, ImageOps

    if channels not in (1, 3):
        msg = f"{name}: image files have 1 channel (grey) or 3 (RGB), not {channels}; set data.channels to 1 or 3"
        raise UsageError(msg)
    _silence_pillow()
    try:
        length = file.seek(0, os.SEEK_END)
        file.seek(0)
        if length > MAX_FILE_BYTES:
            msg = f"{name}: {length / 2**20:.0f} MiB; image files above {MAX_FILE_BYTES // 2**20} MiB are refused"
            raise UsageError(msg)
        with Image.open(file, formats=formats()) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                msg = f"{name}: {width} x {height} pixels; images above {MAX_PIXELS // 10**6} megapixels are refused"
                raise UsageError(msg)
            opened.load()
            image = _in_mode(ImageOps.exif_transpose(opened), "RGB" if channels == 3 else "L", name, convert)
    except OSError as error:
        if error.errno is not None:
            raise
        raise _undecodable(name, error) from error
    except UsageError:
        raise
    except Exception as error:  # what a decoder raises on a damaged file depends on the file's bytes
        raise _undecodable(name, error) from error
    short = min(image.size)
    if short != size:
        width, height = (max(size, round(side * size / short)) for side in image.size)
        image = image.resize((width, height), Image.Resampling[interpolation.upper()])
    left, top = (image.width - crop) // 2, (image.height - crop) // 2
    cropped = np.asarray(image.crop((left, top, left + crop, top + crop)), dtype=np.uint8)
    return np.ascontiguousarray(cropped.reshape(crop, crop, channels).transpose(2, 0, 1))


@cache
def _silence_pillow() -> None:
    """Suppress Pillow's size warning; the limit in this module is lower."""
    from PIL import Image

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def _undecodable(name: str, error: Exception) -> UsageError:
    reason = " ".join(str(error).replace(name, "it").split()) or type(error).__name__
    return UsageError(f"{name}: cannot be decoded as an image ({reason[:120]}); replace or remove it")


def _in_mode(image: Any, mode: str, name: str, convert: bool) -> Any:
    """Return an image in Pillow's mode "RGB" or "L", converted if `convert` allows it."""
    if image.mode == mode and "transparency" not in image.info:
        return image
    wanted = "RGB" if mode == "RGB" else "grey"
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.convert("RGBA").getextrema()[3][0] < 255:
            msg = f"{name}: has transparent pixels; put it on a background and save it as {wanted}"
            raise UsageError(msg)
    elif image.mode not in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV"):
        msg = f"{name}: {image.mode} pixels of more than 8 bits; save it as 8-bit {wanted}"
        raise UsageError(msg)
    if not convert:
        other = "; if all images are grey, set data.channels: 1" if image.mode == "L" else ""
        other = "; where all are RGB, leave data.channels out" if image.mode == "RGB" else other
        remedy = f"save it as {wanted}, or set data.convert: true to convert such images{other}"
        msg = f"{name}: has the color mode {image.mode}, not {wanted}; {remedy}"
        raise UsageError(msg)
    return image.convert(mode)
