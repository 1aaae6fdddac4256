"""An integer simulator of a QDQ file: the codes that an exact integer runtime computes, from the file alone.

The arithmetic between codes is that of ONNX Runtime's CPU kernels, in float32 where they use float32: requantization
multiplies an int32 sum by (s_x s_w) / s_y and rounds half to even. Where a file asks for something else, a SiLU or a
residual Add of a float convolution for instance, values are computed in float64, together with a bound of how far a
correct float32 computation may lie from them; codes behind such values are `inexact`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper

from export.float_operations import (
    UNARY,
    batch_norm,
    div,
    layer_norm,
    mul,
    operands,
    prelu,
    reduce_mean,
    softmax,
    unary,
)
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
    attributes_of,
    column,
    real_values,
)


def simulate(
    model: onnx.ModelProto,
    images: npt.NDArray[np.float32],
    forced: Mapping[str, Array] | None = None,
    stored_error: Mapping[str, Array] | None = None,
) -> Simulation:
    """Run a QDQ file in integers.

    Args:
        model: An ONNX file written by `export.qdq`.
        images: Normalized input, float32 of shape [N, C, H, W].
        forced: See `Simulation`; with it, a difference shows where it arises and does not spread (teacher forcing).
        stored_error: See `Simulation`.

    Raises:
        NotSimulated: The file contains an operation that is not known here.
    """
    result = Simulation(forced=forced or {}, stored_error=stored_error or {})
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
        total = (logits.sums + column(logits.bias, logits.sums)).astype(np.float32)
        total = total * column(logits.unit, total)
        logits = np.maximum(total, 0) if logits.relu else total
    if not isinstance(logits, np.ndarray):
        approximate = as_float(logits)
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


def _quantize(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], _: Any, out: Simulation
) -> Codes:
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
    minimum, real = -np.inf if low is None else float(low), as_float(value)
    return Float(np.clip(real.values, minimum, np.inf if high is None else float(high)), real.error)


def _relu(node: onnx.NodeProto, values: dict[str, Value], *_: Any) -> Value:
    """Rounding is monotone, so a ReLU before it is a bound of the codes behind it."""
    value = values[node.input[0]]
    if isinstance(value, (Sum, Added)):
        return replace(value, relu=True)
    real = as_float(value)
    return Float(np.maximum(real.values, 0.0), real.error)


def _concat(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], _: Any, out: Simulation
) -> Value:
    if isinstance(values.get(node.input[0]), np.ndarray):
        return _batch_of(node, values, constants)
    axis = attributes_of(node)["axis"]
    parts = [values[name] if name in values else out.real(name, values, constants) for name in node.input]
    first = parts[0]
    if isinstance(first, Codes) and all(
        isinstance(part, Codes) and (part.scale, part.zero_point) == (first.scale, first.zero_point) for part in parts
    ):
        integers = np.concatenate([part.integers for part in parts if isinstance(part, Codes)], axis)
        return replace(first, integers=integers)
    real = [as_float(part) for part in parts]
    return Float(np.concatenate([x.values for x in real], axis), np.concatenate([x.error for x in real], axis))


def _average_pool(node: onnx.NodeProto, values: dict[str, Value], *_: Any) -> Value:
    """Means over windows, which ONNX Runtime takes of codes in float32 and in an order of its own."""
    x, attributes = as_float(values[node.input[0]]), attributes_of(node)
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


def _weight(name: str, constants: dict[str, Array], model: onnx.ModelProto) -> tuple[Array, Array]:
    """Codes (float64) and scale (float32) behind the DequantizeLinear that a Conv or Gemm reads."""
    for node in model.graph.node:
        if name in node.output and node.op_type == "DequantizeLinear" and node.input[0] in constants:
            return constants[node.input[0]].astype(np.float64), constants[node.input[1]].astype(np.float32)
    msg = f"{name}: the simulator wants weights as integers behind a DequantizeLinear"
    raise NotSimulated(msg)


def _matmul(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], model: Any, out: Simulation
) -> Value:
    x, attributes = values[node.input[0]], attributes_of(node)
    if node.op_type == "Gemm" and not attributes.get("transB"):
        msg = f"{node.name}: the simulator wants a Gemm with transB"
        raise NotSimulated(msg)
    if not isinstance(x, Codes) or node.input[1] in constants:
        return _float_matmul(node, as_float(x), attributes, constants, model, out)
    weight, weight_scale = _weight(node.input[1], constants, model)
    unit = (x.scale * weight_scale).astype(np.float32)
    integers = x.integers.astype(np.float64)
    sums = _sums(integers, weight, attributes, node.op_type)
    magnitude = _sums(np.abs(integers), np.abs(weight), attributes, node.op_type)
    return Sum(sums, _bias(node, constants, model, unit), unit, magnitude, int(weight[0].size))


def _float_matmul(
    node: onnx.NodeProto,
    x: Float,
    attributes: dict[str, Any],
    constants: dict[str, Array],
    model: onnx.ModelProto,
    out: Simulation,
) -> Value:
    """A Conv or Gemm that no runtime computes in integers, because its input or its weight is not quantized."""
    if node.input[1] in constants:
        stored = out.real(node.input[1], {}, constants)
        weight, weight_error = stored.values, stored.error
    else:
        codes, scale = _weight(node.input[1], constants, model)
        weight = codes * scale.astype(np.float64).reshape(-1, *[1] * (codes.ndim - 1))
        weight_error = np.zeros(weight.shape)
    bias, bias_error = np.zeros(len(weight)), np.zeros(len(weight))
    if len(node.input) > 2 and node.input[2] in constants:
        stored = out.real(node.input[2], {}, constants)
        bias, bias_error = stored.values, stored.error
    elif len(node.input) > 2 and node.input[2]:
        units, scale = _weight(node.input[2], constants, model)
        bias = units * scale.astype(np.float64)
    sums = _sums(x.values, weight, attributes, node.op_type)
    added = column(bias, sums)
    spread = _sums(np.abs(x.values), np.abs(weight), attributes, node.op_type) + np.abs(added)
    carried = _sums(x.error, np.abs(weight), attributes, node.op_type)
    if weight_error.any():
        carried = carried + _sums(np.abs(x.values) + x.error, weight_error, attributes, node.op_type)
    carried = carried + column(bias_error, sums)
    return Float(sums + added, carried + (8 * np.sqrt(weight[0].size + 1) + 8) * UNIT_ROUNDOFF * spread)


def _product(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], _: Any, out: Simulation
) -> Value:
    """The product of two tensors as in attention; of two tensors of codes it is exact."""
    first, second = (values.get(name) for name in node.input)
    if isinstance(first, Codes) and isinstance(second, Codes):
        a, b = first.integers.astype(np.float64), second.integers.astype(np.float64)
        unit = np.asarray([first.scale * second.scale], np.float32)
        return Sum(a @ b, np.zeros(1), unit, np.abs(a) @ np.abs(b), a.shape[-1])
    x, y = operands(node, values, constants, out)
    error = np.abs(x.values) @ y.error + x.error @ np.abs(y.values) + x.error @ y.error
    rounding = (8 * np.sqrt(x.values.shape[-1]) + 8) * UNIT_ROUNDOFF
    return Float(x.values @ y.values, error + rounding * (np.abs(x.values) @ np.abs(y.values)))


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


def _add(node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], _: Any, out: Simulation) -> Value:
    first, second = (values.get(name) for name in node.input)
    if isinstance(first, Codes) and isinstance(second, Codes):
        return Added(first, second)
    a, b = operands(node, values, constants, out)
    error = a.error + b.error + 2 * UNIT_ROUNDOFF * (np.abs(a.values) + np.abs(b.values))
    return Float(a.values + b.values, error)


def _pool(node: onnx.NodeProto, values: dict[str, Value], *_: Any) -> Value:
    value = values[node.input[0]]
    if not isinstance(value, Codes):
        x = as_float(value)
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
        x = as_float(value)
        return Float(_moved(node, x.values, constants), _moved(node, x.error, constants))
    return Codes(_moved(node, value.integers, constants), value.scale, value.zero_point)


def _moved(node: onnx.NodeProto, array: Array, constants: dict[str, Array]) -> Array:
    attributes = attributes_of(node)
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
    if node.op_type == "Gather":
        return np.take(array, constants[node.input[1]].astype(np.int64), attributes.get("axis", 0))
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


def _batch_of(node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], *_: Any) -> Value:
    """The shape to which a constant is expanded, from the batch: [batch, ...]."""
    if node.op_type == "Shape":
        input_value = values[node.input[0]]
        if not isinstance(input_value, np.ndarray):
            msg = f"{node.name}: the simulator knows the shape of the network's input only"
            raise NotSimulated(msg)
        return np.asarray(input_value.shape[:1], np.int64)
    batch, rest = values[node.input[0]], constants[node.input[1]]
    return np.concatenate([np.asarray(batch), rest])


def _expand(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], _: Any, out: Simulation
) -> Value:
    x, shape = out.real(node.input[0], values, constants), values[node.input[1]]
    size = np.broadcast_shapes(x.values.shape, tuple(int(n) for n in np.asarray(shape)))
    return Float(np.broadcast_to(x.values, size), np.broadcast_to(x.error, size))


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
    "ReduceMean": reduce_mean,
    "Mul": mul,
    "Div": div,
    "PRelu": prelu,
    "BatchNormalization": batch_norm,
    "Concat": _concat,
    "MatMul": _product,
    "LayerNormalization": layer_norm,
    "Softmax": softmax,
    "Shape": _batch_of,
    "Expand": _expand,
    **dict.fromkeys(UNARY, unary),
    "Cast": _cast,
    **dict.fromkeys(
        ("Slice", "Pad", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "MaxPool", "Gather"), _move
    ),
}
