"""An integer simulator of a QDQ file: the codes that an exact integer runtime computes, from the file alone.

The arithmetic between codes is that of ONNX Runtime's CPU kernels, in float32 where they use float32: requantization
multiplies an int32 sum by (s_x s_w) / s_y and rounds half to even. Where a file asks for something else, a SiLU or a
residual Add of a float convolution for instance, values are computed in float64, together with a bound of how far a
correct float32 computation may lie from them; codes behind such values are `inexact`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import scipy.special  # type: ignore[import-untyped]
import torch
from onnx import numpy_helper

Array = npt.NDArray[Any]

# Relative rounding error of one float32 operation.
UNIT_ROUNDOFF = 2.0**-24


class NotSimulated(Exception):
    """The file contains an operation that the simulator does not know; the message names node and operation."""


@dataclass
class Codes:
    """Quantized values: integers with the zero point taken off, so that 0 is 0.0."""

    integers: Array
    scale: np.float32
    zero_point: int


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
    """

    sums: Array
    bias: Array
    unit: Array
    magnitude: Array
    terms: int
    relu: bool = False


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
    """

    values: Array
    error: Array


Value = Codes | Sum | Added | Pooled | Float | Array


@dataclass
class Simulation:
    """What came out.

    Attributes:
        codes: Tensor of codes (zero point taken off, int32) by its name in the file.
        logits: float32 of shape [N, classes].
        tie_bound: Name of a tensor of codes -> how far from a rounding tie, in codes, two correct float32
            computations of the same value can lie apart (probabilistic bound of Higham and Mary 2019 with lambda = 8
            for the sum, plus a handful of single roundings). Codes may differ by one only within this distance.
        before_rounding: Name of a tensor of codes -> values / scale before rounding, float64.
        inexact: Names of tensors of codes that a runtime computes from float values in an order of its own; another
            correct computation may differ from them by one code within `tie_bound` of a tie.
        logits_bound: Bound of the distance of float32 logits, of their shape; None where a runtime's must be the same.
        forced: Name of a tensor of codes -> integers that the operations behind it see instead of the computed ones.
    """

    codes: dict[str, Array] = field(default_factory=dict)
    logits: Array = field(default_factory=lambda: np.zeros(0, np.float32))
    tie_bound: dict[str, float] = field(default_factory=dict)
    before_rounding: dict[str, Array] = field(default_factory=dict)
    inexact: set[str] = field(default_factory=set)
    logits_bound: Array | None = None
    forced: Mapping[str, Array] = field(default_factory=dict)

    def record(self, name: str, codes: Codes, before: Array, bound: float) -> Codes:
        """Keep a quantizer's result and give what goes on from there."""
        self.codes[name], self.before_rounding[name], self.tie_bound[name] = codes.integers, before, bound
        return replace(codes, integers=self.forced.get(name, codes.integers))


def simulate(
    model: onnx.ModelProto, images: npt.NDArray[np.float32], forced: Mapping[str, Array] | None = None
) -> Simulation:
    """Run a QDQ file in integers.

    Args:
        model: An ONNX file written by `export.qdq`.
        images: Normalized input, float32 of shape [N, C, H, W].
        forced: See `Simulation`; with it, a difference shows where it arises and does not spread (teacher forcing).

    Raises:
        NotSimulated: The file contains an operation that is not known here.
    """
    result = Simulation(forced=forced or {})
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    values: dict[str, Value] = {"input": images.astype(np.float32)}
    for node in model.graph.node:
        operation = _OPERATIONS.get(node.op_type)
        if operation is None:
            msg = f"{node.name or node.output[0]}: the simulator does not know {node.op_type}"
            raise NotSimulated(msg)
        if node.op_type == "QuantizeLinear" and node.input[0] in constants:
            constants[node.output[0]] = _quantized_constant(*(constants[name] for name in node.input))
            continue
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            continue  # a weight or a bias: read where it is used
        try:
            values[node.output[0]] = operation(node, values, constants, model, result)
        except KeyError as missing:
            msg = f"{node.name}: the simulator does not know {node.op_type} with {missing} as it is here"
            raise NotSimulated(msg) from missing
    logits = values["logits"]
    if isinstance(logits, Sum):
        # QGemm: one multiplication of the int32 sum.
        total = (logits.sums + _column(logits.bias, logits.sums)).astype(np.float32)
        total = total * _column(logits.unit, total)
        logits = np.maximum(total, 0) if logits.relu else total
    if not isinstance(logits, np.ndarray):
        approximate = _float(logits)
        result.logits_bound = approximate.error + UNIT_ROUNDOFF * np.abs(approximate.values)
        logits = approximate.values
    result.logits = logits.astype(np.float32)
    return result


