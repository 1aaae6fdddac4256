"""Simulated operations that move or select elements without computing new values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from crqat.export.graph.data_movement import ON_REAL_VALUES, PARTIAL_MOVEMENT
from crqat.export.simulator.float_ops import compute
from crqat.export.simulator.pool_ops import max_pool
from crqat.export.simulator.values import (
    UNIT_ROUNDOFF,
    Array,
    Codes,
    Float,
    NotSimulated,
    Simulation,
    Value,
    as_float,
    attributes_of,
)

# They select codes from tensors on the same Grid; otherwise they compute on float values.
SELECTING = ("Max", "Min", "Where", "ReduceMax", "ReduceMin", "GlobalMaxPool")
# Consumers of these operations compute on float values.
_BEHIND_REAL = {*ON_REAL_VALUES, *PARTIAL_MOVEMENT, *SELECTING}


def move(node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], _: Any, out: Simulation) -> Value:
    """Compute an operation that moves elements, such as a Transpose; codes stay codes of the same Grid."""
    value = values[node.input[0]]
    if node.op_type == "Pad" and len(node.input) > 2 and node.input[2]:
        padding = constants[node.input[2]]
        if padding != (value.zero_point if isinstance(value, Codes) and padding.dtype.kind in "iu" else 0):
            if padding.dtype.kind in "iu":
                msg = f"{node.name}: the simulator pads codes only with their zero point (0.0), not with {padding}"
                raise NotSimulated(msg)
            x, stored = as_float(value), out.real(node.input[2], {}, constants)
            moved, error = _moved(node, x.values, constants), _moved(node, x.error, constants)
            inside = _moved(node, np.ones(x.values.shape), constants) > 0
            return Float(np.where(inside, moved, stored.values), np.where(inside, error, stored.error))
    if not isinstance(value, Codes):
        x = as_float(value)
        return Float(_moved(node, x.values, constants), _moved(node, x.error, constants))
    return _same_grid(node, value, _moved(node, value.integers, constants))


def _same_grid(node: onnx.NodeProto, value: Codes, integers: Array) -> Codes:
    selected = value.selected or (value.real and node.op_type in _BEHIND_REAL)
    return replace(value, integers=integers, selected=selected)


def select(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], model: Any, out: Simulation
) -> Value:
    """Select elements, e.g. the larger of two tensors; codes on one Grid stay codes of that Grid."""
    chosen = node.input[1:] if node.op_type == "Where" else node.input[:1] if "Reduce" in node.op_type else node.input
    parts = [values.get(name) for name in chosen]
    first = parts[0]
    condition = values.get(node.input[0])
    open_choice = node.op_type == "Where" and isinstance(condition, Float) and bool(condition.error.any())
    if (
        not isinstance(first, Codes)
        or open_choice
        or not all(first.same_grid(part) for part in parts if part is not None)
    ):
        return compute(node, values, constants, model, out)
    if any(part is None for part in parts):
        return compute(node, values, constants, model, out)
    exact: dict[str, Value] = {
        name: Float(part.integers.astype(np.float64), np.zeros(part.integers.shape))
        for name, part in zip(chosen, parts, strict=True) if isinstance(part, Codes)
    }  # fmt: skip
    result = as_float(compute(node, {**values, **exact}, constants, model, out))
    return _same_grid(node, first, result.values.astype(np.int32))


def split(node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], *_: Any) -> list[Value]:
    """Split a tensor into equal parts along an axis."""
    value, axis = values[node.input[0]], attributes_of(node).get("axis", 0)
    whole = value.integers if isinstance(value, Codes) else as_float(value).values
    sizes = [whole.shape[axis] // len(node.output)] * len(node.output)
    if len(node.input) > 1 and node.input[1]:
        sizes = [int(size) for size in constants[node.input[1]]]
    if sum(sizes) != whole.shape[axis]:
        msg = f"{node.name}: the simulator does not support a Split into unequal parts"
        raise NotSimulated(msg)
    ends = np.cumsum(sizes)[:-1]
    if isinstance(value, Codes):
        return [_same_grid(node, value, part) for part in np.split(value.integers, ends, axis)]
    real = as_float(value)
    parts = zip(np.split(real.values, ends, axis), np.split(real.error, ends, axis), strict=True)
    return [Float(values_, error) for values_, error in parts]


def resize(node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], *_: Any) -> Value:
    """Resize an image: nearest moves pixels, other modes interpolate between neighbours."""
    value, attributes = values[node.input[0]], attributes_of(node)
    shape = (value.integers if isinstance(value, Codes) else as_float(value).values).shape
    if len(node.input) > 3 and node.input[3]:
        sizes = [int(size) for size in constants[node.input[3]]]
        scales = [size / own for size, own in zip(sizes, shape, strict=True)]
    else:
        scales = [float(scale) for scale in constants[node.input[2]]]
        sizes = [int(np.floor(own * scale)) for own, scale in zip(shape, scales, strict=True)]
    mode = attributes.get("mode", b"nearest").decode()
    where = attributes.get("coordinate_transformation_mode", b"half_pixel").decode()
    nearest = attributes.get("nearest_mode", b"round_prefer_floor").decode()
    unknown = where == "tf_crop_and_resize" or attributes.get("antialias") or attributes.get("exclude_outside")
    if mode not in ("nearest", "linear", "cubic") or unknown:
        further = ", ".join(f"{key}={attributes.get(key, 0)}" for key in ("antialias", "exclude_outside"))
        msg = (
            f"{node.name}: the simulator does not support a Resize with mode={mode}, "
            f"coordinate_transformation_mode={where}, {further}"
        )
        raise NotSimulated(msg)
    positions = [
        _positions(own, size, scale, where) for own, size, scale in zip(shape[2:], sizes[2:], scales[2:], strict=True)
    ]
    if sizes[:2] != list(shape[:2]):
        msg = f"{node.name}: the simulator does not support a Resize that changes the number of images or channels"
        raise NotSimulated(msg)
    if mode == "nearest":
        roundings: dict[str, Callable[[Array], Array]] = {
            "floor": np.floor, "ceil": np.ceil, "round_prefer_floor": lambda x: np.ceil(x - 0.5),
            "round_prefer_ceil": lambda x: np.floor(x + 0.5),
        }  # fmt: skip
        rounding = roundings[nearest]
        index = [
            np.clip(rounding(position), 0, own - 1).astype(np.int64)
            for position, own in zip(positions, shape[2:], strict=True)
        ]
        picked = np.ix_(*(np.arange(n) for n in shape[:2]), *index)
        if isinstance(value, Codes):
            return _same_grid(node, value, value.integers[picked])
        real = as_float(value)
        return Float(real.values[picked], real.error[picked])
    real = as_float(value)
    if mode == "cubic":
        return _cubic(real, positions, float(attributes.get("cubic_coeff_a", -0.75)))
    result, error, magnitude = real.values, real.error, np.abs(real.values)
    moved = np.zeros(())
    for axis, (position, own) in enumerate(zip(positions, shape[2:], strict=True), start=2):
        position = np.clip(position, 0, own - 1)
        # A position is rounded four times, relative to the size; the value moves by the neighbours' difference.
        spread = np.abs(magnitude).max(axis=axis, keepdims=True, initial=0.0)
        result, error, magnitude = (_between(array, position, axis) for array in (result, error, magnitude))
        moved = moved + 2 * 4 * own * spread.max(axis=tuple(range(2, spread.ndim)), keepdims=True, initial=0.0)
    # A weight, a product and a sum for each of the two neighbours on each axis.
    return Float(result, error + UNIT_ROUNDOFF * (moved + 4 * (len(shape) - 2) * magnitude))


def _positions(own: int, size: int, scale: float, where: str) -> Array:
    """Return the position of each pixel of the result in the input."""
    pixel = np.arange(size, dtype=np.float64)
    if where == "align_corners":
        return pixel * (own - 1) / max(size - 1, 1)
    if where == "asymmetric":
        return pixel / scale
    if where == "pytorch_half_pixel" and size == 1:
        return np.zeros(1)
    return (pixel + 0.5) / scale - 0.5


def _cubic(real: Float, positions: list[Array], a: float) -> Float:
    """Interpolate cubically (Keys, 1981), as ONNX's Resize does: four neighbors on each axis, edges repeated."""
    result, error = real.values, real.error
    for axis, position in enumerate(positions, start=2):
        own = result.shape[axis]
        low = np.floor(position)
        near, far = position - low, 1 - (position - low)

        def outer(t: Array) -> Array:
            return ((a * t - 5 * a) * t + 8 * a) * t - 4 * a

        def inner(t: Array) -> Array:
            return ((a + 2) * t - (a + 3)) * t * t + 1

        weights = [outer(near + 1), inner(near), inner(far), outer(far + 1)]
        largest = np.abs(result).max(axis=axis, keepdims=True, initial=0.0)
        total, spread = np.zeros(()), np.zeros(())
        for step, weight in enumerate(weights, start=-1):
            index = np.clip(low + step, 0, own - 1).astype(np.int64)
            along = weight.reshape(-1, *[1] * (result.ndim - 1 - axis))
            total = total + np.take(result, index, axis) * along
            spread = spread + np.take(error + 5 * UNIT_ROUNDOFF * np.abs(result), index, axis) * np.abs(along)
        # A position is rounded four times, relative to the size, and the weights' slopes sum to less than 5. A weight
        # is six operations on numbers below 12 |a| + 3.
        rounded = 5 * 4 * own + 4 * 6 * (12 * abs(a) + 3)
        result, error = np.asarray(total), np.asarray(spread + UNIT_ROUNDOFF * rounded * largest)
    return Float(result, error)


