"""Values of the integer simulator: codes, unrounded sums of codes, and float values with an error bound."""

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
    """Exception for an operation that the simulator does not support; the message names node and operation."""


@dataclass
class Codes:
    """Quantized values: integers minus the zero point, so that 0 is 0.0.

    Attributes:
        integers: Codes minus the zero point, int32.
        scale: One scale for all values.
        zero_point: Zero point as stored in the file.
        real: Whether the codes have passed a DequantizeLinear.
        selected: Whether the codes passed an operation that runtimes compute on dequantized values, such as Max or
            Where (see `movement_ops`); the next operation then computes in float, too.
    """

    integers: Array
    scale: np.float32
    zero_point: int
    real: bool = False
    selected: bool = False

    def same_grid(self, other: Value) -> bool:
        """Whether the other value's integers have the same scale and zero point."""
        return isinstance(other, Codes) and (other.scale, other.zero_point) == (self.scale, self.zero_point)


@dataclass
class Sum:
    """Unrounded result of a Conv or Gemm: (sums + bias) * unit, per channel on axis 1.

    Attributes:
        sums: int32 sums as float64, exact.
        bias: Bias in units of `unit`; an integer in ONNX Runtime's files.
        unit: Product of the scales, s_x s_w, float32 of shape [C].
        magnitude: Sum of |code_x code_w| for each element, for the bound of a float computation.
        terms: Number of products in each sum.
        relu: Whether a ReLU follows.
        bias_error: Largest difference between the file's bias and the network's own bias, as a real number; 0 if the
            caller of the simulation gave none.
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
    """Sum of two tensors of codes, not computed yet: the quantizer after it rounds the result."""

    first: Codes
    second: Codes
    relu: bool = False


@dataclass
class Pooled:
    """Mean over the pixels of a tensor of codes, not rounded yet: `sums / count`, where each sum has `count` codes."""

    sums: Array
    count: int
    scale: np.float32


@dataclass
class Float:
    """Float values in float64, with an error bound.

    Attributes:
        values: Results of exact arithmetic.
        error: Bound on the error of a float32 computation, in the shape of the values.
        product: Whether the values are a product of two tensors of codes.
    """

    values: Array
    error: Array
    product: bool = False


Value = Codes | Sum | Added | Pooled | Float | Array


@dataclass
class Simulation:
    """Results of a simulation, and its options.

    Attributes:
        codes: Tensors of codes (minus the zero point, int32) by name in the file.
        logits: float32 of shape [N, classes].
        bounds: By name of a tensor of codes: largest distance, in codes, between two correct float32 computations of
            the same value before rounding (probabilistic bound of Higham and Mary 2019 with lambda = 8 for a sum, plus
            single roundings); one number, or one for each code. Codes may differ only within this distance of a tie.
        kernel_bounds: By name of a tensor of codes: largest distance, in codes, between `before_rounding`, which is
            exact, and the value that the simulator rounds to a code, which it computes in float32 in the order of ONNX
            Runtime's kernel. For an Add of codes with zero points this distance may exceed `bounds`. A comparison of
            these codes with those of another simulation therefore adds both bounds.
        before_rounding: By name of a tensor of codes: values / scale before rounding, float64.
        inexact: Names of tensors of codes that a runtime computes from float values in its own order; another correct
            computation may differ from them by one code within `tie_bound` of a tie.
        logits_bound: Largest difference that `logits` may have from a runtime's logits, in their shape; None if both
            must be identical, because the simulator computes the logits by the arithmetic of the runtime's kernel.
        real_logits: The logits in float64, not rounded as a kernel rounds them, always with a bound on the error of any
            correct float32 computation. They are for the comparison with torch, which uses no integer kernel.
        forced: By name of a tensor of codes: integers that later operations receive instead of the computed ones.
        stored_error: Errors of the file's stored values against the network's own values. The error of a constant has
            the constant's name. The error of a layer's bias has the name of the layer's dequantized weight, because
            files store biases in several forms. With these errors, all bounds hold for a computation with the
            network's own values; without them, only for a computation with the file's values.
        grids: By name of a tensor of codes: the scale, or scales per channel, and the zero point that the simulation
            uses instead of those in the file.
        in_float: Names of nodes that the runtime computes in float although their inputs are codes.
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
        """Return the largest of each tensor's `bounds`, by name: how far from a tie its codes may differ."""
        return {name: float(np.max(bound, initial=0.0)) for name, bound in self.bounds.items()}

    def record(self, name: str, codes: Codes, before: Array, bound: Array, kernel_bound: float) -> Codes:
        """Record the codes that a quantizer computed, with their bounds; return the codes for later operations.

        Later operations receive the codes in `forced` if it has any for this tensor, otherwise the computed codes.
        """
        self.kernel_bounds[name] = kernel_bound
        self.codes[name], self.before_rounding[name], self.bounds[name] = codes.integers, before, bound
        return replace(codes, integers=self.forced.get(name, codes.integers))

    def real(self, name: str, values: Mapping[str, Value], constants: Mapping[str, Array]) -> Float:
        """Return the tensor or constant of a given name as float values with an error bound."""
        if name in values:
            return as_float(values[name])
        constant = constants[name].astype(np.float64)
        return Float(constant, np.asarray(self.stored_error.get(name, np.zeros(constant.shape))))


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """Return a node's attributes by name."""
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def column(values: Array, like: Array) -> Array:
    """Reshape one value per channel to broadcast over an array with the channels on axis 1."""
    return values.reshape(1, -1, *[1] * (like.ndim - 2))


def but_channels(values: Array) -> tuple[int, ...]:
    """Return all axes of an array except axis 1, that of the channels."""
    return tuple(axis for axis in range(values.ndim) if axis != 1)


def real_values(value: Value) -> Array:
    """Return any value as float64 numbers, without the error bounds of `as_float`, which take longer."""
    if isinstance(value, Float):
        return value.values
    if isinstance(value, Codes):
        return value.integers * float(value.scale)
    if isinstance(value, Pooled):
        return value.sums * (float(value.scale) / value.count)
    if isinstance(value, Sum):
        real = (value.sums + column(value.bias, value.sums)) * column(value.unit, value.sums).astype(np.float64)
    elif isinstance(value, Added):
        real = real_values(value.first) + real_values(value.second)
    else:
        return value.astype(np.float64)
    return np.maximum(real, 0.0, out=real) if value.relu else real


def as_float(value: Value) -> Float:
    """Return any value as float values, with the error bound of a float32 computation."""
    if isinstance(value, Float):
        return value
    real = real_values(value)
    if isinstance(value, Codes):
        return Float(real, UNIT_ROUNDOFF * np.abs(real))
    if isinstance(value, Sum):
        unit = column(value.unit, value.sums).astype(np.float64)
        spread = (value.magnitude + np.abs(column(value.bias, value.sums))) * unit
        # The channel's largest: a BatchNorm that is not folded subtracts the channel's mean from each of its sums.
        spread = np.broadcast_to(spread.max(axis=but_channels(spread), keepdims=True, initial=0.0), spread.shape)
        error = (8 * np.sqrt(value.terms + 1) + 8) * UNIT_ROUNDOFF * spread + value.bias_error
        return Float(real, error)
    if isinstance(value, Added):
        both = np.abs(real_values(value.first)) + np.abs(real_values(value.second))
        return Float(real, 2 * UNIT_ROUNDOFF * both)
    if isinstance(value, Pooled):
        return Float(real, (8 * np.sqrt(value.count) + 8) * UNIT_ROUNDOFF * np.abs(real))
    return Float(real, np.zeros(value.shape))