def _quantized_constant(values: Array, scale: Array, zero_point: Array) -> Array:
    """The codes of a weight that is stored as float values, with a scale per channel of its first axis."""
    info = np.iinfo(zero_point.dtype)
    column = scale.astype(np.float32).reshape(-1, *[1] * (values.ndim - 1))
    codes: Array = np.clip(np.rint(values.astype(np.float32) / column), info.min, info.max).astype(zero_point.dtype)
    return codes


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def _column(values: Array, like: Array) -> Array:
    return values.reshape(1, -1, *[1] * (like.ndim - 2))


def _real(value: Value) -> Array:
    """The real value of anything, float64."""
    return _float(value).values


def _float(value: Value) -> Float:
    """Anything as real values with the bound of a float32 computation of them."""
    if isinstance(value, Float):
        return value
    if isinstance(value, Codes):
        real = value.integers.astype(np.float64) * float(value.scale)
        return Float(real, UNIT_ROUNDOFF * np.abs(real))
    if isinstance(value, Sum):
        unit = _column(value.unit, value.sums).astype(np.float64)
        real = (value.sums + _column(value.bias, value.sums)) * unit
        spread = (value.magnitude + np.abs(_column(value.bias, value.sums))) * unit
        error = (8 * np.sqrt(value.terms + 1) + 8) * UNIT_ROUNDOFF * spread
        return Float(np.maximum(real, 0.0) if value.relu else real, error)
    if isinstance(value, Added):
        first, second = _real(value.first), _real(value.second)
        real = first + second
        error = 2 * UNIT_ROUNDOFF * (np.abs(first) + np.abs(second))
        return Float(np.maximum(real, 0.0) if value.relu else real, error)
    if isinstance(value, Pooled):
        real = value.sums * (float(value.scale) / value.count)
        return Float(real, (8 * np.sqrt(value.count) + 8) * UNIT_ROUNDOFF * np.abs(real))
    return Float(value.astype(np.float64), np.zeros(value.shape))


def _quantize(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], _: Any, out: Simulation
) -> Codes:
    scale = np.float32(constants[node.input[1]])
    zero = constants[node.input[2]]
    zero_point, info = int(zero), np.iinfo(zero.dtype)
    value = values[node.input[0]]
    fallback = _real(value) / float(scale)
    bound = 4 * UNIT_ROUNDOFF * float(np.abs(fallback).max(initial=0.0))
    if isinstance(value, Sum):
        total = (value.sums + _column(value.bias, value.sums)).astype(np.float32)
        rounded = np.rint(total * _column((value.unit / scale).astype(np.float32), total))
        spread = (value.magnitude + np.abs(_column(value.bias, value.sums))) * _column(value.unit, value.sums) / scale
        bound += (8 * np.sqrt(value.terms + 1) + 8) * UNIT_ROUNDOFF * float(spread.max(initial=0.0))
    elif isinstance(value, Added):
        rounded = _qlinear_add(value, scale, zero_point)
        both = np.abs(_real(value.first)) + np.abs(_real(value.second))
        bound += 8 * UNIT_ROUNDOFF * float(both.max(initial=0.0)) / float(scale)
    elif isinstance(value, Pooled):
        rounded = np.rint(
            value.sums.astype(np.float32) * np.float32(value.scale / np.float32(scale * np.float32(value.count)))
        )
        bound += 8 * np.sqrt(value.count) * UNIT_ROUNDOFF * float(np.abs(fallback).max(initial=0.0))
    elif isinstance(value, np.ndarray) and value.dtype == np.float32:
        rounded = np.rint(value / scale)
    else:
        rounded = np.rint(fallback)
        if isinstance(value, Float):
            bound += float(value.error.max(initial=0.0)) / float(scale)
            out.inexact.add(node.output[0])
    lowest = 0 if isinstance(value, (Sum, Added)) and value.relu else info.min - zero_point
    integers = np.clip(rounded, lowest, info.max - zero_point).astype(np.int32)
    return out.record(node.output[0], Codes(integers, scale, zero_point), fallback, bound)


