"""Table of float operations: for each, a float64 function and a bound on the error of a float32 result.

`FLOAT_OPERATIONS` maps an ONNX operation to a `Known`. The bound of its result has two parts:

* the effect of its inputs' errors: an elementwise function is evaluated at both ends of each input's interval,
  value - error and value + error. For functions that are monotone in each input or convex around a minimum, the
  largest change of the result over the intervals occurs at such an end;
* the operation's own rounding errors: UNIT_ROUNDOFF times the magnitudes that it rounds, each counted as often as it is
  rounded.

To support another operation, add a row; tests/export/simulator/test_float_ops.py requires a test case for each row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import scipy.special  # type: ignore[import-untyped]

from crqat.export.simulator.error_bounds import (
    LIBRARY,
    RATIONAL,
    Attributes,
    Known,
    around_zero,
    elementwise,
    exact,
    sum_of,
    times,
)
from crqat.export.simulator.pool_ops import average_pool, average_pool_bound
from crqat.export.simulator.reduction_ops import (
    batch_norm,
    batch_norm_bound,
    cumulative_bound,
    einsum,
    einsum_bound,
    extreme,
    instance_norm,
    instance_norm_bound,
    l2_bound,
    l2_norm,
    layer_norm,
    layer_norm_bound,
    log_softmax_bound,
    log_sum_exp_bound,
    lp_bound,
    lp_normalized,
    pixels,
    product_bound,
    reduced,
    reduced_count,
    reduction,
    softmax,
    softmax_bound,
)
from crqat.export.simulator.values import (
    UNIT_ROUNDOFF,
    Array,
    Codes,
    Float,
    NotSimulated,
    Simulation,
    Value,
    attributes_of,
)


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


def compared(function: Callable[[Array, Array], Array]) -> Known:
    """Turn a comparison, such as numpy.less, into an operation with the results 0 and 1 and an error bound.

    The bound is 1 where the inputs' errors could change the result, otherwise 0.
    """
    return elementwise(lambda _, x, y: function(x, y).astype(np.float64), exact)


def _magnitudes(_: Attributes, __: Array, x: Array, y: Array) -> Array:
    # Counted once for the sum itself, and once for a kernel that fuses it with a product before it.
    return 2 * (np.abs(x) + np.abs(y))


FLOAT_OPERATIONS: dict[str, Known] = {
    "Neg": elementwise(lambda _, x: -x, exact),
    "Abs": elementwise(lambda _, x: np.abs(x), exact),
    "Sign": elementwise(lambda _, x: np.sign(x), exact),
    "Floor": elementwise(lambda _, x: np.floor(x), exact),
    "Ceil": elementwise(lambda _, x: np.ceil(x), exact),
    "Round": elementwise(lambda _, x: np.rint(x), exact),
    "Clip": elementwise(_clip, exact),
    "Max": elementwise(lambda _, *x: np.maximum.reduce(np.broadcast_arrays(*x)), exact),
    "Min": elementwise(lambda _, *x: np.minimum.reduce(np.broadcast_arrays(*x)), exact),
    "Where": elementwise(_where, exact),
    "Greater": compared(np.greater),
    "GreaterOrEqual": compared(np.greater_equal),
    "Less": compared(np.less),
    "LessOrEqual": compared(np.less_equal),
    "Equal": Known(
        lambda _, x, y: (x == y).astype(np.float64),
        lambda _, __, x, y: (np.abs(x.values - y.values) <= x.error + y.error) & (x.error + y.error > 0),
    ),
    "Not": elementwise(lambda _, x: 1 - x, exact),
    "And": elementwise(lambda _, x, y: np.minimum(x, y), exact),
    "Or": elementwise(lambda _, x, y: np.maximum(x, y), exact),
    "Add": elementwise(lambda _, x, y: x + y, _magnitudes),
    "Sub": elementwise(lambda _, x, y: x - y, _magnitudes),
    # ONNX Runtime multiplies the product of codes by the quotient of three scales: a handful of roundings.
    "Mul": elementwise(lambda _, x, y: x * y, times(8)),
    "Div": elementwise(lambda _, x, y: x / y, times(3), lambda _, y: around_zero(y)),
    "Reciprocal": elementwise(lambda _, x: 1 / x, times(3), around_zero),
    "Sqrt": elementwise(lambda _, x: np.sqrt(x), times(1)),
    "Exp": elementwise(lambda _, x: np.exp(x), times(LIBRARY)),
    "Log": elementwise(lambda _, x: np.log(x), times(LIBRARY)),
    "Pow": elementwise(lambda _, x, y: np.power(x, y), times(LIBRARY), lambda x, y: around_zero(x) & (y.values < 0)),
    "Sigmoid": elementwise(lambda _, x: scipy.special.expit(x), lambda *_: RATIONAL),
    "Tanh": elementwise(lambda _, x: np.tanh(x), lambda *_: RATIONAL),
    "Erf": elementwise(lambda _, x: scipy.special.erf(x), lambda *_: RATIONAL),
    # x * 0.5 * (1 + erf(x / sqrt 2)): the sum is at most 2, and rounded once more.
    "Gelu": elementwise(
        lambda _, x: x * scipy.special.ndtr(x), lambda _, y, x: (RATIONAL / 2 + 1) * np.abs(x) + 3 * np.abs(y)
    ),
    # log(1 + exp(x)): exp is rounded, relative to at most 1; the sum by its own size, of which log makes an absolute
    # error; log of at most 2; and the sum with x where that is positive.
    "Softplus": elementwise(lambda _, x: _softplus(x), lambda _, y, x: 2 * LIBRARY + 1 + np.abs(y)),
    "Mish": elementwise(
        lambda _, x: x * np.tanh(_softplus(x)),
        lambda _, y, x: (RATIONAL + 2 * LIBRARY + 1) * np.abs(x) + np.abs(y),
    ),
    "Softsign": elementwise(lambda _, x: x / (1 + np.abs(x)), times(3)),
    # alpha * (exp(x) - 1): exp and the difference are rounded relative to at most 1.
    "Elu": elementwise(
        lambda a, x: _elu(x, _alpha(a, 1.0)), lambda a, y, x: (LIBRARY + 1) * abs(_alpha(a, 1.0)) + np.abs(y)
    ),
    "Selu": elementwise(_selu, lambda a, y, x: (LIBRARY + 2) * a.get("gamma", 1.06) * _alpha(a, 1.68) + 2 * np.abs(y)),
    # One more rounding, of x / alpha, whose effect after exp is at most exp(t) |t| < 1.
    "Celu": elementwise(_celu, lambda a, y, x: (LIBRARY + 2) * abs(_alpha(a, 1.0)) + np.abs(y)),
    "HardSigmoid": elementwise(
        lambda a, x: np.clip(_alpha(a, 0.2) * x + a.get("beta", 0.5), 0.0, 1.0),
        lambda a, y, x: 2 * np.abs(_alpha(a, 0.2) * x) + abs(a.get("beta", 0.5)),
    ),
    # x / 6 + 0.5 is rounded three times before it is bounded by 1, and the product twice.
    "HardSwish": elementwise(
        lambda _, x: x * np.clip(x / 6 + 0.5, 0.0, 1.0),
        lambda _, y, x: 3 * np.abs(x) * np.minimum(np.abs(x) / 6 + 0.5, 1.0) + 2 * np.abs(y),
    ),
    "Relu": elementwise(lambda _, x: np.maximum(x, 0.0), exact),
    # ONNX Runtime uses a table of codes, computed by a few products.
    "LeakyRelu": elementwise(lambda a, x: np.where(x > 0, x, _alpha(a, 0.01) * x), times(3)),
    "ThresholdedRelu": elementwise(lambda a, x: np.where(x > _alpha(a, 1.0), x, 0.0), exact),
    "PRelu": elementwise(lambda _, x, slope: np.where(x > 0, x, slope * x), times(1)),
    "ReduceSum": reduction(np.sum),
    "ReduceMean": reduction(np.mean),
    "ReduceProd": Known(lambda a, x: reduced(np.prod, a, x), product_bound),
    "ReduceLogSumExp": Known(lambda a, x: reduced(scipy.special.logsumexp, a, x), log_sum_exp_bound),
    "CumSum": Known(lambda a, x: np.cumsum(x, a["axis"]), cumulative_bound),
    "ReduceMax": extreme(np.max),
    "ReduceMin": extreme(np.min),
    "ReduceL1": Known(
        lambda a, x: reduced(np.sum, a, np.abs(x)),
        lambda a, _, x: reduced(
            np.sum, a, x.error + sum_of(reduced_count(a, x.values)) * UNIT_ROUNDOFF * np.abs(x.values)
        ),
    ),
    "ReduceL2": Known(lambda a, x: reduced(l2_norm, a, x), l2_bound),
    "ReduceSumSquare": Known(
        lambda a, x: reduced(np.sum, a, x * x),
        lambda a, _, x: reduced(
            np.sum,
            a,
            2 * np.abs(x.values) * x.error
            + x.error**2
            + (sum_of(reduced_count(a, x.values)) + 1) * UNIT_ROUNDOFF * x.values**2,
        ),
    ),
    "GlobalAveragePool": Known(
        lambda _, x: reduced(np.mean, pixels(x), x),
        lambda _, y, x: FLOAT_OPERATIONS["ReduceMean"].bound(pixels(x.values), y, x),
    ),
    "GlobalMaxPool": Known(
        lambda _, x: reduced(np.max, pixels(x), x), lambda _, __, x: reduced(np.max, pixels(x.values), x.error)
    ),
    "AveragePool": Known(average_pool, average_pool_bound),
    "LpNormalization": Known(lp_normalized, lp_bound),
    "Softmax": Known(softmax, softmax_bound),
    "LogSoftmax": Known(lambda a, x: scipy.special.log_softmax(x, axis=a.get("axis", -1)), log_softmax_bound),
    "LayerNormalization": Known(layer_norm, layer_norm_bound),
    "InstanceNormalization": Known(instance_norm, instance_norm_bound),
    "BatchNormalization": Known(batch_norm, batch_norm_bound),
    "Einsum": Known(einsum, einsum_bound),
}


def compute(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], _: Any, out: Simulation
) -> Value:
    """Compute a node whose operation is in FLOAT_OPERATIONS; return float values with an error bound."""
    attributes, names = attributes_of(node), list(node.input)
    if node.op_type.startswith("Reduce") and len(names) > 1:
        if names[1]:
            attributes["axes"] = constants[names[1]].reshape(-1).tolist()
        names = names[:1]
    if node.op_type == "CumSum":
        attributes["axis"], names = int(constants[names[1]]), names[:1]
    if node.op_type == "Clip":
        ends = zip((-np.inf, np.inf), [*names[1:], "", ""], strict=False)
        bounds = [
            out.real(name, values, constants) if name else Float(np.asarray(end), np.zeros(())) for end, name in ends
        ]
        inputs = [out.real(names[0], values, constants), *bounds]
    else:
        inputs = [out.real(name, values, constants) for name in names if name]
    try:
        result = FLOAT_OPERATIONS[node.op_type](attributes, *inputs)
        product = node.op_type == "Mul" and all(isinstance(values.get(name), Codes) for name in names)
        return replace(result, product=product)
    except NotSimulated as reason:
        msg = f"{node.name}: {reason}"
        raise NotSimulated(msg) from reason


def operands(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], out: Simulation
) -> tuple[Float, Float]:
    """Return a node's first two inputs as float values with error bounds; either may be a constant."""
    first, second = (out.real(name, values, constants) for name in node.input[:2])
    return first, second
