"""Packs a model's predicted class of each test image into a short text for results.json."""

from __future__ import annotations

import base64
import binascii
import zlib

import numpy as np
import numpy.typing as npt

_TYPE = np.dtype("<i4")


def pack(classes: npt.NDArray[np.int64]) -> str:
    """Encode classes as Base64 of zlib-compressed little-endian int32.

    Args:
        classes: Predicted class of each image, int64 [N].
    """
    return base64.b64encode(zlib.compress(classes.astype(_TYPE).tobytes(), 9)).decode("ascii")


def unpack(text: str, n: int) -> npt.NDArray[np.int64]:
    """Return the predicted class of each image, int64 [N], from a text that `pack` made.

    Args:
        text: Text returned by `pack`.
        n: Expected number of images.

    Raises:
        ValueError: The text is damaged or does not hold exactly `n` class indices.
    """
    size = n * _TYPE.itemsize
    try:
        # The limit keeps a short text that unpacks to gigabytes from filling the memory.
        raw = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), size + 1)
    except (binascii.Error, zlib.error) as error:
        msg = f"has damaged `answers`: {error}"
        raise ValueError(msg) from error
    if len(raw) != size:
        msg = f"has `answers` for another number of images than {n}"
        raise ValueError(msg)
    classes = np.frombuffer(raw, _TYPE).astype(np.int64)
    if n and classes.min() < 0:
        msg = "has `answers` that are not class indices"
        raise ValueError(msg)
    return classes