def _qlinear_add(value: Added, scale: np.float32, zero_point: int) -> Array:
    """rint(fma(rA, A, fma(rB, B, c))) on raw codes, as ONNX Runtime's AVX2 kernel orders it; zero point taken off."""
    a, b = value.first, value.second
    ratio_a, ratio_b = np.float32(a.scale / scale), np.float32(b.scale / scale)
    offset = np.float32(ratio_a * np.float32(a.zero_point)) + np.float32(ratio_b * np.float32(b.zero_point))
    constant = np.float32(np.float32(zero_point) - np.float32(offset))
    raw_a, raw_b = (v.integers.astype(np.float64) + v.zero_point for v in (a, b))
    # A float64 holds the product of a float32 and an 8-bit code exactly, so rounding once to float32 is an fma.
    inner = (float(ratio_b) * raw_b + float(constant)).astype(np.float32)
    return np.rint((float(ratio_a) * raw_a + inner).astype(np.float32)) - zero_point


def _dequantize(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], _: Any, __: Simulation
) -> Value:
    value = values[node.input[0]]
    if not isinstance(value, Codes):
        msg = f"{node.name}: the simulator wants codes in front of a DequantizeLinear"
        raise NotSimulated(msg)
    # The same Grid behind as before, in float16 maybe: the exporter writes nothing else.
    return Codes(value.integers, np.float32(constants[node.input[1]]), value.zero_point)


def _clip(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], _: Any, out: Simulation
) -> Value:
    value = values[node.input[0]]
    low, high = (constants[name] if name else None for name in [*node.input, "", ""][1:3])
    if isinstance(value, Codes) and low is not None and low.dtype in (np.uint8, np.int8):
        clipped = np.clip(value.integers, int(low) - value.zero_point, int(high) - value.zero_point)  # type: ignore[arg-type]
        before, bound = out.before_rounding[node.input[0]], out.tie_bound[node.input[0]]
        if node.input[0] in out.inexact:
            out.inexact.add(node.output[0])
        return out.record(node.output[0], Codes(clipped, value.scale, value.zero_point), before, bound)
    minimum, real = -np.inf if low is None else float(low), _float(value)
    return Float(np.clip(real.values, minimum, np.inf if high is None else float(high)), real.error)


def _relu(node: onnx.NodeProto, values: dict[str, Value], *_: Any) -> Value:
    """Rounding is monotone, so a ReLU before it is a bound of the codes behind it."""
    value = values[node.input[0]]
    if isinstance(value, (Sum, Added)):
        return replace(value, relu=True)
    real = _float(value)
    return Float(np.maximum(real.values, 0.0), real.error)


def _sigmoid(x: Array) -> Array:
    result: Array = scipy.special.expit(x)
    return result


def _alpha(attributes: dict[str, Any], default: float) -> float:
    return float(attributes.get("alpha", default))


# Activations that are computed in float: the function of values and attributes, and how much it can stretch an error.
_UNARY: dict[str, tuple[Callable[[Array, dict[str, Any]], Array], Callable[[dict[str, Any]], float]]] = {
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


def _unary(node: onnx.NodeProto, values: dict[str, Value], *_: Any) -> Value:
    function, stretch = _UNARY[node.op_type]
    attributes, x = _attributes(node), _float(values[node.input[0]])
    result = function(x.values, attributes)
    return Float(result, stretch(attributes) * x.error + _APPROXIMATION * UNIT_ROUNDOFF * np.maximum(np.abs(result), 1))


def _operands(node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array]) -> tuple[Float, Float]:
    first, second = (_float(values[name]) if name in values else _float(constants[name]) for name in node.input[:2])
    return first, second


