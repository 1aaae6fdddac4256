"""One table of what a runtime computes in float: each operation's float64 function and the bound of a float32 result.

`FLOAT_OPERATIONS` maps an ONNX operation to a `Known`. The bound of its result has two parts:

* what the errors of its inputs become: elementwise functions are evaluated at the ends of each input's interval,
  value +- error, which contains the result for all that are monotone in each input, or convex around a minimum;
* its own rounding errors: UNIT_ROUNDOFF times the magnitudes that it rounds, each counted as often as it is rounded.

To teach the simulator an operation, add a row; tests/export/simulator/test_float_ops.py asks for a case of each row.

Assumptions about libraries, in relative error (one unit in the last place is at most two unit roundoffs):
* +, -, *, / and sqrt are correctly rounded (IEEE 754); a division may be a multiplication by a reciprocal.
* exp, log and pow are off by at most 4 units in the last place. glibc documents up to 2, SLEEF (torch) 1, Eigen and
  MLAS (ONNX Runtime) a few.
* tanh, the logistic function and erf are quotients of polynomials in ONNX Runtime: at most 14 Horner steps of two
  roundings each, a product, a quotient and a truncation of at most one unit in the last place, relative to their range.
* A sum of n terms in any order is off by (8 sqrt(n) + 8) roundings of the sum of magnitudes: the probabilistic bound
  of Higham and Mary (2019) with lambda = 8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import onnx
import scipy.special  # type: ignore[import-untyped]
import torch

from crqat.export.simulator.values import (
    UNIT_ROUNDOFF,
    Array,
    Float,
    NotSimulated,
    Simulation,
    Value,
    attributes_of,
    column,
)

_LIBRARY = 8.0
_RATIONAL = 32.0

Attributes = dict[str, Any]
Function = Callable[..., Array]
# (attributes, result, values of the inputs) -> magnitudes that are rounded, of a shape that broadcasts to the result's.
Roundings = Callable[..., Any]


@dataclass(frozen=True)
class Known:
    """An operation that is computed in float.

    Attributes:
        function: (attributes, *float64 inputs) -> float64 result, exact but for float64's own rounding.
        bound: (attributes, result, *inputs as Float) -> how far a float32 result may lie from `function`'s.
    """

    function: Function
    bound: Function

    def __call__(self, attributes: Attributes, *inputs: Float) -> Float:
        """The result of inputs that carry errors."""
        with np.errstate(all="ignore"):
            result = np.asarray(self.function(attributes, *(x.values for x in inputs)))
            error = np.asarray(self.bound(attributes, result, *inputs), np.float64)
        # What is not a number bounds nothing.
        return Float(result, np.broadcast_to(np.where(np.isnan(error), np.inf, error), result.shape))


def _of_errors(function: Function, attributes: Attributes, inputs: Sequence[Float]) -> Array:
    """What the inputs' errors become, from the ends of their intervals."""
    result = np.asarray(function(attributes, *(x.values for x in inputs)))
    carried = np.zeros(result.shape)
    moving = [x.error.any() for x in inputs]
    for signs in product(*((-1, 1) if moves else (0,) for moves in moving)):
        end = function(attributes, *(x.values + s * x.error for s, x in zip(signs, inputs, strict=True)))
        distance = np.where(end == result, 0.0, np.abs(end - result))
        carried = np.maximum(carried, np.where(np.isnan(distance), np.inf, distance))
    return carried


def _around_zero(x: Float) -> Array:
    """Where an interval contains 0 and more."""
    return (np.abs(x.values) <= x.error) & (x.error > 0)


def _elementwise(function: Function, roundings: Roundings, pole: Callable[..., Array] | None = None) -> Known:
    """A row of the table; there is no bound where `pole`, of the inputs as Float, is true."""

    def bound(attributes: Attributes, result: Array, *inputs: Float) -> Array:
        carried = _of_errors(function, attributes, inputs)
        if pole is not None:
            carried = np.where(pole(*inputs), np.inf, carried)
        rounded: Array = carried + UNIT_ROUNDOFF * roundings(attributes, result, *(x.values for x in inputs))
        return rounded

    return Known(function, bound)


def _times(count: float) -> Roundings:
    """`count` roundings of the result."""
    return lambda _, y, *__: count * np.abs(y)


