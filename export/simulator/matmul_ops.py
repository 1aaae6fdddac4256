"""Simulated convolutions and matrix products: exact sums for codes, and an error bound for float values."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from torch.nn import functional

from crqat.export.simulator.float_ops import operands
from crqat.export.simulator.pool_ops import padding
from crqat.export.simulator.values import (
    UNIT_ROUNDOFF,
    Array,
    Codes,
    Float,
    NotSimulated,
    Simulation,
    Sum,
    Value,
    as_float,
    attributes_of,
    column,
)


def conv_or_gemm(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], model: Any, out: Simulation
) -> Value:
    """Compute a Conv, ConvTranspose or Gemm; sums of codes are exact, except for ConvTranspose, which runs in float."""
    x, attributes = values[node.input[0]], attributes_of(node)
    if node.op_type == "Gemm" and not attributes.get("transB"):
        msg = f"{node.name}: the simulator supports a Gemm only with transB=1"
        raise NotSimulated(msg)
    in_float = node.op_type == "ConvTranspose" or node.name in out.in_float
    if not isinstance(x, Codes) or x.selected or node.input[1] in constants or in_float:
        return _float_conv_or_gemm(node, as_float(x), attributes, constants, model, out)
    weight, weight_scale = _weight(node.input[1], constants, model, out)
    unit = (x.scale * weight_scale).astype(np.float32)
    integers = x.integers.astype(np.float64)
    sums = _sums(integers, weight, attributes, node.op_type)
    magnitude = _sums(np.abs(integers), np.abs(weight), attributes, node.op_type)
    bias_error = float(out.stored_error.get(node.input[1], np.zeros(())))
    bias = _bias(node, constants, model, unit, out)
    return Sum(sums, bias, unit, magnitude, int(weight[0].size), bias_error=bias_error)


def _float_conv_or_gemm(
    node: onnx.NodeProto,
    x: Float,
    attributes: dict[str, Any],
    constants: dict[str, Array],
    model: onnx.ModelProto,
    out: Simulation,
) -> Value:
    """Compute a Conv, ConvTranspose or Gemm in float, because a quantizer or an integer kernel is missing."""
    if node.input[1] in constants:
        stored = out.real(node.input[1], {}, constants)
        weight, weight_error, bias_error = stored.values, stored.error, np.zeros(())
    else:
        codes, scale = _weight(node.input[1], constants, model, out)
        shape = [1] * codes.ndim
        shape[int(node.op_type == "ConvTranspose")] = -1
        weight = codes * scale.astype(np.float64).reshape(shape)
        weight_error = np.zeros(weight.shape)
        bias_error = np.asarray(out.stored_error.get(node.input[1], 0.0))
    bias = np.zeros(1)
    if len(node.input) > 2 and node.input[2] in constants:
        stored = out.real(node.input[2], {}, constants)
        bias, bias_error = stored.values, bias_error + stored.error
    elif len(node.input) > 2 and node.input[2]:
        units, scale = _weight(node.input[2], constants, model, out)
        bias = units * scale.astype(np.float64)
    sums = _sums(x.values, weight, attributes, node.op_type)
    added = column(bias, sums)
    spread = _sums(np.abs(x.values), np.abs(weight), attributes, node.op_type) + np.abs(added)
    carried = _sums(x.error, np.abs(weight), attributes, node.op_type)
    if weight_error.any():
        carried = carried + _sums(np.abs(x.values) + x.error, weight_error, attributes, node.op_type)
    carried = carried + column(np.atleast_1d(bias_error), sums)
    terms = (
        weight.size // weight.shape[1] // attributes.get("group", 1)
        if node.op_type == "ConvTranspose"
        else weight[0].size
    )
    return Float(sums + added, carried + (8 * np.sqrt(terms + 1) + 8) * UNIT_ROUNDOFF * spread)


def matmul(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], _: Any, out: Simulation
) -> Value:
    """Multiply two tensors, as in attention; the product of two tensors of codes is exact."""
    first, second = (values.get(name) for name in node.input)
    whole = isinstance(first, Codes) and not first.selected and node.name not in out.in_float
    if whole and isinstance(first, Codes) and isinstance(second, Codes) and not second.selected:
        a, b = first.integers.astype(np.float64), second.integers.astype(np.float64)
        unit = np.asarray([first.scale * second.scale], np.float32)
        return Sum(a @ b, np.zeros(1), unit, np.abs(a) @ np.abs(b), a.shape[-1])
    x, y = operands(node, values, constants, out)
    error = np.abs(x.values) @ y.error + x.error @ np.abs(y.values) + x.error @ y.error
    rounding = (8 * np.sqrt(x.values.shape[-1]) + 8) * UNIT_ROUNDOFF
    return Float(x.values @ y.values, error + rounding * (np.abs(x.values) @ np.abs(y.values)))


def _weight(name: str, constants: dict[str, Array], model: onnx.ModelProto, out: Simulation) -> tuple[Array, Array]:
    """Return codes (float64) and scale (float32) of the weight of a Conv or Gemm."""
    for node in model.graph.node:
        if name in node.output and node.op_type == "DequantizeLinear" and node.input[0] in constants:
            scale, _ = out.grids.get(node.input[0], (constants[node.input[1]], 0))
            return constants[node.input[0]].astype(np.float64), scale.astype(np.float32)
    msg = f"{name}: the simulator supports only weights that are stored as integers with a DequantizeLinear"
    raise NotSimulated(msg)


def _sums(x: Array, weight: Array, attributes: dict[str, Any], op_type: str) -> Array:
    """Return exact integer sums; float64 represents all of them."""
    if op_type == "Gemm":
        return x @ weight.T
    rank = x.ndim - 2
    strides, dilations = (attributes.get(name, [1] * rank) for name in ("strides", "dilations"))
    if op_type == "ConvTranspose":
        return _transposed(x, weight, strides, dilations, attributes)
    padded = np.pad(x, ((0, 0), (0, 0), *padding(x.shape[2:], weight.shape[2:], attributes)))
    function: Any = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[rank]
    convolved = function(
        torch.from_numpy(padded),
        torch.from_numpy(weight),
        stride=strides,
        dilation=dilations,
        groups=attributes.get("group", 1),
    )
    return np.asarray(convolved.numpy())


def _transposed(x: Array, weight: Array, strides: Any, dilations: Any, attributes: dict[str, Any]) -> Array:
    """Return the sums of a ConvTranspose, cropped by `pads` from all pixels that the input reaches."""
    rank, group = x.ndim - 2, attributes.get("group", 1)
    if "output_shape" in attributes or attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        msg = "the simulator supports a ConvTranspose only with pads, not with auto_pad or output_shape"
        raise NotSimulated(msg)
    function: Any = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}[
        rank
    ]
    reached = function(
        torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(np.ascontiguousarray(weight)), stride=strides,
        dilation=dilations, groups=group,
    ).numpy()  # fmt: skip
    pads, further = attributes.get("pads", [0] * 2 * rank), attributes.get("output_padding", [0] * rank)
    reached = np.pad(reached, [(0, 0), (0, 0), *((0, more) for more in further)])
    kept = (
        slice(first, size - last) for first, last, size in zip(pads[:rank], pads[rank:], reached.shape[2:], strict=True)
    )
    return np.asarray(reached[(slice(None), slice(None), *kept)])


def _bias(
    node: onnx.NodeProto, constants: dict[str, Array], model: onnx.ModelProto, unit: Array, out: Simulation
) -> Array:
    """Return the bias in units of s_x s_w, float64: the int32 codes themselves, or a float bias divided by the unit.

    The exporter rounds biases to multiples of s_x s_w. If a file stores codes of few bits as they are instead of
    multiplied up to the range of int8, s_x s_w is large, and the exporter rounds to multiples of s_x s_w / 64. A
    float32 bias that differs from such a multiple only by float32 rounding is replaced by the multiple; any other
    float bias, such as one stored as float16, is used unchanged.
    """
    if len(node.input) < 3 or not node.input[2]:
        return np.zeros(unit.shape)
    if node.input[2] in constants:
        units = constants[node.input[2]].astype(np.float64) / unit.astype(np.float64)
        whole = np.rint(units * 64) / 64
        return np.where(np.abs(whole - units) <= 2 * UNIT_ROUNDOFF * np.abs(units), whole, units)
    return _weight(node.input[2], constants, model, out)[0]