def _mul(node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], *_: Any) -> Value:
    a, b = _operands(node, values, constants)
    product = a.values * b.values
    error = np.abs(a.values) * b.error + np.abs(b.values) * a.error + a.error * b.error
    # ONNX Runtime multiplies codes by the quotient of three scales: a handful of roundings.
    return Float(product, error + 8 * UNIT_ROUNDOFF * np.abs(product))


def _div(node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], *_: Any) -> Value:
    x, divisor = _float(values[node.input[0]]), constants[node.input[1]].astype(np.float64)
    quotient = x.values / divisor
    return Float(quotient, x.error / np.abs(divisor) + UNIT_ROUNDOFF * np.abs(quotient))


def _prelu(node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], *_: Any) -> Value:
    x, slope = _float(values[node.input[0]]), constants[node.input[1]].astype(np.float64)
    result = np.where(x.values > 0, x.values, slope * x.values)
    return Float(result, np.maximum(1.0, np.abs(slope)) * x.error + UNIT_ROUNDOFF * np.abs(result))


def _batch_norm(node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], *_: Any) -> Value:
    x = _float(values[node.input[0]])
    gamma, beta, mean, variance = (_column(constants[name].astype(np.float64), x.values) for name in node.input[1:5])
    factor = gamma / np.sqrt(variance + _attributes(node).get("epsilon", 1e-5))
    result = (x.values - mean) * factor + beta
    spread = np.abs(x.values * factor) + np.abs(mean * factor) + np.abs(beta)
    return Float(result, x.error * np.abs(factor) + 8 * UNIT_ROUNDOFF * spread)


def _concat(node: onnx.NodeProto, values: dict[str, Value], *_: Any) -> Value:
    parts, axis = [values[name] for name in node.input], _attributes(node)["axis"]
    first = parts[0]
    if isinstance(first, Codes) and all(
        isinstance(part, Codes) and (part.scale, part.zero_point) == (first.scale, first.zero_point) for part in parts
    ):
        integers = np.concatenate([part.integers for part in parts if isinstance(part, Codes)], axis)
        return replace(first, integers=integers)
    real = [_float(part) for part in parts]
    return Float(np.concatenate([x.values for x in real], axis), np.concatenate([x.error for x in real], axis))


def _average_pool(node: onnx.NodeProto, values: dict[str, Value], *_: Any) -> Value:
    """Means over windows, which ONNX Runtime takes of codes in float32 and in an order of its own."""
    x, attributes = _float(values[node.input[0]]), _attributes(node)
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


def _reduce_mean(node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], *_: Any) -> Value:
    x, attributes = _float(values[node.input[0]]), _attributes(node)
    axes = tuple(attributes["axes"]) if "axes" in attributes else tuple(int(a) for a in constants[node.input[1]])
    keep = bool(attributes.get("keepdims", 1))
    count = int(np.prod([x.values.shape[axis] for axis in axes]))
    mean, spread, error = (a.mean(axis=axes, keepdims=keep) for a in (x.values, np.abs(x.values), x.error))
    return Float(mean, error + (8 * np.sqrt(count) + 8) * UNIT_ROUNDOFF * spread)


def _weight(name: str, constants: dict[str, Array], model: onnx.ModelProto) -> tuple[Array, Array]:
    """Codes (float64) and scale (float32) behind the DequantizeLinear that a Conv or Gemm reads."""
    for node in model.graph.node:
        if name in node.output and node.op_type == "DequantizeLinear" and node.input[0] in constants:
            return constants[node.input[0]].astype(np.float64), constants[node.input[1]].astype(np.float32)
    msg = f"{name}: the simulator wants weights as integers behind a DequantizeLinear"
    raise NotSimulated(msg)


