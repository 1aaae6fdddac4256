"""Operations of the integer simulator that move or select elements and compute no new values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import torch

from export.simulated import Array, Codes, Float, NotSimulated, Simulation, Value, as_float, attributes_of


def move(node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], *_: Any) -> Value:
    """Elements in other places: of codes these are codes of the same Grid."""
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


def concat(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], _: Any, out: Simulation
) -> Value:
    """Tensors joined along an axis, or a shape from its parts."""
    if isinstance(values.get(node.input[0]), np.ndarray):
        return batch_shape(node, values, constants)
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


def batch_shape(node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], *_: Any) -> Value:
    """The shape to which a constant is expanded, from the batch: [batch, ...]."""
    if node.op_type == "Shape":
        input_value = values[node.input[0]]
        if not isinstance(input_value, np.ndarray):
            msg = f"{node.name}: the simulator knows the shape of the network's input only"
            raise NotSimulated(msg)
        return np.asarray(input_value.shape[:1], np.int64)
    batch, rest = values[node.input[0]], constants[node.input[1]]
    return np.concatenate([np.asarray(batch), rest])


def expand(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], _: Any, out: Simulation
) -> Value:
    """A constant repeated for each image of the batch."""
    x, shape = out.real(node.input[0], values, constants), values[node.input[1]]
    size = np.broadcast_shapes(x.values.shape, tuple(int(n) for n in np.asarray(shape)))
    return Float(np.broadcast_to(x.values, size), np.broadcast_to(x.error, size))


def cast(node: onnx.NodeProto, values: dict[str, Value], *_: Any) -> Value:
    """The values are those of another float type: all of them are computed alike."""
    return values[node.input[0]]