def _between(array: Array, position: Array, axis: int) -> Array:
    low = np.floor(position).astype(np.int64)
    high = np.minimum(low + 1, array.shape[axis] - 1)
    share = (position - low).reshape(-1, *[1] * (array.ndim - 1 - axis))
    return np.asarray(np.take(array, low, axis) * (1 - share) + np.take(array, high, axis) * share)


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
            msg = f"{node.name}: the simulator does not support a Pad of {pads.tolist()} in mode {mode}"
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
    if node.op_type == "Tile":
        return np.tile(array, constants[node.input[1]])
    if node.op_type in ("DepthToSpace", "SpaceToDepth"):
        return _pixel_shuffled(array, node.op_type, attributes)
    if node.op_type == "MaxPool":
        return max_pool(attributes, array)
    msg = f"{node.name}: the simulator does not support {node.op_type}"
    raise NotSimulated(msg)


def _pixel_shuffled(array: Array, op_type: str, attributes: dict[str, Any]) -> Array:
    n, c, h, w = array.shape
    block = attributes["blocksize"]
    if op_type == "SpaceToDepth":
        blocks = array.reshape(n, c, h // block, block, w // block, block).transpose(0, 3, 5, 1, 2, 4)
        return blocks.reshape(n, c * block * block, h // block, w // block)
    depth = c // block**2
    if attributes.get("mode", b"DCR") == b"CRD":
        blocks = array.reshape(n, depth, block, block, h, w).transpose(0, 1, 4, 2, 5, 3)
    else:
        blocks = array.reshape(n, block, block, depth, h, w).transpose(0, 3, 4, 1, 5, 2)
    return blocks.reshape(n, depth, h * block, w * block)


def concat(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], _: Any, out: Simulation
) -> Value:
    """Concatenate tensors along an axis."""
    axis = attributes_of(node)["axis"]
    parts = [values[name] if name in values else out.real(name, values, constants) for name in node.input]
    first = parts[0]
    if isinstance(first, Codes) and all(first.same_grid(part) for part in parts):
        integers = np.concatenate([part.integers for part in parts if isinstance(part, Codes)], axis)
        return replace(first, integers=integers, selected=any(isinstance(p, Codes) and p.selected for p in parts))
    real = [as_float(part) for part in parts]
    return Float(np.concatenate([x.values for x in real], axis), np.concatenate([x.error for x in real], axis))


def sizes(node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array]) -> Array | None:
    """Return the result of a node that computes with integers only, such as a shape; None for any other node."""
    if node.op_type == "Shape":
        value, attributes = values[node.input[0]], attributes_of(node)
        whole = value if isinstance(value, np.ndarray) else value.integers if isinstance(value, Codes) else None
        shape = as_float(value).values.shape if whole is None else whole.shape
        return np.asarray(shape[attributes.get("start", 0) : attributes.get("end", len(shape))], np.int64)
    read = {name: values.get(name, constants.get(name)) for name in node.input if name}
    arrays = {name: value for name, value in read.items() if isinstance(value, np.ndarray) and value.dtype.kind in "ib"}
    computed = any(isinstance(values.get(name), np.ndarray) for name in arrays)
    if not computed or len(arrays) < len(read) or node.op_type in ("ConstantOfShape", "DequantizeLinear"):
        return None
    result: Any = ReferenceEvaluator(node).run(None, arrays)
    return np.asarray(result[0])