def _matmul(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], model: Any, _: Simulation
) -> Value:
    x, attributes = values[node.input[0]], _attributes(node)
    if node.op_type == "Gemm" and not attributes.get("transB"):
        msg = f"{node.name}: the simulator wants a Gemm with transB"
        raise NotSimulated(msg)
    if not isinstance(x, Codes) or node.input[1] in constants:
        return _float_matmul(node, _float(x), attributes, constants, model)
    weight, weight_scale = _weight(node.input[1], constants, model)
    unit = (x.scale * weight_scale).astype(np.float32)
    integers = x.integers.astype(np.float64)
    sums = _sums(integers, weight, attributes, node.op_type)
    magnitude = _sums(np.abs(integers), np.abs(weight), attributes, node.op_type)
    return Sum(sums, _bias(node, constants, model, unit), unit, magnitude, int(weight[0].size))


def _float_matmul(
    node: onnx.NodeProto, x: Float, attributes: dict[str, Any], constants: dict[str, Array], model: onnx.ModelProto
) -> Value:
    """A Conv or Gemm that no runtime computes in integers, because its input or its weight is not quantized."""
    if node.input[1] in constants:
        weight = constants[node.input[1]].astype(np.float64)
    else:
        codes, scale = _weight(node.input[1], constants, model)
        weight = codes * scale.astype(np.float64).reshape(-1, *[1] * (codes.ndim - 1))
    bias = np.zeros(len(weight))
    if len(node.input) > 2 and node.input[2] in constants:
        bias = constants[node.input[2]].astype(np.float64)
    elif len(node.input) > 2 and node.input[2]:
        units, scale = _weight(node.input[2], constants, model)
        bias = units * scale.astype(np.float64)
    sums = _sums(x.values, weight, attributes, node.op_type)
    column = _column(bias, sums)
    spread = _sums(np.abs(x.values), np.abs(weight), attributes, node.op_type) + np.abs(column)
    carried = _sums(x.error, np.abs(weight), attributes, node.op_type)
    return Float(sums + column, carried + (8 * np.sqrt(weight[0].size + 1) + 8) * UNIT_ROUNDOFF * spread)


def _sums(x: Array, weight: Array, attributes: dict[str, Any], op_type: str) -> Array:
    """Exact integer sums: float64 holds them all."""
    if op_type == "Gemm":
        return x @ weight.T
    pads = attributes.get("pads", [0, 0, 0, 0])
    padded = np.pad(x, ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])))
    convolved = torch.nn.functional.conv2d(
        torch.from_numpy(padded),
        torch.from_numpy(weight),
        stride=attributes.get("strides", [1, 1]),
        dilation=attributes.get("dilations", [1, 1]),
        groups=attributes.get("group", 1),
    )
    return convolved.numpy()


def _bias(node: onnx.NodeProto, constants: dict[str, Array], model: onnx.ModelProto, unit: Array) -> Array:
    """The bias in units of s_x s_w, float64: the int32 codes themselves, or a float bias divided by the unit.

    The exporter rounds biases to whole units, or to a 64th where low-bit codes are not spread. A float32 bias that is
    one within its own rounding is taken for it; a float16 one is what it is.
    """
    if len(node.input) < 3 or not node.input[2]:
        return np.zeros(unit.shape)
    if node.input[2] in constants:
        units = constants[node.input[2]].astype(np.float64) / unit.astype(np.float64)
        whole = np.rint(units * 64) / 64
        return np.where(np.abs(whole - units) <= 2 * UNIT_ROUNDOFF * np.abs(units), whole, units)
    return _weight(node.input[2], constants, model)[0]


def _add(node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], *_: Any) -> Value:
    first, second = (values.get(name) for name in node.input)
    if isinstance(first, Codes) and isinstance(second, Codes):
        return Added(first, second)
    a, b = _operands(node, values, constants)
    error = a.error + b.error + 2 * UNIT_ROUNDOFF * (np.abs(a.values) + np.abs(b.values))
    return Float(a.values + b.values, error)


def _pool(node: onnx.NodeProto, values: dict[str, Value], *_: Any) -> Value:
    value = values[node.input[0]]
    if not isinstance(value, Codes):
        x = _float(value)
        mean, spread, error = (a.mean(axis=(2, 3), keepdims=True) for a in (x.values, np.abs(x.values), x.error))
        count = int(np.prod(x.values.shape[2:]))
        return Float(mean, error + (8 * np.sqrt(count) + 8) * UNIT_ROUNDOFF * spread)
    sums = value.integers.astype(np.float64).sum(axis=(2, 3), keepdims=True)
    return Pooled(sums, int(np.prod(value.integers.shape[2:])), value.scale)


