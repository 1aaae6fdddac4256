"""Simulated operations on codes, with the rounding of ONNX Runtime's CPU kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from crqat.export.simulator.float_ops import compute
from crqat.export.simulator.qlinear_add import qlinear_add
from crqat.export.simulator.values import (
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
    attributes_of,
    but_channels,
    column,
    real_values,
)


def quantized_constant(node: onnx.NodeProto, constants: dict[str, Array]) -> Array:
    """Return the codes of a weight that is stored as float, with one scale or one per channel of the node's axis."""
    values, scale, zero_point = (constants[name] for name in node.input)
    info = np.iinfo(zero_point.dtype)
    shape = [1] * values.ndim
    shape[attributes_of(node).get("axis", 1)] = -1
    steps = scale.astype(np.float32).reshape(shape)
    codes: Array = np.clip(np.rint(values.astype(np.float32) / steps), info.min, info.max).astype(zero_point.dtype)
    return codes


def quantize(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], _: Any, out: Simulation
) -> Codes:
    """Compute a QuantizeLinear of any kind of value, with the rounding of ONNX Runtime's kernel for that kind."""
    info = np.iinfo(constants[node.input[2]].dtype)
    stored = (constants[node.input[1]], int(constants[node.input[2]]))
    step, zero_point = out.grids.get(node.output[0], stored)
    scale = np.float32(step)
    value = values[node.input[0]]
    fallback = real_values(value) / float(scale)
    bound: Array = np.asarray(4 * UNIT_ROUNDOFF * np.abs(fallback).max(initial=0.0))
    # The kernels below round at most four times: a sum, a scale or two, and their product. An Add has its own bound,
    # and float64 results need none.
    kernel_bound = float(bound)
    if isinstance(value, Sum):
        total = (value.sums + column(value.bias, value.sums)).astype(np.float32)
        rounded = np.rint(total * column((value.unit / scale).astype(np.float32), total))
        largest = value.magnitude.max(axis=but_channels(value.magnitude), initial=0.0)
        spread = (largest + np.abs(value.bias)) * value.unit / scale
        bound = bound + (8 * np.sqrt(value.terms + 1) + 8) * UNIT_ROUNDOFF * float(spread.max(initial=0.0))
        bound = bound + value.bias_error / float(scale)
    elif isinstance(value, Added):
        rounded, kernel_bound = qlinear_add(value, scale, zero_point, out.add_kernel)
        both = np.abs(real_values(value.first)) + np.abs(real_values(value.second))
        bound = bound + 8 * UNIT_ROUNDOFF * float(both.max(initial=0.0)) / float(scale)
    elif isinstance(value, Pooled):
        rounded = np.rint(
            value.sums.astype(np.float32) * np.float32(value.scale / np.float32(scale * np.float32(value.count)))
        )
        bound = bound + 8 * np.sqrt(value.count) * UNIT_ROUNDOFF * float(np.abs(fallback).max(initial=0.0))
    elif isinstance(value, Codes):
        rounded = np.rint(value.integers.astype(np.float32) * value.scale / scale)
    elif isinstance(value, np.ndarray) and value.dtype == np.float32:
        rounded = np.rint(value / scale)
    else:
        rounded = np.rint(fallback)
        kernel_bound = 0.0
        if isinstance(value, Float):
            bound = 4 * UNIT_ROUNDOFF * np.abs(fallback) + value.error / float(scale)
            if value.product:
                # ONNX Runtime's QLinearMul adds the zero point before it rounds to a code: one rounding of their sum.
                bound = bound + UNIT_ROUNDOFF * (np.abs(fallback) + abs(zero_point))
            _demand_bound(node, value, bound)
            out.inexact.add(node.output[0])
    lowest = 0 if isinstance(value, (Sum, Added)) and value.relu else info.min - zero_point
    integers = np.clip(rounded, lowest, info.max - zero_point).astype(np.int32)
    return out.record(node.output[0], Codes(integers, scale, zero_point), fallback, bound, kernel_bound)


def _demand_bound(node: onnx.NodeProto, value: Float, bound: Array) -> None:
    """Refuse a bound that no code can exceed, because it would verify nothing."""
    if np.isnan(value.values).any():
        msg = f"{node.name}: the operation before it returns NaN, so its codes cannot be verified"
        raise NotSimulated(msg)
    if bound.size and (bound >= 0.5).all():
        msg = f"{node.name}: float32 errors may exceed half a code for all its values, so it cannot be verified"
        raise NotSimulated(msg)


def dequantize(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], _: Any, out: Simulation
) -> Value:
    """Return the input as codes that are marked as dequantized, not as float values.

    They have the node's scale and zero point, unless `grids` of the simulation replaces those. Each consumer decides
    how it computes with them.
    """
    value = values[node.input[0]]
    if not isinstance(value, Codes):
        msg = f"{node.name}: the simulator needs codes as input of a DequantizeLinear"
        raise NotSimulated(msg)
    if out.grids:
        return replace(value, real=True)
    # The file's own values: a wrong scale or zero point then shows in later results.
    zero_point = int(constants[node.input[2]]) if len(node.input) > 2 and node.input[2] else 0
    integers = value.integers + (value.zero_point - zero_point)
    return Codes(integers, np.float32(constants[node.input[1]]), zero_point, real=True)


def clip(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], model: Any, out: Simulation
) -> Value:
    """Compute a Clip: of codes as integers, otherwise of float values."""
    value = values[node.input[0]]
    low, high = (constants.get(name) for name in [*node.input, "", ""][1:3])
    if isinstance(value, Codes) and low is not None and high is not None and low.dtype in (np.uint8, np.int8):
        clipped = np.clip(value.integers, int(low) - value.zero_point, int(high) - value.zero_point)
        before, bound = out.before_rounding[node.input[0]], out.bounds[node.input[0]]
        if node.input[0] in out.inexact:
            out.inexact.add(node.output[0])
        kernel_bound = out.kernel_bounds[node.input[0]]
        return out.record(node.output[0], Codes(clipped, value.scale, value.zero_point), before, bound, kernel_bound)
    return compute(node, values, constants, model, out)


def relu(node: onnx.NodeProto, values: dict[str, Value], *further: Any) -> Value:
    """Compute a ReLU of float values; an unrounded sum is only marked.

    Rounding is monotone, so the quantizer after a marked sum applies the ReLU as a lower bound of its codes.
    """
    value = values[node.input[0]]
    if isinstance(value, (Sum, Added)):
        return replace(value, relu=True)
    return compute(node, values, *further)


def add(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], model: Any, out: Simulation
) -> Value:
    """Add two tensors; a sum of two tensors of codes is rounded together with the quantizer after it."""
    first, second = (values.get(name) for name in node.input)
    whole = isinstance(first, Codes) and not first.selected and node.name not in out.in_float
    if whole and isinstance(first, Codes) and isinstance(second, Codes) and not second.selected:
        return Added(first, second)
    return compute(node, values, constants, model, out)


def global_average_pool(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], model: Any, out: Simulation
) -> Value:
    """Average over the pixels; a mean of codes is rounded together with the quantizer after it."""
    value = values[node.input[0]]
    if not isinstance(value, Codes) or value.selected or node.name in out.in_float:
        return compute(node, values, constants, model, out)
    sums = value.integers.astype(np.float64).sum(axis=(2, 3), keepdims=True)
    return Pooled(sums, int(np.prod(value.integers.shape[2:])), value.scale)