def constant_of_shape(node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], *_: Any) -> Value:
    """Return a tensor filled with one number."""
    shape = values.get(node.input[0], constants.get(node.input[0]))
    given = attributes_of(node).get("value")
    number = 0.0 if given is None else float(onnx.numpy_helper.to_array(given).reshape(()))
    filled = np.full([int(size) for size in np.asarray(shape)], number)
    return Float(filled, np.zeros(filled.shape))


def expand(
    node: onnx.NodeProto, values: dict[str, Value], constants: dict[str, Array], _: Any, out: Simulation
) -> Value:
    """Repeat a tensor, such as a constant for each image of the batch."""
    shape = np.asarray(values.get(node.input[1], constants.get(node.input[1])))
    value = values.get(node.input[0])
    x = out.real(node.input[0], values, constants)
    size = np.broadcast_shapes(x.values.shape, tuple(int(n) for n in shape))
    if isinstance(value, Codes):
        return _same_grid(node, value, np.broadcast_to(value.integers, size))
    return Float(np.broadcast_to(x.values, size), np.broadcast_to(x.error, size))


def cast(node: onnx.NodeProto, values: dict[str, Value], *_: Any) -> Value:
    """Return the value of a Cast to another float type: it is unchanged, because all float types are computed alike."""
    return values[node.input[0]]
