"""Simulated float operations that combine values, with error bounds: reductions, softmax, normalization, products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.special  # type: ignore[import-untyped]

from crqat.export.simulator.error_bounds import LIBRARY, Attributes, Known, sum_of
from crqat.export.simulator.values import UNIT_ROUNDOFF, Array, Float, column


def _axes(attributes: Attributes, x: Array) -> tuple[int, ...]:
    return tuple(int(axis) % x.ndim for axis in attributes.get("axes", range(x.ndim)))


def reduced_count(attributes: Attributes, x: Array) -> int:
    """Return the number of values that each result of a reduction combines."""
    return int(np.prod([x.shape[axis] for axis in _axes(attributes, x)]))


def reduced(function: Callable[..., Any], attributes: Attributes, x: Array) -> Array:
    """Apply a numpy reduction, such as numpy.sum, along the axes that the ONNX node's attributes name."""
    return np.asarray(function(x, axis=_axes(attributes, x), keepdims=bool(attributes.get("keepdims", 1))))


def reduction(function: Callable[..., Any]) -> Known:
    """Return a sum or mean as an operation with an error bound.

    The bound is the same reduction of the inputs' errors, plus the rounding error of the additions.
    """

    def bound(attributes: Attributes, _: Array, x: Float) -> Array:
        rounding = sum_of(reduced_count(attributes, x.values)) * UNIT_ROUNDOFF
        return reduced(function, attributes, x.error + rounding * np.abs(x.values))

    return Known(lambda a, x: reduced(function, a, x), bound)


def extreme(function: Callable[..., Any]) -> Known:
    """Return a maximum or minimum as an operation whose error is at most the largest error of its inputs."""
    return Known(lambda a, x: reduced(function, a, x), lambda a, _, x: reduced(np.max, a, x.error))


def product_bound(attributes: Attributes, result: Array, x: Float) -> Array:
    """Return a bound on the error of a product along axes, from the factors' errors and the roundings of products."""
    factors = np.abs(x.values) + x.error
    rounding = 1 + reduced_count(attributes, x.values) * 2 * UNIT_ROUNDOFF
    return np.asarray(reduced(np.prod, attributes, factors) * rounding - np.abs(result))


def log_sum_exp_bound(attributes: Attributes, result: Array, x: Float) -> Array:
    """Return a bound on the error of log(sum(exp(x))) along axes when it is computed in float32.

    The maximum is subtracted before exp, and added after log.
    """
    spread = reduced(np.max, attributes, x.values) - reduced(np.min, attributes, x.values)
    largest = np.abs(reduced(np.max, attributes, np.abs(x.values)))
    roundings = 2 * LIBRARY + sum_of(reduced_count(attributes, x.values)) + spread + largest + 2 * np.abs(result)
    return np.asarray(reduced(np.max, attributes, x.error) + (roundings + 2) * UNIT_ROUNDOFF)


def cumulative_bound(attributes: Attributes, _: Array, x: Float) -> Array:
    """Return a bound on the error of a cumulative sum when it is computed in float32.

    It is the cumulative sum of the inputs' errors, plus the error of the additions.
    """
    axis = attributes["axis"]
    rounding = sum_of(x.values.shape[axis]) * UNIT_ROUNDOFF
    return np.asarray(np.cumsum(x.error + rounding * np.abs(x.values), axis))


def l2_norm(x: Array, axis: Any, keepdims: bool) -> Array:
    """Return the Euclidean norm."""
    return np.asarray(np.sqrt((x * x).sum(axis=axis, keepdims=keepdims)))


def l2_bound(attributes: Attributes, result: Array, x: Float) -> Array:
    """Return a bound on the error of each Euclidean norm when it is computed in float32."""
    # The norm of a sum is at most the sum of the norms; squares, their sum and the root are rounded.
    rounding = (sum_of(reduced_count(attributes, x.values)) + 2) * UNIT_ROUNDOFF
    return reduced(l2_norm, attributes, x.error) + rounding * result


def lp_normalized(attributes: Attributes, x: Array) -> Array:
    """Divide values by their norm along an axis."""
    axis = attributes.get("axis", -1)
    power = attributes.get("p", 2)
    size = l2_norm(x, axis, True) if power == 2 else np.abs(x).sum(axis=axis, keepdims=True)
    return np.where(size > 0, x / size, 0.0)


