"""Computes bounds on the error of float32 results against exact results.

Assumptions about libraries, in relative error (one unit in the last place is at most two unit roundoffs):
* +, -, *, / and sqrt are correctly rounded (IEEE 754); a division may be a multiplication by a reciprocal.
* exp, log and pow are off by at most 4 units in the last place. glibc documents up to 2, SLEEF (torch) 1, Eigen and
  MLAS (ONNX Runtime) a few.
* tanh, the logistic function and erf are quotients of polynomials in ONNX Runtime: at most 14 Horner steps of two
  roundings each, a product, a quotient, and an approximation error of at most one unit in the last place. These errors
  are relative to 1, the largest magnitude of the functions, not to the result.
* A sum of n terms in any order is off by (8 sqrt(n) + 8) roundings of the sum of magnitudes: the probabilistic bound
  of Higham and Mary (2019) with lambda = 8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from crqat.export.simulator.values import UNIT_ROUNDOFF, Array, Float

LIBRARY = 8.0
RATIONAL = 32.0

Attributes = dict[str, Any]
Function = Callable[..., Array]
# Maps (attributes, result, input values) to the magnitudes that are rounded, broadcastable to the result's shape.
Roundings = Callable[..., Any]


@dataclass(frozen=True)
class Known:
    """A float operation with a bound on its error.

    Attributes:
        function: (attributes, *float64 inputs) -> float64 result, exact up to float64's own rounding.
        bound: (attributes, result, *inputs as Float) -> largest distance of a float32 result from `function`'s.
    """

    function: Function
    bound: Function

    def __call__(self, attributes: Attributes, *inputs: Float) -> Float:
        """Return the result with a bound on its error, for inputs that have errors of their own."""
        with np.errstate(all="ignore"):
            result = np.asarray(self.function(attributes, *(x.values for x in inputs)))
            error = np.asarray(self.bound(attributes, result, *inputs), np.float64)
        # NaN gives no bound.
        return Float(result, np.broadcast_to(np.where(np.isnan(error), np.inf, error), result.shape))


def of_errors(function: Function, attributes: Attributes, inputs: Sequence[Float]) -> Array:
    """Return how far the inputs' errors can move an operation's result, for each element of the result.

    It is the largest change of the result when each input moves to one end of its interval, value - error or value +
    error.
    """
    result = np.asarray(function(attributes, *(x.values for x in inputs)))
    carried = np.zeros(result.shape)
    moving = [x.error.any() for x in inputs]
    for signs in product(*((-1, 1) if moves else (0,) for moves in moving)):
        end = function(attributes, *(x.values + s * x.error for s, x in zip(signs, inputs, strict=True)))
        distance = np.where(end == result, 0.0, np.abs(end - result))
        carried = np.maximum(carried, np.where(np.isnan(distance), np.inf, distance))
    return carried


def around_zero(x: Float) -> Array:
    """Whether the interval of each value, value - error to value + error, contains 0; False where the error is 0."""
    return (np.abs(x.values) <= x.error) & (x.error > 0)


def elementwise(function: Function, roundings: Roundings, pole: Callable[..., Array] | None = None) -> Known:
    """Return an elementwise operation together with the bound on its error.

    Args:
        function: The operation in float64; see `Known.function`.
        roundings: Returns the magnitudes that a float32 computation rounds; UNIT_ROUNDOFF times these is the
            operation's own part of the bound.
        pole: Returns, for the inputs, where a bound is impossible, such as a division by an interval around zero. The
            bound is infinite there; None if there are no such places.
    """

    def bound(attributes: Attributes, result: Array, *inputs: Float) -> Array:
        carried = of_errors(function, attributes, inputs)
        if pole is not None:
            carried = np.where(pole(*inputs), np.inf, carried)
        rounded: Array = carried + UNIT_ROUNDOFF * roundings(attributes, result, *(x.values for x in inputs))
        return rounded

    return Known(function, bound)


def times(count: float) -> Roundings:
    """Return the `roundings` of an operation that rounds its result `count` times.

    It is a function for `elementwise` that gives count * |result|.
    """
    return lambda _, y, *__: count * np.abs(y)


def exact(*_: Any) -> float:
    """Return 0, the `roundings` of an operation that only selects values and therefore rounds nothing."""
    return 0.0


def sum_of(count: int) -> float:
    """Return the number of roundings that bounds the error of a sum of `count` terms: 8 sqrt(count) + 8.

    The error is at most this number times the unit roundoff times the sum of the terms' magnitudes.
    """
    return float(8 * np.sqrt(count) + 8)
