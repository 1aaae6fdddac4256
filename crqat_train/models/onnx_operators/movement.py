"""Converters of ONNX operators: data movement, and operations on shapes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from crqat.train.models.onnx_operators.node import IMAGE_RANK, Node, Refused, Result, Value, each_number


def _shape(node: Node) -> Value:
    start, end = node.attribute("start", 0), node.attribute("end")
    return node.emit(_sizes, node.input(0), start, end)


def _sizes(value: Any, start: int, end: int | None) -> list[Any]:
    return ([len(value)] if isinstance(value, list) else list(value.shape))[start:end]


def _flatten(node: Node) -> Value:
    if node.attribute("axis", 1) % node.input(0).rank != 1:
        msg = "is supported with axis 1 only, which keeps the images apart"
        raise Refused(msg)
    return node.emit(torch.flatten, node.input(0), 1)


def _reshape(node: Node) -> Value:
    value, shape = node.input(0), node.input(1)
    if not value.is_tensor:
        if value.name is not None:
            is_flat = isinstance(value.sample, list) and shape.sample in ([-1], [len(value.sample)])
            reason = "reshapes a shape that the file computes, for example from a free height and width"
            return value if is_flat else _refuse(reason)
        return Value.of(_reshaped(torch.tensor(value.sample), node.constant(1)), value.origin)
    if shape.name is not None:
        return node.emit(_reshaped, value, shape)
    sizes = list(shape.sample)
    batch = len(value.sample) if value.rank else 0
    made = _reshaped(value.sample, sizes)
    flat = len(sizes) == 2 and value.rank > 2 and list(made.shape) == [batch, value.sample[0].numel()]
    fixed = node.builder.batch
    # In a file for a fixed number of images, a shape that begins with this number stands for any number.
    if value.name is not None and flat and (sizes[0] in (0, -1) or sizes[0] == fixed):
        return node.emit(torch.flatten, value, 1)
    if fixed is not None and value.name is not None and len(sizes) > 1 and made.shape[0] % fixed == 0:
        sizes = [-1, *made.shape[1:]]
    return node.emit(_reshaped, value, sizes)


def _reshaped(value: Any, sizes: Sequence[Any]) -> Any:
    return value.reshape([value.shape[axis] if _is(size, 0) else size for axis, size in enumerate(sizes)])


def _is(size: Any, number: int) -> bool:
    return isinstance(size, int) and size == number


def _refuse(reason: str) -> Value:
    msg = f"{reason}; that is not supported"
    raise Refused(msg)


def _transpose(node: Node) -> Value:
    value = node.input(0)
    order = node.attribute("perm") or list(reversed(range(value.rank)))
    return node.emit(torch.permute, value, tuple(order)) if value.is_tensor else value


def _squeeze(node: Node) -> Value:
    value, axes = node.input(0), node.whole(1)
    if not value.is_tensor:
        return node.emit(operator.getitem, value, 0) if isinstance(value.sample, list) else value
    if axes is None:
        axes = [axis for axis, size in enumerate(value.sample.shape) if axis and size == 1]
    for axis in sorted((axis % value.rank for axis in axes), reverse=True):
        value = node.emit(torch.squeeze, value, axis)
    return value


def _unsqueeze(node: Node) -> Value:
    value, axes = node.input(0), node.whole(1)
    if not value.is_tensor and not isinstance(value.sample, float):
        return node.emit(_listed, value) if not isinstance(value.sample, list) else _whole_tensor(node, value, axes)
    if not value.is_tensor:
        value = Value(torch.tensor(value.sample), None, value.origin)
    for axis in sorted(axis % (value.rank + len(axes)) for axis in axes):
        value = node.emit(torch.unsqueeze, value, axis)
    return value


def _listed(number: Any) -> list[Any]:
    return [number]


def _whole_tensor(node: Node, value: Value, axes: Sequence[int]) -> Value:
    if value.name is not None:
        return _refuse("adds dimensions to a shape that the file computes")
    tensor = torch.tensor(value.sample)
    for axis in sorted(axis % (1 + len(axes)) for axis in axes):
        tensor = tensor.unsqueeze(axis)
    return Value(tensor, None, value.origin)


def _concat(node: Node) -> Value:
    values = [node.input(index) for index in range(len(node.inputs))]
    if not any(value.is_tensor for value in values):
        return node.emit(_joined, values)
    axis = node.attribute("axis") % max(value.rank for value in values)
    first = next((value for value in values if value.name is not None), None)
    if first is not None and node.builder.batch == 1 and axis:
        # A constant that belongs to the single image of the file, such as a class token, is repeated for each image.
        values = [value if value.name is not None else node.emit(_for_each, value, first) for value in values]
    return node.emit(torch.cat, values, axis)


def _joined(parts: Sequence[Any]) -> list[Any]:
    return [size for part in parts for size in (part if isinstance(part, list) else [part])]


def _for_each(value: Tensor, images: Tensor) -> Tensor:
    return value.expand(images.shape[0], *value.shape[1:])


def _expand(node: Node) -> Value:
    value, shape = node.input(0), node.input(1)
    if not value.is_tensor:
        msg = "expands a single number to a tensor; that is not supported"
        raise Refused(msg)
    return node.emit(_expanded, value, shape)


def _expanded(value: Any, sizes: Sequence[Any]) -> Any:
    own = [1] * (len(sizes) - value.ndim) + list(value.shape)
    return value.expand([mine if _is(size, 1) else size for mine, size in zip(own, sizes, strict=True)])


def _gather(node: Node) -> Value:
    value, index, axis = node.input(0), node.constant(1), node.attribute("axis", 0)
    if isinstance(value.sample, list):
        return node.emit(operator.getitem, value, index) if isinstance(index, int) else node.emit(_picked, value, index)
    if isinstance(index, int):
        return node.emit(torch.select, value, axis, index)
    if not isinstance(index, list):
        index = index.tolist()
    places = torch.tensor(index)
    if value.name is None:
        return node.emit(lambda table: torch.index_select(table, axis, places.flatten()).reshape(
            *table.shape[:axis], *places.shape, *table.shape[axis + 1 :]), value)  # fmt: skip
    if places.ndim != 1:
        msg = "its indices must be one number or a list"
        raise Refused(msg)
    return node.emit(torch.index_select, value, axis % value.rank, Value(places, None, node.proto.input[1]))


def _picked(sizes: Sequence[Any], places: Sequence[int]) -> list[Any]:
    return [sizes[place] for place in places]


def _slice(node: Node) -> Value:
    value, starts, ends = node.input(0), node.whole(1), node.input(2)
    axes = node.whole(3) or list(range(len(starts)))
    steps = node.whole(4) or [1] * len(starts)
    rank = value.rank
    if any(step < 1 for step in steps):
        if value.name is not None:
            msg = "slices values of the image backwards; that is not supported"
            raise Refused(msg)
        table = torch.as_tensor(value.sample).numpy()  # NumPy supports negative steps, PyTorch does not
        return Value.of(torch.from_numpy(_sliced(table, starts, ends.sample, axes, steps).copy()), value.origin)
    return node.emit(_sliced, value, starts, ends, [axis % rank for axis in axes], steps)


def _sliced(value: Any, starts: Sequence[int], ends: Any, axes: Sequence[int], steps: Sequence[int]) -> Any:
    ends = ends if isinstance(ends, (list, tuple)) else [ends]
    if isinstance(value, list):
        return value[starts[0] : ends[0] : steps[0]]
    parts = dict(zip(axes, zip(starts, ends, steps, strict=True), strict=True))
    whole = slice(None)
    return value[tuple(slice(*parts[axis]) if axis in parts else whole for axis in range(max(axes) + 1))]


def _split(node: Node) -> Result:
    value, axis = node.input(0), node.attribute("axis", 0)
    sizes, count = node.whole(1), len(node.proto.output)
    if sizes is None:
        sizes = -(-value.sample.shape[axis] // count)
    parts = node.emit(torch.split, value, sizes, axis)
    return tuple(node.emit(operator.getitem, parts, index) for index in range(count))


def _pad(node: Node) -> Value:
    value, pads, axes = node.input(0), node.whole(1), node.whole(3)
    axes = [axis % value.rank for axis in axes] if axes is not None else list(range(value.rank))
    sides = {axis: (pads[index], pads[index + len(axes)]) for index, axis in enumerate(axes)}
    order = [side for axis in reversed(range(value.rank)) for side in sides.get(axis, (0, 0))]
    while order and order[-2:] == [0, 0]:
        order = order[:-2]
    if not order:
        return value
    mode = {"edge": "replicate", "wrap": "circular"}.get(
        node.attribute("mode", "constant"), node.attribute("mode", "constant")
    )
    if mode != "constant":
        return node.emit(functional.pad, value, order, mode)
    filling = float(node.constant(2, 0.0))
    return (
        node.emit(functional.pad, value, order, "constant", filling)
        if filling
        else node.emit(functional.pad, value, order)
    )


def _resize(node: Node) -> Value:
    value, scales, sizes = node.input(0), node.optional(2), node.optional(3)
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(node.attribute("mode", "nearest"), "nearest")
    place = node.attribute("coordinate_transformation_mode", "half_pixel")
    aligned = place == "align_corners"
    if value.rank != IMAGE_RANK or node.attribute("axes") is not None or node.attribute("antialias", 0):
        msg = "is supported over images only, without axes and without antialias"
        raise Refused(msg)
    if mode == "nearest" and (place != "asymmetric" or node.attribute("nearest_mode") != "floor"):
        msg = "the mode nearest is supported only as in PyTorch: asymmetric coordinates, rounded down (floor)"
        raise Refused(msg)
    if mode != "nearest" and place not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        msg = f"coordinate_transformation_mode {place} is not supported; export it with half_pixel or align_corners"
        raise Refused(msg)
    corners = None if mode == "nearest" else aligned
    if scales is not None and (not isinstance(scales.sample, list) or scales.sample):
        factors = node.weight(2).tolist()
        if factors[:2] != [1.0, 1.0]:
            msg = "changes the number of images or channels; only height and width can be resized"
            raise Refused(msg)
        return node.emit(functional.interpolate, value, None, tuple(factors[2:]), mode, corners)
    if sizes is None:
        msg = "has neither the input `sizes` nor `scales`; one of them is needed"
        raise Refused(msg)
    return node.emit(_resized, value, sizes, mode, corners)


def _resized(value: Tensor, sizes: Sequence[Any], mode: str, corners: bool | None) -> Tensor:
    return functional.interpolate(value, list(sizes[2:]), None, mode, corners)


def _constant(node: Node) -> Value:
    import onnx

    name = node.proto.output[0]
    for key in ("value_float", "value_floats", "value_int", "value_ints"):
        if node.attribute(key) is not None:
            found = node.attribute(key)
            return Value.of(torch.tensor(found) if isinstance(found, list) else found, name)
    tensor = node.attribute("value")
    if tensor is None:
        msg = "has no tensor of numbers as its value; only such constants are supported"
        raise Refused(msg)
    return Value.of(torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()), name)


def _filled(node: Node) -> Value:
    import onnx

    tensor = node.attribute("value")
    number = 0.0 if tensor is None else onnx.numpy_helper.to_array(tensor).flatten()[0].item()
    shape = node.constant(0)
    if math.prod(shape) > 2**24:
        msg = f"makes a tensor of {math.prod(shape)} numbers; so large a constant is refused"
        raise Refused(msg)
    return Value.of(torch.full(shape, number), node.proto.output[0])


def _cast(node: Node) -> Value:
    import onnx

    value, to = node.input(0), node.attribute("to")
    if value.name is None:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(to)
        sample = value.sample.numpy() if isinstance(value.sample, Tensor) else value.sample
        import numpy as np

        return Value.of(torch.from_numpy(np.array(sample).astype(dtype)), value.origin)
    whole = to in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
    same = whole if not value.is_tensor else to == onnx.TensorProto.FLOAT and value.sample.dtype == torch.float32
    if not same:
        msg = f"casts values of the image to {onnx.TensorProto.DataType.Name(to)}; only float32 is supported"
        raise Refused(msg)
    return value


def _on_shapes(function: Callable[..., Any]) -> Callable[[Node], Value]:
    """Return a converter of an operation that exporters use on shapes only."""

    def convert(node: Node) -> Value:
        values = [node.input(index) for index in range(len(node.inputs))]
        if any(value.is_tensor and value.name is not None for value in values):
            msg = "is supported on shapes only, not on values of the image"
            raise Refused(msg)
        return node.emit(function, *(_plain(value) for value in values))

    return convert


def _plain(value: Value) -> Value:
    return value if not value.is_tensor else Value(value.sample.tolist(), None, value.origin)


def _where(condition: Any, yes: Any, no: Any) -> Any:
    return yes if condition else no


OPERATORS: dict[str, Callable[[Node], Result]] = {
    "Cast": _cast,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _filled,
    "Equal": _on_shapes(each_number(operator.eq)),
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Identity": lambda node: node.input(0),
    "Mod": _on_shapes(each_number(operator.mod)),
    "Pad": _pad,
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _on_shapes(each_number(_where)),
}