def _exact(*_: Any) -> float:
    """Values are selected, and none is rounded."""
    return 0.0


def _sum_of(count: int) -> float:
    return float(8 * np.sqrt(count) + 8)


def _alpha(attributes: Attributes, default: float) -> float:
    return float(attributes.get("alpha", default))


def _softplus(x: Array) -> Array:
    return np.asarray(np.logaddexp(0, x))


def _elu(x: Array, alpha: float) -> Array:
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def _celu(a: Attributes, x: Array) -> Array:
    alpha = _alpha(a, 1.0)
    return np.maximum(x, 0) + np.minimum(0, alpha * np.expm1(np.minimum(x, 0) / alpha))


def _selu(a: Attributes, x: Array) -> Array:
    return np.asarray(a.get("gamma", 1.05070102214813232421875) * _elu(x, _alpha(a, 1.67326319217681884765625)))


def _clip(_: Attributes, x: Array, low: Any = -np.inf, high: Any = np.inf) -> Array:
    return np.asarray(np.minimum(np.maximum(x, low), high))


def _where(_: Attributes, condition: Array, x: Array, y: Array) -> Array:
    return np.where(condition > 0.5, x, y)


def _compared(function: Callable[[Array, Array], Array]) -> Known:
    """Truth as 0 and 1, with the error 1 where the inputs' errors leave it open."""
    return _elementwise(lambda _, x, y: function(x, y).astype(np.float64), _exact)


def _magnitudes(_: Attributes, __: Array, x: Array, y: Array) -> Array:
    # Once on its own, and once where a product before it takes it into its sum.
    return 2 * (np.abs(x) + np.abs(y))


def _axes(attributes: Attributes, x: Array) -> tuple[int, ...]:
    return tuple(int(axis) % x.ndim for axis in attributes.get("axes", range(x.ndim)))


def _count(attributes: Attributes, x: Array) -> int:
    return int(np.prod([x.shape[axis] for axis in _axes(attributes, x)]))


def _reduced(function: Callable[..., Any], attributes: Attributes, x: Array) -> Array:
    return np.asarray(function(x, axis=_axes(attributes, x), keepdims=bool(attributes.get("keepdims", 1))))


def _reduction(function: Callable[..., Any]) -> Known:
    """A sum or a mean: its error is the errors' sum or mean, and that of adding."""

    def bound(attributes: Attributes, _: Array, x: Float) -> Array:
        rounding = _sum_of(_count(attributes, x.values)) * UNIT_ROUNDOFF
        return _reduced(function, attributes, x.error + rounding * np.abs(x.values))

    return Known(lambda a, x: _reduced(function, a, x), bound)


def _extreme(function: Callable[..., Any]) -> Known:
    """A largest or smallest value: off by no more than the largest error."""
    return Known(lambda a, x: _reduced(function, a, x), lambda a, _, x: _reduced(np.max, a, x.error))


def _norm(x: Array, axis: Any, keepdims: bool) -> Array:
    return np.asarray(np.sqrt((x * x).sum(axis=axis, keepdims=keepdims)))


def _l2_bound(attributes: Attributes, result: Array, x: Float) -> Array:
    # The norm of a sum is at most the sum of the norms; squares, their sum and the root are rounded.
    rounding = (_sum_of(_count(attributes, x.values)) + 2) * UNIT_ROUNDOFF
    return _reduced(_norm, attributes, x.error) + rounding * result


def _lp_normalized(attributes: Attributes, x: Array) -> Array:
    axis = attributes.get("axis", -1)
    power = attributes.get("p", 2)
    size = _norm(x, axis, True) if power == 2 else np.abs(x).sum(axis=axis, keepdims=True)
    return np.where(size > 0, x / size, 0.0)


def _lp_bound(attributes: Attributes, result: Array, x: Float) -> Array:
    axis, power = attributes.get("axis", -1), attributes.get("p", 2)
    size, error = (
        _norm(v, axis, True) if power == 2 else np.abs(v).sum(axis=axis, keepdims=True) for v in (x.values, x.error)
    )
    rounding = (_sum_of(x.values.shape[axis]) + 4) * UNIT_ROUNDOFF
    carried = np.where(error < size, (x.error + np.abs(result) * error) / (size - error), np.inf)
    return np.where(size > 0, carried, 0.0) + rounding * np.abs(result)


