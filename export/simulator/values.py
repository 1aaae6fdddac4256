"""What the integer simulator computes with: codes, sums of them before they are rounded, real values with a bound."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from crqat.core.targets import AddKernel

Array = npt.NDArray[Any]

# Relative rounding error of one float32 operation.
UNIT_ROUNDOFF = 2.0**-24


class NotSimulated(Exception):
    """The file contains an operation that the simulator does not know; the message names node and operation."""


@dataclass
class Codes:
    """Quantized values: integers with the zero point taken off, so that 0 is 0.0.

    Attributes:
        integers: int32.
        scale: One for all.
        zero_point: As stored.
        real: Whether a DequantizeLinear came before.
        selected: Whether a runtime selected these values as real ones: what reads them computes in float.
    """

    integers: Array
    scale: np.float32
    zero_point: int
    real: bool = False
    selected: bool = False

    def same_grid(self, other: Value) -> bool:
        """Whether the other's integers stand for the same values."""
        return isinstance(other, Codes) and (other.scale, other.zero_point) == (self.scale, self.zero_point)


@dataclass
class Sum:
    """What a Conv or Gemm computes before it is rounded: (sums + bias) * unit, per channel on axis 1.

    Attributes:
        sums: int32 sums as float64, exact.
        bias: In units of `unit`; an integer for ONNX Runtime's files.
        unit: s_x s_w, float32 of shape [C].
        magnitude: Sum of |code_x code_w| of each element, for the bound of a float computation of the same.
        terms: Products in each sum.
        relu: Whether a ReLU follows.
        bias_error: How far the bias is known to lie from that of the network, as a real number.
    """

    sums: Array
    bias: Array
    unit: Array
    magnitude: Array
    terms: int
    relu: bool = False
    bias_error: float = 0.0


@dataclass
class Added:
    """a + b of two quantized tensors."""

    first: Codes
    second: Codes
    relu: bool = False


@dataclass
class Pooled:
    """The mean over the pixels of a quantized tensor; `sums` over `count` codes each."""

    sums: Array
    count: int
    scale: np.float32


@dataclass
class Float:
    """Real values, float64.

    Attributes:
        values: What exact arithmetic gives.
        error: Bound of the distance of a float32 computation of the same, of the values' shape.
        product: Whether it is a product of two tensors of codes.
    """

    values: Array
    error: Array
    product: bool = False


Value = Codes | Sum | Added | Pooled | Float | Array