def lp_bound(attributes: Attributes, result: Array, x: Float) -> Array:
    """Return a bound on the error of each value of `lp_normalized` when it is computed in float32."""
    axis, power = attributes.get("axis", -1), attributes.get("p", 2)
    size, error = (
        l2_norm(v, axis, True) if power == 2 else np.abs(v).sum(axis=axis, keepdims=True) for v in (x.values, x.error)
    )
    rounding = (sum_of(x.values.shape[axis]) + 4) * UNIT_ROUNDOFF
    carried = np.where(error < size, (x.error + np.abs(result) * error) / (size - error), np.inf)
    return np.where(size > 0, carried, 0.0) + rounding * np.abs(result)


def softmax(attributes: Attributes, x: Array) -> Array:
    """Return the softmax along the node's axis."""
    return np.asarray(scipy.special.softmax(x, axis=attributes.get("axis", -1)))


def _exp_sum_error(attributes: Attributes, x: Float) -> Array:
    """Return the relative error of the sum of exp(x - max x), without the effect of the inputs' errors.

    The rounding error of x - max x becomes a relative error of exp(x - max x). Each term contributes in proportion to
    its share of the sum.
    """
    axis = attributes.get("axis", -1)
    below = x.values.max(axis=axis, keepdims=True) - x.values
    share = softmax(attributes, x.values)
    return np.asarray(sum_of(x.values.shape[axis]) + LIBRARY + (share * below).sum(axis=axis, keepdims=True))


def softmax_bound(attributes: Attributes, result: Array, x: Float) -> Array:
    """Return a bound on the error of each value of a softmax when it is computed in float32.

    Errors of the inputs change each exponential, and the sum of exponentials, by a factor.
    """
    axis = attributes.get("axis", -1)
    below = x.values.max(axis=axis, keepdims=True) - x.values
    carried = np.expm1(x.error + x.error.max(axis=axis, keepdims=True))
    # Roundings of the term (difference and exp), of the sum, and of the quotient or of a reciprocal and a product.
    roundings = below + LIBRARY + _exp_sum_error(attributes, x) + 2
    return np.asarray(result * (carried + UNIT_ROUNDOFF * roundings) + np.finfo(np.float32).tiny)


def log_softmax_bound(attributes: Attributes, result: Array, x: Float) -> Array:
    """Return a bound on the error of each value of a log-softmax, x - max - log sum, when it is computed in float32.

    The logarithm of the sum of exponentials changes by at most the largest error of the inputs.
    """
    axis = attributes.get("axis", -1)
    largest = np.abs(x.values).max(axis=axis, keepdims=True)
    below = x.values.max(axis=axis, keepdims=True) - x.values
    logarithm = np.log(x.values.shape[axis])  # at most
    # max + log sum may be rounded before it is subtracted from x.
    roundings = below + _exp_sum_error(attributes, x) + (LIBRARY + 1) * logarithm + largest + np.abs(result)
    return np.asarray(x.error + x.error.max(axis=axis, keepdims=True) + UNIT_ROUNDOFF * roundings)


