"""Simulates pooling over any number of dimensions: finds the windows, and computes their maximum or mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np

from crqat.export.simulator.error_bounds import Attributes, sum_of
from crqat.export.simulator.values import UNIT_ROUNDOFF, Array, Float


def padding(sizes: Sequence[int], kernel: Sequence[int], attributes: Attributes) -> list[tuple[int, int]]:
    """Return, for each spatial axis, the padding before and after it, from the node's `pads` or `auto_pad`."""
    rank, auto = len(sizes), attributes.get("auto_pad", b"NOTSET").decode()
    if auto in ("NOTSET", "VALID"):
        pads = attributes.get("pads", [0] * 2 * rank) if auto == "NOTSET" else [0] * 2 * rank
        return list(zip(pads[:rank], pads[rank:], strict=True))
    result = []
    strides, dilations = (attributes.get(name, [1] * rank) for name in ("strides", "dilations"))
    for size, length, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (length - 1) * dilation + 1 - size, 0)
        less, more = total // 2, total - total // 2
        result.append((less, more) if auto == "SAME_UPPER" else (more, less))
    return result


def max_pool(attributes: Attributes, x: Array) -> Array:
    """Return the maximum of each window; padding does not count."""
    lowest = np.iinfo(x.dtype).min if x.dtype.kind == "i" else -np.inf
    return _pooled(attributes, x, np.maximum, lowest)


def average_pool(attributes: Attributes, x: Array) -> Array:
    """Return the mean of each window.

    ONNX Runtime computes the mean in float32 even if its input is codes, and adds in an order of its own; see
    `average_pool_bound`.
    """
    counted = np.ones((1, 1, *x.shape[2:]))
    if attributes.get("count_include_pad", 0):
        around = padding(x.shape[2:], attributes["kernel_shape"], attributes)
        counted = np.pad(counted, ((0, 0), (0, 0), *around), constant_values=1)
        attributes_of_count = {**attributes, "pads": [0] * 2 * len(around), "auto_pad": b"NOTSET"}
        numbers = _pooled(attributes_of_count, counted, np.add, 0.0)
    else:
        numbers = _pooled(attributes, counted, np.add, 0.0)
    sums = _pooled(attributes, x, np.add, 0.0)
    # A window that would start in the padding at the end is left out of the sums.
    numbers = numbers[tuple(slice(size) for size in (1, 1, *sums.shape[2:]))]
    return np.asarray(sums / numbers)


def average_pool_bound(attributes: Attributes, _: Array, x: Float) -> Array:
    """Return a bound on the error of each mean of `average_pool` when it is computed in float32."""
    rounding = sum_of(int(np.prod(attributes["kernel_shape"]))) * UNIT_ROUNDOFF
    return average_pool(attributes, x.error + rounding * np.abs(x.values))


def _pooled(attributes: Attributes, x: Array, join: Callable[..., Array], neutral: float) -> Array:
    """Combine all windows at once: the first pixel of each, then the second, and so on."""
    kernel = attributes["kernel_shape"]
    rank = len(kernel)
    strides, dilations = (attributes.get(name, [1] * rank) for name in ("strides", "dilations"))
    counts, around = [], [(0, 0), (0, 0)]
    pads = padding(x.shape[2:], kernel, attributes)
    for size, length, stride, dilation, (before, behind) in zip(
        x.shape[2:], kernel, strides, dilations, pads, strict=True
    ):
        free = size + before + behind - dilation * (length - 1) - 1
        count = (-(-free // stride) if attributes.get("ceil_mode", 0) else free // stride) + 1
        if (count - 1) * stride >= size + before:  # it would lie in the padding only
            count -= 1
        counts.append(count)
        covered = (count - 1) * stride + dilation * (length - 1) + 1
        around.append((before, max(covered - size - before, 0)))
    padded = np.pad(x, around, constant_values=neutral)
    result: Array | None = None
    for offsets in product(*map(range, kernel)):
        first = [offset * dilation for offset, dilation in zip(offsets, dilations, strict=True)]
        index = (
            slice(start, start + (count - 1) * stride + 1, stride)
            for start, count, stride in zip(first, counts, strides, strict=True)
        )
        part = padded[(slice(None), slice(None), *index)]
        result = part.copy() if result is None else join(result, part, out=result)
    return np.asarray(result)
