"""Operations that the integer simulator computes on real values: float64, with a bound of a float32 computation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import scipy.special  # type: ignore[import-untyped]
import torch

from export.simulated import (
    UNIT_ROUNDOFF,
    Array,
    Float,
    NotSimulated,
    Simulation,
    Value,
    as_float,
    attributes_of,
    column,
)


def _sigmoid(x: Array) -> Array:
    result: Array = scipy.special.expit(x)
    return result


def _alpha(attributes: dict[str, Any], default: float) -> float:
    return float(attributes.get("alpha", default))


# Activations that are computed in float: the function of values and attributes, and how much it can stretch an error.
UNARY: dict[str, tuple[Callable[[Array, dict[str, Any]], Array], Callable[[dict[str, Any]], float]]] = {
    "Sigmoid": (lambda x, _: _sigmoid(x), lambda _: 0.25),
    "Tanh": (lambda x, _: np.tanh(x), lambda _: 1.0),
    "Erf": (lambda x, _: np.asarray(scipy.special.erf(x)), lambda _: 1.13),
    "Elu": (
        lambda x, a: np.where(x > 0, x, _alpha(a, 1.0) * np.expm1(np.minimum(x, 0))),
        lambda a: max(1.0, abs(_alpha(a, 1.0))),
    ),
    "HardSigmoid": (
        lambda x, a: np.clip(_alpha(a, 0.2) * x + a.get("beta", 0.5), 0.0, 1.0),
        lambda a: abs(_alpha(a, 0.2)),
    ),
    "HardSwish": (lambda x, _: x * np.clip(x / 6 + 0.5, 0.0, 1.0), lambda _: 1.5),
    "LeakyRelu": (lambda x, a: np.where(x > 0, x, _alpha(a, 0.01) * x), lambda a: max(1.0, abs(_alpha(a, 0.01)))),
}
# Relative error of a runtime's approximation of one of these, in roundings: its polynomials are short.
_APPROXIMATION = 32


def unary(node: onnx.NodeProto, values: dict[str, Value], *_: Any) -> Value:
    """An activation of one tensor."""
    function, stretch = UNARY[node.op_type]
    attributes, x = attributes_of(node), as_float(values[node.input[0]])
    result = function(x.values, attributes)
    return Float(result, stretch(attributes) * x.error + _APPROXIMATION * UNIT_ROUNDOFF * np.maximum(np.abs(result), 1))


def operands(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], out: Simulation
) -> tuple[Float, Float]:
    """The first two inputs as real values; one may be a constant."""
    first, second = (out.real(name, values, constants) for name in node.input[:2])
    return first, second


def mul(node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], _: Any, out: Simulation) -> Value:
    """The product of two tensors."""
    a, b = operands(node, values, constants, out)
    product = a.values * b.values
    error = np.abs(a.values) * b.error + np.abs(b.values) * a.error + a.error * b.error
    # ONNX Runtime multiplies codes by the quotient of three scales: a handful of roundings.
    return Float(product, error + 8 * UNIT_ROUNDOFF * np.abs(product))


def div(node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], _: Any, out: Simulation) -> Value:
    """A tensor divided by a constant."""
    x, divisor = operands(node, values, constants, out)
    quotient = x.values / divisor.values
    error = (x.error + np.abs(quotient) * divisor.error) / (np.abs(divisor.values) - divisor.error)
    return Float(quotient, error + UNIT_ROUNDOFF * np.abs(quotient))


def prelu(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], _: Any, out: Simulation
) -> Value:
    """LeakyReLU with a slope for each channel."""
    x, slope = operands(node, values, constants, out)
    result = np.where(x.values > 0, x.values, slope.values * x.values)
    error = np.maximum(1.0, np.abs(slope.values)) * x.error + np.abs(x.values) * slope.error
    return Float(result, error + UNIT_ROUNDOFF * np.abs(result))


def batch_norm(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], _: Any, out: Simulation
) -> Value:
    """BatchNorm that no convolution took in."""
    x = as_float(values[node.input[0]])
    stored = [out.real(name, values, constants) for name in node.input[1:5]]
    gamma, beta, mean, variance = (column(constant.values, x.values) for constant in stored)
    d_gamma, d_beta, d_mean, d_variance = (column(constant.error, x.values) for constant in stored)
    noise = variance + attributes_of(node).get("epsilon", 1e-5)
    factor, centred = gamma / np.sqrt(noise), x.values - mean
    result = centred * factor + beta
    spread = np.abs(x.values * factor) + np.abs(mean * factor) + np.abs(beta)
    error = (x.error + d_mean) * np.abs(factor) + d_beta
    error = error + np.abs(centred) * (d_gamma / np.sqrt(noise) + np.abs(factor) * d_variance / (2 * noise))
    return Float(result, error + 8 * UNIT_ROUNDOFF * spread)


def layer_norm(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], _: Any, out: Simulation
) -> Value:
    """LayerNorm over the last axes.

    A runtime may take the variance as the mean square less the squared mean, which cancels: its rounding is relative to
    the mean square.
    """
    x, attributes = as_float(values[node.input[0]]), attributes_of(node)
    axes = tuple(range(attributes.get("axis", -1) % x.values.ndim, x.values.ndim))

    def mean(array: Array) -> Array:
        result: Array = array.mean(axis=axes, keepdims=True)
        return result

    gamma = out.real(node.input[1], values, constants)
    has_beta = len(node.input) > 2 and bool(node.input[2])
    beta = out.real(node.input[2], values, constants) if has_beta else Float(np.zeros(1), np.zeros(1))
    rounding = (8 * np.sqrt(np.prod([x.values.shape[axis] for axis in axes])) + 8) * UNIT_ROUNDOFF
    centred = x.values - mean(x.values)
    d_centred = x.error + mean(x.error) + rounding * (mean(np.abs(x.values)) + np.abs(x.values))
    noise = mean(centred**2) + attributes.get("epsilon", 1e-5)
    d_noise = mean(2 * np.abs(centred) * d_centred + d_centred**2) + rounding * mean(x.values**2)
    inverse = 1 / np.sqrt(noise)
    relative = d_noise / (2 * np.maximum(noise - d_noise, attributes.get("epsilon", 1e-5)))
    normal = centred * inverse
    d_normal = inverse * d_centred + np.abs(normal) * relative + inverse * d_centred * relative
    result = normal * gamma.values + beta.values
    error = np.abs(gamma.values) * d_normal + np.abs(normal) * gamma.error + beta.error
    return Float(result, error + 8 * UNIT_ROUNDOFF * (np.abs(normal * gamma.values) + np.abs(beta.values)))


def softmax(node: onnx.NodeProto, values: dict[str, Value], *_: Any) -> Value:
    """exp(x) over its sum along an axis: an error of x changes both by a factor."""
    x, axis = as_float(values[node.input[0]]), attributes_of(node).get("axis", -1)
    result = np.asarray(scipy.special.softmax(x.values, axis=axis))
    carried = np.expm1(x.error + x.error.max(axis=axis, keepdims=True))
    rounding = (8 * np.sqrt(x.values.shape[axis]) + _APPROXIMATION) * UNIT_ROUNDOFF
    return Float(result, result * (carried + rounding) + UNIT_ROUNDOFF * result)


def reduce_mean(node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], *_: Any) -> Value:
    """The mean over some axes."""
    x, attributes = as_float(values[node.input[0]]), attributes_of(node)
    axes = tuple(attributes["axes"]) if "axes" in attributes else tuple(int(a) for a in constants[node.input[1]])
    keep = bool(attributes.get("keepdims", 1))
    count = int(np.prod([x.values.shape[axis] for axis in axes]))
    mean, spread, error = (a.mean(axis=axes, keepdims=keep) for a in (x.values, np.abs(x.values), x.error))
    return Float(mean, error + (8 * np.sqrt(count) + 8) * UNIT_ROUNDOFF * spread)


def average_pool(node: onnx.NodeProto, values: dict[str, Value], *_: Any) -> Value:
    """Means over windows, which ONNX Runtime takes of codes in float32 and in an order of its own."""
    x, attributes = as_float(values[node.input[0]]), attributes_of(node)
    if attributes.get("auto_pad", b"NOTSET") != b"NOTSET" or any(d != 1 for d in attributes.get("dilations", [1])):
        msg = f"{node.name}: the simulator does not know this AveragePool"
        raise NotSimulated(msg)
    kernel, strides = attributes["kernel_shape"], attributes.get("strides", [1, 1])
    pads, ceil = attributes.get("pads", [0, 0, 0, 0]), bool(attributes.get("ceil_mode", 0))
    if pads[:2] != pads[2:]:
        msg = f"{node.name}: the simulator wants an AveragePool with equal pads on both sides"
        raise NotSimulated(msg)

    def pooled(array: Array) -> Array:
        result: Array = torch.nn.functional.avg_pool2d(
            torch.from_numpy(array), kernel, strides, pads[:2], ceil, bool(attributes.get("count_include_pad", 0))
        ).numpy()
        return result

    count = int(np.prod(kernel))
    error = pooled(x.error) + (8 * np.sqrt(count) + 8) * UNIT_ROUNDOFF * pooled(np.abs(x.values))
    return Float(pooled(x.values), error)