def _normalized(x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    centred = x - x.mean(axis=axes, keepdims=True)
    return np.asarray(centred / np.sqrt((centred**2).mean(axis=axes, keepdims=True) + epsilon))


def _normalized_bound(x: Float, gamma: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    """Bound the error of gamma * (x - mean) / sqrt(variance + epsilon), without gamma's own error.

    A runtime may compute the variance as the mean square minus the squared mean, which cancels: its rounding error is
    relative to the mean square. It may also compute x * factor - mean * factor, whose rounding is relative to both.
    """

    def mean(array: Array) -> Array:
        return np.asarray(array.mean(axis=axes, keepdims=True))

    rounding = sum_of(int(np.prod([x.values.shape[axis] for axis in axes]))) * UNIT_ROUNDOFF
    centred = x.values - mean(x.values)
    d_centred = x.error + mean(x.error) + rounding * (mean(np.abs(x.values)) + np.abs(x.values))
    noise = mean(centred**2) + epsilon
    d_noise = mean(2 * np.abs(centred) * d_centred + d_centred**2) + rounding * mean(x.values**2)
    relative = d_noise / (2 * np.maximum(noise - d_noise, epsilon))
    inverse = 1 / np.sqrt(noise)
    d_normal = inverse * d_centred + np.abs(centred * inverse) * relative + inverse * d_centred * relative
    return np.asarray(np.abs(gamma) * d_normal)


def _last_axes(attributes: Attributes, x: Array) -> tuple[int, ...]:
    return tuple(range(attributes.get("axis", -1) % x.ndim, x.ndim))


def layer_norm(attributes: Attributes, x: Array, gamma: Array, beta: Any = 0.0) -> Array:
    """Return LayerNormalization over the last axes."""
    normal = _normalized(x, _last_axes(attributes, x), attributes.get("epsilon", 1e-5))
    return np.asarray(normal * gamma + beta)


def layer_norm_bound(attributes: Attributes, _: Array, x: Float, gamma: Float, beta: Float | None = None) -> Array:
    """Return a bound on the error of each value of a LayerNormalization when it is computed in float32."""
    axes, epsilon = _last_axes(attributes, x.values), attributes.get("epsilon", 1e-5)
    return _affine_bound(x, gamma, beta, axes, epsilon)


def instance_norm(attributes: Attributes, x: Array, gamma: Array, beta: Array) -> Array:
    """Return InstanceNormalization: each channel of each image is normalized over height and width."""
    normal = _normalized(x, tuple(range(2, x.ndim)), attributes.get("epsilon", 1e-5))
    return np.asarray(normal * column(gamma, x) + column(beta, x))


def instance_norm_bound(attributes: Attributes, _: Array, x: Float, gamma: Float, beta: Float) -> Array:
    """Return a bound on the error of each value of an InstanceNormalization when it is computed in float32."""
    gamma, beta = (Float(column(v.values, x.values), column(v.error, x.values)) for v in (gamma, beta))
    return _affine_bound(x, gamma, beta, tuple(range(2, x.values.ndim)), attributes.get("epsilon", 1e-5))


def _affine_bound(x: Float, gamma: Float, beta: Float | None, axes: tuple[int, ...], epsilon: float) -> Array:
    beta = beta or Float(np.zeros(1), np.zeros(1))
    normal = np.abs(_normalized(x.values, axes, epsilon))
    carried = _normalized_bound(x, gamma.values, axes, epsilon) + normal * gamma.error + beta.error
    return np.asarray(carried + 8 * UNIT_ROUNDOFF * (normal * np.abs(gamma.values) + np.abs(beta.values)))


def batch_norm(attributes: Attributes, x: Array, *stored: Array) -> Array:
    """Return BatchNormalization with stored statistics."""
    gamma, beta, mean, variance = (column(v, x) for v in stored)
    return np.asarray((x - mean) * gamma / np.sqrt(variance + attributes.get("epsilon", 1e-5)) + beta)


def batch_norm_bound(attributes: Attributes, _: Array, x: Float, *stored: Float) -> Array:
    """Return a bound on the error of each value of a BatchNormalization when it is computed in float32."""
    gamma, beta, mean, variance = (column(v.values, x.values) for v in stored)
    d_gamma, d_beta, d_mean, d_variance = (column(v.error, x.values) for v in stored)
    noise = variance + attributes.get("epsilon", 1e-5)
    factor, centred = gamma / np.sqrt(noise), x.values - mean
    spread = np.abs(x.values * factor) + np.abs(mean * factor) + np.abs(beta)
    error = (x.error + d_mean) * np.abs(factor) + d_beta
    error = error + np.abs(centred) * (d_gamma / np.sqrt(noise) + np.abs(factor) * d_variance / (2 * noise))
    return np.asarray(error + 8 * UNIT_ROUNDOFF * spread)


def pixels(x: Array) -> Attributes:
    """Return the attributes of a reduction over height and width, which keeps these axes with size 1."""
    return {"axes": list(range(2, x.ndim))}


def einsum(attributes: Attributes, *x: Array) -> Array:
    """Return a product of tensors in Einstein notation."""
    return np.asarray(np.einsum(attributes["equation"].decode(), *x))


def einsum_bound(attributes: Attributes, _: Array, *x: Float) -> Array:
    """Return a bound on the error of each value of an Einsum when it is computed in float32."""
    terms, _, kept = attributes["equation"].decode().replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for term, operand in zip(terms.split(","), x, strict=True):
        sizes.update(zip(term, operand.values.shape, strict=True))
    summed = int(np.prod([size for letter, size in sizes.items() if letter not in kept]))
    smaller = einsum(attributes, *(np.abs(v.values) for v in x))
    larger = einsum(attributes, *(np.abs(v.values) + v.error for v in x))
    return np.asarray(larger - smaller + (sum_of(summed) + len(x)) * UNIT_ROUNDOFF * smaller)
