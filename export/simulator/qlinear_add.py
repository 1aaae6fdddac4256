"""Adds two tensors of codes with the rounding of ONNX Runtime's QLinearAdd on each CPU family."""

from __future__ import annotations

import numpy as np

from crqat.core.targets import AddKernel
from crqat.export.simulator.values import UNIT_ROUNDOFF, Added, Array, Codes

# The fixed-point kernel supports quotients of scales in this range, and multiplies by 22 bits of the larger one.
_RATIOS = (np.float32(2.0**-14), np.float32(2.0**8))
_MULTIPLIER_BITS = 22


def qlinear_add(value: Added, scale: np.float32, zero_point: int, kernel: AddKernel) -> tuple[Array, float]:
    """Return the sum in codes of a given scale and zero point, rounded but not clipped, minus the zero point.

    Args:
        value: The two tensors to add.
        scale: Scale of the sum.
        zero_point: Zero point of the sum.
        kernel: The kernel's arithmetic; see `crqat.core.targets.CpuFamily`.

    Returns:
        The codes, float64; and the largest distance, in codes, of the kernel's unrounded result from the exact sum.
    """
    first, second = value.first, value.second
    # A kernel's second tensor may be one number for a whole row of the first; otherwise the kernel swaps them.
    if _is_scalar(first, second):
        first, second = second, first
    if kernel == "float32":
        return _float32(first, second, scale, zero_point), _float32_bound(first, second, scale, zero_point)
    shift = _shift(first, second, scale)
    if shift is None:
        return _unfused(first, second, scale, zero_point), _float32_bound(first, second, scale, zero_point)
    return _fixed_point(first, second, scale, shift), _fixed_point_bound(first, second, scale, shift)


def _is_scalar(first: Codes, second: Codes) -> bool:
    """Whether the first tensor is broadcast along the innermost axis of the sum."""
    shape = np.broadcast_shapes(first.integers.shape, second.integers.shape)
    axis = next((axis for axis in range(1, len(shape) + 1) if shape[-axis] > 1), 1)
    return first.integers.ndim < axis or first.integers.shape[-axis] != shape[-axis]


def _float32(a: Codes, b: Codes, scale: np.float32, zero_point: int) -> Array:
    """Return rint(fma(rA, A, fma(rB, B, c))) - z with c = z - fma(rA, zA, rB zB), in the AVX2 kernel's order.

    A and B are raw codes, zA and zB their zero points, z is the sum's zero point, and rA and rB are the ratios of the
    inputs' scales to the sum's scale.
    """
    ratio_a, ratio_b = _ratio(a, scale), _ratio(b, scale)
    # A float64 holds the product of a float32 and an 8-bit code exactly, so rounding once to float32 is an fma.
    offset = np.float32(float(ratio_a) * a.zero_point + float(ratio_b * np.float32(b.zero_point)))
    constant = np.float32(zero_point) - offset
    raw_a, raw_b = (v.integers.astype(np.float64) + v.zero_point for v in (a, b))
    inner = (float(ratio_b) * raw_b + float(constant)).astype(np.float32)
    return np.rint((float(ratio_a) * raw_a + inner).astype(np.float32)).astype(np.float64) - zero_point


def _float32_bound(a: Codes, b: Codes, scale: np.float32, zero_point: int) -> float:
    """Return a bound on the distance, in codes, of the exact sum from what `_float32` or `_unfused` rounds to a code.

    Raw codes and zero points are multiplied separately: if the scale of an input is far above the scale of the sum, two
    large products cancel, and their rounding errors remain. Let r_a and r_b be the ratios of the inputs' scales to the
    sum's scale, A and B the raw codes, z_a, z_b and z_y the zero points, u the unit roundoff, and
    M = |z_y| + r_a (|A| + |z_a|) + r_b (|B| + |z_b|). At most six numbers are rounded, none larger than M: the products
    r_a z_a and r_b z_b, their sum, its distance from z_y, and the results of the two fma. The two ratios are rounded as
    well, which moves the result by at most u M. The total is at most 7 u M, and below 8 u M with the terms in u^2.
    """
    largest = float(abs(zero_point))
    for codes in (a, b):
        raw = np.abs(codes.integers.astype(np.float64) + codes.zero_point).max(initial=0.0)
        largest += float(codes.scale) / float(scale) * (float(raw) + abs(codes.zero_point))
    return 8 * UNIT_ROUNDOFF * largest


def _shift(a: Codes, b: Codes, scale: np.float32) -> int | None:
    """Return the number of bits by which the fixed-point kernel shifts sums; None if it uses `_unfused` instead."""
    ratios = _ratio(a, scale), _ratio(b, scale)
    if not all(_RATIOS[0] <= ratio < _RATIOS[1] for ratio in ratios):  # NaN fails, too
        return None
    shift = _MULTIPLIER_BITS - int(np.frexp(max(ratios))[1])
    # Rounding to a multiplier may carry into one more bit.
    return shift if shift <= 31 and max(_multiplier(ratio, shift) for ratio in ratios) < 2**_MULTIPLIER_BITS else None


def _multiplier(ratio: np.float32, shift: int) -> int:
    return int(np.rint(np.ldexp(ratio, shift)))


def _fixed_point(a: Codes, b: Codes, scale: np.float32, shift: int) -> Array:
    """Return mA (A - zA) + mB (B - zB), shifted right by `shift` bits; halves are rounded away from zero.

    A and B are raw codes, and zA and zB their zero points. The multipliers mA and mB are the ratios of the inputs'
    scales to the sum's scale, times 2^shift and rounded.
    """
    sums = sum(_multiplier(_ratio(v, scale), shift) * v.integers.astype(np.int64) for v in (a, b))
    rounded: Array = np.sign(sums) * ((np.abs(sums) + (1 << (shift - 1))) >> shift)
    return rounded.astype(np.float64)


def _fixed_point_bound(a: Codes, b: Codes, scale: np.float32, shift: int) -> float:
    """Return a bound on the distance, in codes, of the exact sum from what `_fixed_point` rounds to a code.

    Each ratio of scales is rounded twice: to float32, with a relative error of at most the unit roundoff u, and to its
    multiplier, with an absolute error of at most 2^-shift / 2. The integer operations are exact. The bound uses 2 u
    instead of u to cover the terms in u^2.
    """
    bound = 0.0
    for codes in (a, b):
        largest = float(np.abs(codes.integers.astype(np.float64)).max(initial=0.0))
        bound += largest * (2.0 ** -(shift + 1) + 2 * UNIT_ROUNDOFF * float(codes.scale) / float(scale))
    return bound


def _unfused(a: Codes, b: Codes, scale: np.float32, zero_point: int) -> Array:
    """Return rint(fma(sA, A - zA, sB (B - zB)) / s + z) - z, with raw codes A and B, scales s and zero points z.

    The fixed-point kernel computes this where its multipliers cannot represent the ratios of the scales.
    """
    product = (b.scale * b.integers.astype(np.float32)).astype(np.float64)
    sums = (float(a.scale) * a.integers + product).astype(np.float32)
    total = (sums / scale).astype(np.float32) + np.float32(zero_point)
    codes: Array = np.rint(total).astype(np.float64) - zero_point
    return codes


def _ratio(codes: Codes, scale: np.float32) -> np.float32:
    return np.float32(codes.scale / scale)