def _move(node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], *_: Any) -> Value:
    value = values[node.input[0]]
    if node.op_type == "Pad" and len(node.input) > 2 and node.input[2]:
        padding = constants[node.input[2]]
        if padding != (value.zero_point if isinstance(value, Codes) and padding.dtype.kind in "iu" else 0):
            msg = f"{node.name}: the simulator pads with 0.0 only, not with {padding}"
            raise NotSimulated(msg)
    if not isinstance(value, Codes):
        x = _float(value)
        return Float(_moved(node, x.values, constants), _moved(node, x.error, constants))
    return Codes(_moved(node, value.integers, constants), value.scale, value.zero_point)


def _moved(node: onnx.NodeProto, array: Array, constants: dict[str, Array]) -> Array:
    attributes = _attributes(node)
    if node.op_type == "Slice":
        starts, ends, axes = (constants[name].reshape(-1) for name in node.input[1:4])
        steps = constants[node.input[4]].reshape(-1) if len(node.input) > 4 else np.ones_like(starts)
        index: list[slice] = [slice(None)] * array.ndim
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            index[int(axis)] = slice(int(start), min(int(end), array.shape[int(axis)]), int(step))
        return array[tuple(index)]
    if node.op_type == "Pad":
        pads, mode = constants[node.input[1]].reshape(2, -1).T, attributes.get("mode", b"constant").decode()
        if pads.min() < 0 or mode not in ("constant", "reflect", "edge"):
            msg = f"{node.name}: the simulator does not know a Pad of {pads.tolist()} in mode {mode}"
            raise NotSimulated(msg)
        return np.pad(array, [(int(before), int(after)) for before, after in pads], mode)
    if node.op_type == "Flatten":
        return array.reshape(array.shape[0], -1)
    if node.op_type == "Reshape":
        shape = [array.shape[0] if i == 0 and s in (0, 2) else int(s) for i, s in enumerate(constants[node.input[1]])]
        return array.reshape(shape)
    if node.op_type == "Squeeze":
        return array.squeeze(tuple(int(axis) for axis in constants[node.input[1]]))
    if node.op_type == "Unsqueeze":
        return np.expand_dims(array, tuple(int(axis) for axis in constants[node.input[1]]))
    if node.op_type == "Transpose":
        return array.transpose(attributes["perm"])
    if node.op_type == "MaxPool":
        tensor = torch.from_numpy(array.astype(np.float64))
        kernel, pads = attributes["kernel_shape"], attributes.get("pads", [0, 0, 0, 0])
        tensor = torch.nn.functional.pad(tensor, (pads[1], pads[3], pads[0], pads[2]), value=-np.inf)
        pooled = torch.nn.functional.max_pool2d(
            tensor, kernel, attributes.get("strides", [1, 1]), dilation=attributes.get("dilations", [1, 1]),
            ceil_mode=bool(attributes.get("ceil_mode", 0)),
        )  # fmt: skip
        return pooled.numpy().astype(array.dtype)
    msg = f"{node.name}: the simulator does not know {node.op_type}"
    raise NotSimulated(msg)


def _cast(node: onnx.NodeProto, values: dict[str, Value], *_: Any) -> Value:
    return values[node.input[0]]


_OPERATIONS: dict[str, Any] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "Clip": _clip,
    "Relu": _relu,
    "Conv": _matmul,
    "Gemm": _matmul,
    "Add": _add,
    "GlobalAveragePool": _pool,
    "AveragePool": _average_pool,
    "ReduceMean": _reduce_mean,
    "Mul": _mul,
    "Div": _div,
    "PRelu": _prelu,
    "BatchNormalization": _batch_norm,
    "Concat": _concat,
    **dict.fromkeys(_UNARY, _unary),
    "Cast": _cast,
    **dict.fromkeys(("Slice", "Pad", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "MaxPool"), _move),
}