def _softmax(attributes: Attributes, x: Array) -> Array:
    return np.asarray(scipy.special.softmax(x, axis=attributes.get("axis", -1)))


def _exp_sum_error(attributes: Attributes, x: Float) -> Array:
    """How far the sum of exp(x - max x) may be off, relative to it, inputs' errors aside.

    The difference is rounded, which exp turns into a relative error of each term: it counts by the term's share.
    """
    axis = attributes.get("axis", -1)
    below = x.values.max(axis=axis, keepdims=True) - x.values
    share = _softmax(attributes, x.values)
    return np.asarray(_sum_of(x.values.shape[axis]) + _LIBRARY + (share * below).sum(axis=axis, keepdims=True))


def _softmax_bound(attributes: Attributes, result: Array, x: Float) -> Array:
    """An error of x changes the term and the sum by a factor each."""
    axis = attributes.get("axis", -1)
    below = x.values.max(axis=axis, keepdims=True) - x.values
    carried = np.expm1(x.error + x.error.max(axis=axis, keepdims=True))
    # The term: the difference's rounding and exp's; then the sum's; then the quotient's, or a reciprocal and a product.
    roundings = below + _LIBRARY + _exp_sum_error(attributes, x) + 2
    return np.asarray(result * (carried + UNIT_ROUNDOFF * roundings) + np.finfo(np.float32).tiny)


def _log_softmax_bound(attributes: Attributes, result: Array, x: Float) -> Array:
    """Of x - max - log sum: the logarithm of a sum of exponentials moves by no more than the largest error."""
    axis = attributes.get("axis", -1)
    largest = np.abs(x.values).max(axis=axis, keepdims=True)
    below = x.values.max(axis=axis, keepdims=True) - x.values
    logarithm = np.log(x.values.shape[axis])  # at most
    # max + log sum may be rounded before it is taken from x.
    roundings = below + _exp_sum_error(attributes, x) + (_LIBRARY + 1) * logarithm + largest + np.abs(result)
    return np.asarray(x.error + x.error.max(axis=axis, keepdims=True) + UNIT_ROUNDOFF * roundings)


