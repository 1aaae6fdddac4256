"""Operations that the integer simulator computes on codes, with the roundings of ONNX Runtime's CPU kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from export.float_operations import operands
from export.simulated import (
    UNIT_ROUNDOFF,
    Added,
    Array,
    Codes,
    Float,
    NotSimulated,
    Pooled,
    Simulation,
    Sum,
    Value,
    as_float,
    column,
    real_values,
)


def quantized_constant(values: Array, scale: Array, zero_point: Array) -> Array:
    """The codes of a weight that is stored as float values, with a scale per channel of its first axis."""
    info = np.iinfo(zero_point.dtype)
    column = scale.astype(np.float32).reshape(-1, *[1] * (values.ndim - 1))
    codes: Array = np.clip(np.rint(values.astype(np.float32) / column), info.min, info.max).astype(zero_point.dtype)
    return codes


def quantize(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], _: Any, out: Simulation
) -> Codes:
    """Codes of anything, rounded as ONNX Runtime's kernel for it rounds."""
    scale = np.float32(constants[node.input[1]])
    zero = constants[node.input[2]]
    zero_point, info = int(zero), np.iinfo(zero.dtype)
    value = values[node.input[0]]
    fallback = real_values(value) / float(scale)
    bound = 4 * UNIT_ROUNDOFF * float(np.abs(fallback).max(initial=0.0))
    if isinstance(value, Sum):
        total = (value.sums + column(value.bias, value.sums)).astype(np.float32)
        rounded = np.rint(total * column((value.unit / scale).astype(np.float32), total))
        spread = (value.magnitude + np.abs(column(value.bias, value.sums))) * column(value.unit, value.sums) / scale
        bound += (8 * np.sqrt(value.terms + 1) + 8) * UNIT_ROUNDOFF * float(spread.max(initial=0.0))
    elif isinstance(value, Added):
        rounded = _qlinear_add(value, scale, zero_point)
        both = np.abs(real_values(value.first)) + np.abs(real_values(value.second))
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


def dequantize(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], _: Any, __: Simulation
) -> Value:
    """Codes stay codes: what reads them decides how it computes."""
    value = values[node.input[0]]
    if not isinstance(value, Codes):
        msg = f"{node.name}: the simulator wants codes in front of a DequantizeLinear"
        raise NotSimulated(msg)
    # The same Grid behind as before, in float16 maybe: the exporter writes nothing else.
    return Codes(value.integers, np.float32(constants[node.input[1]]), value.zero_point)


def clip(node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], _: Any, out: Simulation) -> Value:
    """A Clip of codes in their own type, or of real values."""
    value = values[node.input[0]]
    low, high = (constants[name] if name else None for name in [*node.input, "", ""][1:3])
    if isinstance(value, Codes) and low is not None and low.dtype in (np.uint8, np.int8):
        clipped = np.clip(value.integers, int(low) - value.zero_point, int(high) - value.zero_point)  # type: ignore[arg-type]
        before, bound = out.before_rounding[node.input[0]], out.tie_bound[node.input[0]]
        if node.input[0] in out.inexact:
            out.inexact.add(node.output[0])
        return out.record(node.output[0], Codes(clipped, value.scale, value.zero_point), before, bound)
    minimum, real = -np.inf if low is None else float(low), as_float(value)
    return Float(np.clip(real.values, minimum, np.inf if high is None else float(high)), real.error)


def relu(node: onnx.NodeProto, values: dict[str, Value], *_: Any) -> Value:
    """Rounding is monotone, so a ReLU before it is a bound of the codes behind it."""
    value = values[node.input[0]]
    if isinstance(value, (Sum, Added)):
        return replace(value, relu=True)
    real = as_float(value)
    return Float(np.maximum(real.values, 0.0), real.error)


def add(node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], _: Any, out: Simulation) -> Value:
    """The sum of two tensors; of two tensors of codes it is rounded together with the quantizer behind."""
    first, second = (values.get(name) for name in node.input)
    if isinstance(first, Codes) and isinstance(second, Codes):
        return Added(first, second)
    a, b = operands(node, values, constants, out)
    error = a.error + b.error + 2 * UNIT_ROUNDOFF * (np.abs(a.values) + np.abs(b.values))
    return Float(a.values + b.values, error)


def global_average_pool(node: onnx.NodeProto, values: dict[str, Value], *_: Any) -> Value:
    """The mean over the pixels; of codes it is rounded together with the quantizer behind."""
    value = values[node.input[0]]
    if not isinstance(value, Codes):
        x = as_float(value)
        mean, spread, error = (a.mean(axis=(2, 3), keepdims=True) for a in (x.values, np.abs(x.values), x.error))
        count = int(np.prod(x.values.shape[2:]))
        return Float(mean, error + (8 * np.sqrt(count) + 8) * UNIT_ROUNDOFF * spread)
    sums = value.integers.astype(np.float64).sum(axis=(2, 3), keepdims=True)
    return Pooled(sums, int(np.prod(value.integers.shape[2:])), value.scale)
