"""How far a float32 result may lie from the exact one.

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

from crqat.export.simulator.values import UNIT_ROUNDOFF, Array, Float

LIBRARY = 8.0
RATIONAL = 32.0

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


def of_errors(function: Function, attributes: Attributes, inputs: Sequence[Float]) -> Array:
    """What the inputs' errors become, from the ends of their intervals."""
    result = np.asarray(function(attributes, *(x.values for x in inputs)))
    carried = np.zeros(result.shape)
    moving = [x.error.any() for x in inputs]
    for signs in product(*((-1, 1) if moves else (0,) for moves in moving)):
        end = function(attributes, *(x.values + s * x.error for s, x in zip(signs, inputs, strict=True)))
        distance = np.where(end == result, 0.0, np.abs(end - result))
        carried = np.maximum(carried, np.where(np.isnan(distance), np.inf, distance))
    return carried


def around_zero(x: Float) -> Array:
    """Where an interval contains 0 and more."""
    return (np.abs(x.values) <= x.error) & (x.error > 0)


def elementwise(function: Function, roundings: Roundings, pole: Callable[..., Array] | None = None) -> Known:
    """A row of the table; there is no bound where `pole`, of the inputs as Float, is true."""

    def bound(attributes: Attributes, result: Array, *inputs: Float) -> Array:
        carried = of_errors(function, attributes, inputs)
        if pole is not None:
            carried = np.where(pole(*inputs), np.inf, carried)
        rounded: Array = carried + UNIT_ROUNDOFF * roundings(attributes, result, *(x.values for x in inputs))
        return rounded

    return Known(function, bound)


def times(count: float) -> Roundings:
    """`count` roundings of the result."""
    return lambda _, y, *__: count * np.abs(y)


def exact(*_: Any) -> float:
    """Values are selected, and none is rounded."""
    return 0.0


def sum_of(count: int) -> float:
    """How many roundings of the sum of magnitudes a sum of `count` terms is off by."""
    return float(8 * np.sqrt(count) + 8)