def _normalized(x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    centred = x - x.mean(axis=axes, keepdims=True)
    return np.asarray(centred / np.sqrt((centred**2).mean(axis=axes, keepdims=True) + epsilon))


def _normalized_bound(x: Float, gamma: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    """The bound of gamma * (x - mean) / sqrt(variance + epsilon), gamma's own error aside.

    A runtime may take the variance as the mean square less the squared mean, which cancels: its rounding is relative to
    the mean square. It may also compute x * factor - mean * factor, which is rounded relative to both.
    """

    def mean(array: Array) -> Array:
        return np.asarray(array.mean(axis=axes, keepdims=True))

    rounding = _sum_of(int(np.prod([x.values.shape[axis] for axis in axes]))) * UNIT_ROUNDOFF
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


def _layer_norm(attributes: Attributes, x: Array, gamma: Array, beta: Any = 0.0) -> Array:
    normal = _normalized(x, _last_axes(attributes, x), attributes.get("epsilon", 1e-5))
    return np.asarray(normal * gamma + beta)


def _layer_norm_bound(attributes: Attributes, _: Array, x: Float, gamma: Float, beta: Float | None = None) -> Array:
    axes, epsilon = _last_axes(attributes, x.values), attributes.get("epsilon", 1e-5)
    return _affine_bound(x, gamma, beta, axes, epsilon)


def _instance_norm(attributes: Attributes, x: Array, gamma: Array, beta: Array) -> Array:
    normal = _normalized(x, tuple(range(2, x.ndim)), attributes.get("epsilon", 1e-5))
    return np.asarray(normal * column(gamma, x) + column(beta, x))


def _instance_norm_bound(attributes: Attributes, _: Array, x: Float, gamma: Float, beta: Float) -> Array:
    gamma, beta = (Float(column(v.values, x.values), column(v.error, x.values)) for v in (gamma, beta))
    return _affine_bound(x, gamma, beta, tuple(range(2, x.values.ndim)), attributes.get("epsilon", 1e-5))


def _affine_bound(x: Float, gamma: Float, beta: Float | None, axes: tuple[int, ...], epsilon: float) -> Array:
    beta = beta or Float(np.zeros(1), np.zeros(1))
    normal = np.abs(_normalized(x.values, axes, epsilon))
    carried = _normalized_bound(x, gamma.values, axes, epsilon) + normal * gamma.error + beta.error
    return np.asarray(carried + 8 * UNIT_ROUNDOFF * (normal * np.abs(gamma.values) + np.abs(beta.values)))


def _batch_norm(attributes: Attributes, x: Array, *stored: Array) -> Array:
    gamma, beta, mean, variance = (column(v, x) for v in stored)
    return np.asarray((x - mean) * gamma / np.sqrt(variance + attributes.get("epsilon", 1e-5)) + beta)


def _batch_norm_bound(attributes: Attributes, _: Array, x: Float, *stored: Float) -> Array:
    gamma, beta, mean, variance = (column(v.values, x.values) for v in stored)
    d_gamma, d_beta, d_mean, d_variance = (column(v.error, x.values) for v in stored)
    noise = variance + attributes.get("epsilon", 1e-5)
    factor, centred = gamma / np.sqrt(noise), x.values - mean
    spread = np.abs(x.values * factor) + np.abs(mean * factor) + np.abs(beta)
    error = (x.error + d_mean) * np.abs(factor) + d_beta
    error = error + np.abs(centred) * (d_gamma / np.sqrt(noise) + np.abs(factor) * d_variance / (2 * noise))
    return np.asarray(error + 8 * UNIT_ROUNDOFF * spread)


def _pooled(attributes: Attributes, x: Array) -> Array:
    return torch.nn.functional.avg_pool2d(
        torch.from_numpy(np.ascontiguousarray(x)),
        attributes["kernel_shape"],
        attributes.get("strides", [1, 1]),
        attributes.get("pads", [0, 0, 0, 0])[:2],
        bool(attributes.get("ceil_mode", 0)),
        bool(attributes.get("count_include_pad", 0)),
    ).numpy()


def _average_pool(attributes: Attributes, x: Array) -> Array:
    """Means over windows, which ONNX Runtime takes of codes in float32 and in an order of its own."""
    pads = attributes.get("pads", [0, 0, 0, 0])
    if attributes.get("auto_pad", b"NOTSET") != b"NOTSET" or any(d != 1 for d in attributes.get("dilations", [1])):
        msg = "the simulator does not know this AveragePool"
        raise NotSimulated(msg)
    if x.ndim != 4 or pads[:2] != pads[2:]:
        msg = "the simulator wants an AveragePool of images with equal pads on both sides"
        raise NotSimulated(msg)
    return _pooled(attributes, x)


def _average_pool_bound(attributes: Attributes, _: Array, x: Float) -> Array:
    rounding = _sum_of(int(np.prod(attributes["kernel_shape"]))) * UNIT_ROUNDOFF
    return _pooled(attributes, x.error + rounding * np.abs(x.values))


def _pixels(x: Array) -> Attributes:
    return {"axes": list(range(2, x.ndim))}


def _einsum(attributes: Attributes, *x: Array) -> Array:
    return np.asarray(np.einsum(attributes["equation"].decode(), *x))


def _einsum_bound(attributes: Attributes, _: Array, *x: Float) -> Array:
    terms, _, kept = attributes["equation"].decode().replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for term, operand in zip(terms.split(","), x, strict=True):
        sizes.update(zip(term, operand.values.shape, strict=True))
    summed = int(np.prod([size for letter, size in sizes.items() if letter not in kept]))
    smaller = _einsum(attributes, *(np.abs(v.values) for v in x))
    larger = _einsum(attributes, *(np.abs(v.values) + v.error for v in x))
    return np.asarray(larger - smaller + (_sum_of(summed) + len(x)) * UNIT_ROUNDOFF * smaller)


FLOAT_OPERATIONS: dict[str, Known] = {
    "Neg": _elementwise(lambda _, x: -x, _exact),
    "Abs": _elementwise(lambda _, x: np.abs(x), _exact),
    "Sign": _elementwise(lambda _, x: np.sign(x), _exact),
    "Floor": _elementwise(lambda _, x: np.floor(x), _exact),
    "Ceil": _elementwise(lambda _, x: np.ceil(x), _exact),
    "Round": _elementwise(lambda _, x: np.rint(x), _exact),
    "Clip": _elementwise(_clip, _exact),
    "Max": _elementwise(lambda _, *x: np.maximum.reduce(np.broadcast_arrays(*x)), _exact),
    "Min": _elementwise(lambda _, *x: np.minimum.reduce(np.broadcast_arrays(*x)), _exact),
    "Where": _elementwise(_where, _exact),
    "Greater": _compared(np.greater),
    "GreaterOrEqual": _compared(np.greater_equal),
    "Less": _compared(np.less),
    "LessOrEqual": _compared(np.less_equal),
    "Equal": Known(
        lambda _, x, y: (x == y).astype(np.float64),
        lambda _, __, x, y: (np.abs(x.values - y.values) <= x.error + y.error) & (x.error + y.error > 0),
    ),
    "Not": _elementwise(lambda _, x: 1 - x, _exact),
    "And": _elementwise(lambda _, x, y: np.minimum(x, y), _exact),
    "Or": _elementwise(lambda _, x, y: np.maximum(x, y), _exact),
    "Add": _elementwise(lambda _, x, y: x + y, _magnitudes),
    "Sub": _elementwise(lambda _, x, y: x - y, _magnitudes),
    # ONNX Runtime's product of codes is multiplied by the quotient of three scales: a handful of roundings.
    "Mul": _elementwise(lambda _, x, y: x * y, _times(8)),
    "Div": _elementwise(lambda _, x, y: x / y, _times(3), lambda _, y: _around_zero(y)),
    "Reciprocal": _elementwise(lambda _, x: 1 / x, _times(3), _around_zero),
    "Sqrt": _elementwise(lambda _, x: np.sqrt(x), _times(1)),
    "Exp": _elementwise(lambda _, x: np.exp(x), _times(_LIBRARY)),
    "Log": _elementwise(lambda _, x: np.log(x), _times(_LIBRARY)),
    "Pow": _elementwise(
        lambda _, x, y: np.power(x, y), _times(_LIBRARY), lambda x, y: _around_zero(x) & (y.values < 0)
    ),
    "Sigmoid": _elementwise(lambda _, x: scipy.special.expit(x), lambda *_: _RATIONAL),
    "Tanh": _elementwise(lambda _, x: np.tanh(x), lambda *_: _RATIONAL),
    "Erf": _elementwise(lambda _, x: scipy.special.erf(x), lambda *_: _RATIONAL),
    # x * 0.5 * (1 + erf(x / sqrt 2)): the sum is at most 2, and rounded once more.
    "Gelu": _elementwise(
        lambda _, x: x * scipy.special.ndtr(x), lambda _, y, x: (_RATIONAL / 2 + 1) * np.abs(x) + 3 * np.abs(y)
    ),
    # log(1 + exp(x)): exp is rounded, relative to at most 1; the sum by its own size, of which log makes an absolute
    # error; log of at most 2; and the sum with x where that is positive.
    "Softplus": _elementwise(lambda _, x: _softplus(x), lambda _, y, x: 2 * _LIBRARY + 1 + np.abs(y)),
    "Mish": _elementwise(
        lambda _, x: x * np.tanh(_softplus(x)),
        lambda _, y, x: (_RATIONAL + 2 * _LIBRARY + 1) * np.abs(x) + np.abs(y),
    ),
    "Softsign": _elementwise(lambda _, x: x / (1 + np.abs(x)), _times(3)),
    # alpha * (exp(x) - 1): exp and the difference are rounded relative to at most 1.
    "Elu": _elementwise(
        lambda a, x: _elu(x, _alpha(a, 1.0)), lambda a, y, x: (_LIBRARY + 1) * abs(_alpha(a, 1.0)) + np.abs(y)
    ),
    "Selu": _elementwise(
        _selu, lambda a, y, x: (_LIBRARY + 2) * a.get("gamma", 1.06) * _alpha(a, 1.68) + 2 * np.abs(y)
    ),
    # One rounding of x / alpha more, which is at most exp(t) |t| < 1 behind exp.
    "Celu": _elementwise(_celu, lambda a, y, x: (_LIBRARY + 2) * abs(_alpha(a, 1.0)) + np.abs(y)),
    "HardSigmoid": _elementwise(
        lambda a, x: np.clip(_alpha(a, 0.2) * x + a.get("beta", 0.5), 0.0, 1.0),
        lambda a, y, x: 2 * np.abs(_alpha(a, 0.2) * x) + abs(a.get("beta", 0.5)),
    ),
    # x / 6 + 0.5 is rounded three times before it is bounded by 1, and the product twice.
    "HardSwish": _elementwise(
        lambda _, x: x * np.clip(x / 6 + 0.5, 0.0, 1.0),
        lambda _, y, x: 3 * np.abs(x) * np.minimum(np.abs(x) / 6 + 0.5, 1.0) + 2 * np.abs(y),
    ),
    "Relu": _elementwise(lambda _, x: np.maximum(x, 0.0), _exact),
    # A table of codes in ONNX Runtime, made of a few products.
    "LeakyRelu": _elementwise(lambda a, x: np.where(x > 0, x, _alpha(a, 0.01) * x), _times(3)),
    "ThresholdedRelu": _elementwise(lambda a, x: np.where(x > _alpha(a, 1.0), x, 0.0), _exact),
    "PRelu": _elementwise(lambda _, x, slope: np.where(x > 0, x, slope * x), _times(1)),
    "ReduceSum": _reduction(np.sum),
    "ReduceMean": _reduction(np.mean),
    "ReduceMax": _extreme(np.max),
    "ReduceMin": _extreme(np.min),
    "ReduceL1": Known(
        lambda a, x: _reduced(np.sum, a, np.abs(x)),
        lambda a, _, x: _reduced(np.sum, a, x.error + _sum_of(_count(a, x.values)) * UNIT_ROUNDOFF * np.abs(x.values)),
    ),
    "ReduceL2": Known(lambda a, x: _reduced(_norm, a, x), _l2_bound),
    "ReduceSumSquare": Known(
        lambda a, x: _reduced(np.sum, a, x * x),
        lambda a, _, x: _reduced(
            np.sum,
            a,
            2 * np.abs(x.values) * x.error
            + x.error**2
            + (_sum_of(_count(a, x.values)) + 1) * UNIT_ROUNDOFF * x.values**2,
        ),
    ),
    "GlobalAveragePool": Known(
        lambda _, x: _reduced(np.mean, _pixels(x), x),
        lambda _, y, x: FLOAT_OPERATIONS["ReduceMean"].bound(_pixels(x.values), y, x),
    ),
    "GlobalMaxPool": Known(
        lambda _, x: _reduced(np.max, _pixels(x), x), lambda _, __, x: _reduced(np.max, _pixels(x.values), x.error)
    ),
    "AveragePool": Known(_average_pool, _average_pool_bound),
    "LpNormalization": Known(_lp_normalized, _lp_bound),
    "Softmax": Known(_softmax, _softmax_bound),
    "LogSoftmax": Known(lambda a, x: scipy.special.log_softmax(x, axis=a.get("axis", -1)), _log_softmax_bound),
    "LayerNormalization": Known(_layer_norm, _layer_norm_bound),
    "InstanceNormalization": Known(_instance_norm, _instance_norm_bound),
    "BatchNormalization": Known(_batch_norm, _batch_norm_bound),
    "Einsum": Known(_einsum, _einsum_bound),
}


def compute(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], _: Any, out: Simulation
) -> Value:
    """An operation of the table on real values."""
    attributes, names = attributes_of(node), list(node.input)
    if node.op_type.startswith("Reduce") and len(names) > 1:
        if names[1]:
            attributes["axes"] = constants[names[1]].reshape(-1).tolist()
        names = names[:1]
    if node.op_type == "Clip":
        ends = zip((-np.inf, np.inf), [*names[1:], "", ""], strict=False)
        bounds = [
            out.real(name, values, constants) if name else Float(np.asarray(end), np.zeros(())) for end, name in ends
        ]
        inputs = [out.real(names[0], values, constants), *bounds]
    else:
        inputs = [out.real(name, values, constants) for name in names if name]
    try:
        return FLOAT_OPERATIONS[node.op_type](attributes, *inputs)
    except NotSimulated as reason:
        msg = f"{node.name}: {reason}"
        raise NotSimulated(msg) from reason


def operands(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], out: Simulation
) -> tuple[Float, Float]:
    """The first two inputs as real values; one may be a constant."""
    first, second = (out.real(name, values, constants) for name in node.input[:2])
    return first, second