@dataclass
class Simulation:
    """What came out.

    Attributes:
        codes: Tensor of codes (zero point taken off, int32) by its name in the file.
        logits: float32 of shape [N, classes].
        bounds: Name of a tensor of codes -> how far apart, in codes, two correct float32 computations of the same value
            can lie before they are rounded (probabilistic bound of Higham and Mary 2019 with lambda = 8 for a sum, plus
            single roundings): one number, or one for each code. Codes may differ only within this distance of a tie.
        kernel_bounds: Name of a tensor of codes -> how far, in codes, the simulator's own arithmetic in the order of
            ONNX Runtime's kernel can lie from `before_rounding`: where that computes with zero points, more than
            computing with real values does. What judges these codes allows for it.
        before_rounding: Name of a tensor of codes -> values / scale before rounding, float64.
        inexact: Names of tensors of codes that a runtime computes from float values in an order of its own; another
            correct computation may differ from them by one code within `tie_bound` of a tie.
        logits_bound: Bound of the distance of float32 logits, of their shape; None where a runtime's must be the same.
        real_logits: The logits and the bound of any correct float32 computation of them.
        forced: Name of a tensor of codes -> integers that the operations behind it see instead of the computed ones.
        stored_error: Name of a constant -> how far its stored values, in float16, lie from those of the network; name
            of a dequantized weight -> how far its operation's bias does. Bounds then hold for a computation with the
            network's own values.
        grids: Name of a tensor of codes -> the scale, of one or one per channel, and the zero point that it is to have.
            They count instead of the file's.
        in_float: Names of nodes that the runtime was seen to compute in float though their inputs are codes.
        add_kernel: How the runtime adds two tensors of codes; see `crqat.core.targets.CpuFamily`.
    """

    codes: dict[str, Array] = field(default_factory=dict)
    logits: Array = field(default_factory=lambda: np.zeros(0, np.float32))
    bounds: dict[str, Array] = field(default_factory=dict)
    kernel_bounds: dict[str, float] = field(default_factory=dict)
    before_rounding: dict[str, Array] = field(default_factory=dict)
    inexact: set[str] = field(default_factory=set)
    logits_bound: Array | None = None
    real_logits: Float = field(default_factory=lambda: Float(np.zeros(0), np.zeros(0)))
    forced: Mapping[str, Array] = field(default_factory=dict)
    stored_error: Mapping[str, Array] = field(default_factory=dict)
    grids: Mapping[str, tuple[Array, int]] = field(default_factory=dict)
    in_float: Collection[str] = ()
    add_kernel: AddKernel = "float32"

    @property
    def tie_bound(self) -> dict[str, float]:
        """The largest of each of the `bounds`."""
        return {name: float(np.max(bound, initial=0.0)) for name, bound in self.bounds.items()}

    def record(self, name: str, codes: Codes, before: Array, bound: Array, kernel_bound: float) -> Codes:
        """Keep a quantizer's result and give what goes on from there."""
        self.kernel_bounds[name] = kernel_bound
        self.codes[name], self.before_rounding[name], self.bounds[name] = codes.integers, before, bound
        return replace(codes, integers=self.forced.get(name, codes.integers))

    def real(self, name: str, values: Mapping[str, Value], constants: Mapping[str, Array]) -> Float:
        """A tensor or a constant as real values, with a bound."""
        if name in values:
            return as_float(values[name])
        constant = constants[name].astype(np.float64)
        return Float(constant, np.asarray(self.stored_error.get(name, np.zeros(constant.shape))))


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes by name."""
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def column(values: Array, like: Array) -> Array:
    """One value for each channel, in a shape that broadcasts over an array with the channels second."""
    return values.reshape(1, -1, *[1] * (like.ndim - 2))


def _but_channels(values: Array) -> tuple[int, ...]:
    return tuple(axis for axis in range(values.ndim) if axis != 1)


def real_values(value: Value) -> Array:
    """The real value of anything, float64."""
    return as_float(value).values


def as_float(value: Value) -> Float:
    """Anything as real values with the bound of a float32 computation of them."""
    if isinstance(value, Float):
        return value
    if isinstance(value, Codes):
        real = value.integers.astype(np.float64) * float(value.scale)
        return Float(real, UNIT_ROUNDOFF * np.abs(real))
    if isinstance(value, Sum):
        unit = column(value.unit, value.sums).astype(np.float64)
        real = (value.sums + column(value.bias, value.sums)) * unit
        spread = (value.magnitude + np.abs(column(value.bias, value.sums))) * unit
        # The channel's largest: a BatchNorm that is not folded in subtracts the channel's mean from each of its sums.
        spread = np.broadcast_to(spread.max(axis=_but_channels(spread), keepdims=True, initial=0.0), spread.shape)
        error = (8 * np.sqrt(value.terms + 1) + 8) * UNIT_ROUNDOFF * spread + value.bias_error
        return Float(np.maximum(real, 0.0) if value.relu else real, error)
    if isinstance(value, Added):
        first, second = real_values(value.first), real_values(value.second)
        real = first + second
        error = 2 * UNIT_ROUNDOFF * (np.abs(first) + np.abs(second))
        return Float(np.maximum(real, 0.0) if value.relu else real, error)
    if isinstance(value, Pooled):
        real = value.sums * (float(value.scale) / value.count)
        return Float(real, (8 * np.sqrt(value.count) + 8) * UNIT_ROUNDOFF * np.abs(real))
    return Float(value.astype(np.float64), np.zeros(value.shape))
