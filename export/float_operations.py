"""Operations that the integer simulator computes on real values: float64, with a bound of a float32 computation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import scipy.special  # type: ignore[import-untyped]

from export.simulated import UNIT_ROUNDOFF, Array, Float, Value, as_float, attributes_of, column


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


def operands(node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array]) -> tuple[Float, Float]:
    """The first two inputs as real values; one may be a constant."""
    first, second = (as_float(values[name]) if name in values else as_float(constants[name]) for name in node.input[:2])
    return first, second


def mul(node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], *_: Any) -> Value:
    """The product of two tensors."""
    a, b = operands(node, values, constants)
    product = a.values * b.values
    error = np.abs(a.values) * b.error + np.abs(b.values) * a.error + a.error * b.error
    # ONNX Runtime multiplies codes by the quotient of three scales: a handful of roundings.
    return Float(product, error + 8 * UNIT_ROUNDOFF * np.abs(product))


def div(node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], *_: Any) -> Value:
    """A tensor divided by a constant."""
    x, divisor = as_float(values[node.input[0]]), constants[node.input[1]].astype(np.float64)
    quotient = x.values / divisor
    return Float(quotient, x.error / np.abs(divisor) + UNIT_ROUNDOFF * np.abs(quotient))


def prelu(node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], *_: Any) -> Value:
    """LeakyReLU with a slope for each channel."""
    x, slope = as_float(values[node.input[0]]), constants[node.input[1]].astype(np.float64)
    result = np.where(x.values > 0, x.values, slope * x.values)
    return Float(result, np.maximum(1.0, np.abs(slope)) * x.error + UNIT_ROUNDOFF * np.abs(result))


def batch_norm(node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], *_: Any) -> Value:
    """BatchNorm that no convolution took in."""
    x = as_float(values[node.input[0]])
    gamma, beta, mean, variance = (column(constants[name].astype(np.float64), x.values) for name in node.input[1:5])
    factor = gamma / np.sqrt(variance + attributes_of(node).get("epsilon", 1e-5))
    result = (x.values - mean) * factor + beta
    spread = np.abs(x.values * factor) + np.abs(mean * factor) + np.abs(beta)
    return Float(result, x.error * np.abs(factor) + 8 * UNIT_ROUNDOFF * spread)


def reduce_mean(node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], *_: Any) -> Value:
    """The mean over some axes."""
    x, attributes = as_float(values[node.input[0]]), attributes_of(node)
    axes = tuple(attributes["axes"]) if "axes" in attributes else tuple(int(a) for a in constants[node.input[1]])
    keep = bool(attributes.get("keepdims", 1))
    count = int(np.prod([x.values.shape[axis] for axis in axes]))
    mean, spread, error = (a.mean(axis=axes, keepdims=keep) for a in (x.values, np.abs(x.values), x.error))
    return Float(mean, error + (8 * np.sqrt(count) + 8) * UNIT_ROUNDOFF * spread)
