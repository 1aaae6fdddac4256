"""Converters of torch operators for data movement: shapes, slices, concatenation, padding and resizing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from crqat.export.graph.operators.walk import Arguments, Walk, as_list, axes_of, axis_of, first, operator


@operator("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "clone", "contiguous", "detach",
           "alias", "lift_fresh", "lift_fresh_copy", "positive", "resolve_conj", "resolve_neg")  # fmt: skip
def _nothing(w: Walk, a: Arguments) -> Any:
    return w.name(first(a))


@operator("to", "_to_copy", "type_as", "float")
def _to(w: Walk, a: Arguments) -> Any:
    before, after = a["self"].meta["val"].dtype, w.node.meta["val"].dtype
    if after.is_floating_point and after != torch.float32:
        w.refuse(f"a cast to {after}, although a runtime computes in the file's type")
    if before.is_floating_point and not after.is_floating_point and after != torch.bool:
        w.refuse(f"a cast of real values to {after}, which cuts off their fraction")
    return w.name(a["self"], w.node.meta["val"].dtype)


@operator("view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as")
def _reshape(w: Walk, a: Arguments) -> Any:
    return w.reshaped(w.name(a["self"]), w.sizes(a["self"]), w.shape(w.node))


@operator("squeeze")
def _squeeze(w: Walk, a: Arguments) -> Any:
    before = w.sizes(a["self"])
    asked = axes_of(a["self"], a.get("dim")) if a.get("dim") is not None else range(len(before))
    axes = [axis for axis in asked if before[axis] == 1]
    return w.emit("Squeeze", [w.name(a["self"]), w.ints(axes)]) if axes else w.name(a["self"])


@operator("unsqueeze")
def _unsqueeze(w: Walk, a: Arguments) -> Any:
    return w.emit("Unsqueeze", [w.name(a["self"]), w.ints([axis_of(w.node, a["dim"])])])


def _transposed(w: Walk, source: Any, permutation: Sequence[int]) -> Any:
    name = w.name(source)
    return name if list(permutation) == sorted(permutation) else w.emit("Transpose", [name], perm=list(permutation))


@operator("permute")
def _permute(w: Walk, a: Arguments) -> Any:
    return _transposed(w, a["self"], [axis_of(a["self"], axis) for axis in a["dims"]])


@operator("transpose", "swapaxes", "swapdims", "t", "mT", "numpy_T", "adjoint", "matrix_H")
def _transpose(w: Walk, a: Arguments) -> Any:
    ndim = a["self"].meta["val"].ndim
    pair = [a.get("dim0", a.get("axis0", -1)), a.get("dim1", a.get("axis1", -2))] if ndim > 1 else [0, 0]
    permutation = list(range(ndim))
    one, other = (axis % ndim for axis in pair)
    permutation[one], permutation[other] = other, one
    return _transposed(w, a["self"], permutation)


@operator("movedim", "moveaxis")
def _movedim(w: Walk, a: Arguments) -> Any:
    ndim = a["self"].meta["val"].ndim
    source, to = ([axis % ndim for axis in ([v] if isinstance(v, int) else v)] for v in (a["source"], a["destination"]))
    left = iter(axis for axis in range(ndim) if axis not in source)
    placed = dict(zip(to, source, strict=True))
    return _transposed(w, a["self"], [placed[axis] if axis in placed else next(left) for axis in range(ndim)])


@operator("expand", "expand_as", "broadcast_to")
def _expand(w: Walk, a: Arguments) -> Any:
    after = w.sizes(w.node)
    before = [1] * (len(after) - a["self"].meta["val"].ndim) + w.sizes(a["self"])
    if after == before:
        return w.name(a["self"])
    if any(new is None and old is not None for new, old in zip(after, before, strict=True)):
        return w.emit("Expand", [w.name(a["self"]), w.batch_shape(w.shape(w.node))])
    sizes = [1 if new == old or new is None else new for new, old in zip(after, before, strict=True)]
    return w.emit("Expand", [w.name(a["self"]), w.ints(sizes)])


@operator("repeat", "tile")
def _repeat(w: Walk, a: Arguments) -> Any:
    times = list(a["repeats"] if "repeats" in a else a["dims"])
    sizes, after = w.sizes(a["self"]), w.sizes(w.node)
    name = w.name(a["self"])
    extra = len(after) - len(sizes)
    if extra:
        name = w.emit("Unsqueeze", [name, w.ints(list(range(extra)))])
    times = [1] * (len(after) - len(times)) + times
    if after.count(None) > sizes.count(None):
        w.refuse("a tensor is repeated for each image; use expand")
    return w.emit("Tile", [name, w.ints(times)])


@operator("repeat_interleave")
def _repeat_interleave(w: Walk, a: Arguments) -> Any:
    axis, times = axis_of(a["self"], a["dim"]), a["repeats"]
    if not isinstance(times, int):
        w.refuse("elements are repeated by counts in a tensor")
    index = np.repeat(np.arange(w.known(a["self"], axis)), times)
    return w.emit("Gather", [w.name(a["self"]), w.ints(index.tolist())], axis=axis)


@operator("select")
def _select(w: Walk, a: Arguments) -> Any:
    axis = axis_of(a["self"], a["dim"])
    size = w.known(a["self"], axis)
    index = w.constant(np.asarray(a["index"] % size, np.int64))
    return w.emit("Gather", [w.name(a["self"]), index], axis=axis)


def _sliced(w: Walk, node: Any, axis: int, start: int, end: int, step: int = 1) -> str:
    bounds = [w.ints([value]) for value in (start, end, axis, step)]
    return str(w.emit("Slice", [w.name(node), *bounds]))


@operator("slice")
def _slice(w: Walk, a: Arguments) -> Any:
    axis, step = axis_of(a["self"], a["dim"]), a["step"]
    size = a["self"].meta["val"].shape[axis]
    start, end, step = slice(a["start"], a["end"], step).indices(size)
    if (start, end, step) == (0, size, 1):
        return w.name(a["self"])
    w.known(a["self"], axis)
    return _sliced(w, a["self"], axis, start, end, step)


@operator("narrow")
def _narrow(w: Walk, a: Arguments) -> Any:
    axis = axis_of(a["self"], a["dim"])
    start = a["start"] % w.known(a["self"], axis)
    return _sliced(w, a["self"], axis, start, start + a["length"])


@operator("split", "chunk", "split_with_sizes", "tensor_split", "unsafe_split", "unsafe_chunk")
def _split(w: Walk, a: Arguments) -> Any:
    """Write a split as Slice nodes, which may run on codes; a Split node would run on float values."""
    axis, start, parts = axis_of(first(a), a.get("dim", 0)), 0, []
    w.known(first(a), axis)
    read = {user.args[1] for user in w.node.users}
    for index, part in enumerate(w.node.meta["val"]):
        end = start + int(part.shape[axis])
        parts.append(_sliced(w, first(a), axis, start, end) if index in read else "")
        start = end
    return parts


@operator("unbind")
def _unbind(w: Walk, a: Arguments) -> Any:
    axis = axis_of(a["self"], a["dim"])
    read = {user.args[1] for user in w.node.users}
    found = []
    for index in range(w.known(a["self"], axis)):
        position = w.constant(np.asarray(index, np.int64))
        found.append(w.emit("Gather", [w.name(a["self"]), position], axis=axis) if index in read else "")
    return found


@operator("index", "index_select", "embedding")
def _index(w: Walk, a: Arguments) -> Any:
    source = a["self"] if "self" in a else a["weight"]
    indices = a["indices"] if "indices" in a else [*[None] * axis_of(source, a["dim"]), a["index"]]
    indices = indices if isinstance(indices, (list, tuple)) else [indices]
    read = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(read) != 1 or read[0][1].meta["val"].dtype == torch.bool:
        w.refuse("elements are selected by several tensors, or by a mask")
    axis, index = read[0]
    w.known(source, axis)
    return w.emit("Gather", [w.name(source), w.name(index)], axis=axis)


@operator("cat", "concat", "concatenate")
def _cat(w: Walk, a: Arguments) -> Any:
    dtype = w.node.meta["val"].dtype
    parts = [w.name(part, dtype) for part in a["tensors"] if part.meta["val"].numel()]
    axis = axis_of(w.node, a["axis"] if "axis" in a else a["dim"])
    return w.emit("Concat", parts, axis=axis) if len(parts) > 1 else parts[0]


@operator("hstack")
def _hstack(w: Walk, a: Arguments) -> Any:
    parts = [w.name(part, w.node.meta["val"].dtype) for part in a["tensors"]]
    return w.emit("Concat", parts, axis=min(1, w.node.meta["val"].ndim - 1))


@operator("stack")
def _stack(w: Walk, a: Arguments) -> Any:
    axis = w.ints([axis_of(w.node, a["dim"])])
    parts = [w.emit("Unsqueeze", [w.name(part), axis]) for part in a["tensors"]]
    return w.emit("Concat", parts, axis=axis_of(w.node, a["dim"]))


@operator("roll")
def _roll(w: Walk, a: Arguments) -> Any:
    node, name = a["self"], w.name(a["self"])
    for shift, dim in zip(as_list(a["shifts"], 1), as_list(a["dims"], 1), strict=True):
        axis = axis_of(node, dim)
        size = w.known(node, axis)
        cut = -shift % size
        bounds = [[w.ints([v]) for v in (low, high, axis, 1)] for low, high in ((cut, size), (0, cut))]
        if cut:
            name = w.emit("Concat", [w.emit("Slice", [name, *b]) for b in bounds], axis=axis)
    return name


@operator("flip")
def _flip(w: Walk, a: Arguments) -> Any:
    name = w.name(a["self"])
    for dim in a["dims"]:
        axis = axis_of(a["self"], dim)
        order = list(range(w.known(a["self"], axis)))[::-1]
        name = w.emit("Gather", [name, w.ints(order)], axis=axis)
    return name


@operator("pixel_shuffle")
def _pixel_shuffle(w: Walk, a: Arguments) -> Any:
    return w.emit("DepthToSpace", [w.float_name(a["self"])], blocksize=int(a["upscale_factor"]), mode="CRD")


@operator("pixel_unshuffle")
def _pixel_unshuffle(w: Walk, a: Arguments) -> Any:
    _, channels, height, width = w.shape(a["self"]) if a["self"].meta["val"].ndim == 4 else [0, 0, 0, 0]
    r = int(a["downscale_factor"])
    split = w.emit("Reshape", [w.name(a["self"]), w.ints([-1, channels, height // r, r, width // r, r])])
    turned = w.emit("Transpose", [split], perm=[0, 1, 3, 5, 2, 4])
    return w.emit("Reshape", [turned, w.ints(w.shape(w.node))])


@operator("channel_shuffle")
def _channel_shuffle(w: Walk, a: Arguments) -> Any:
    shape, groups = w.shape(a["self"]), int(a["groups"])
    split = w.emit("Reshape", [w.name(a["self"]), w.ints([-1, groups, shape[1] // groups, *shape[2:]])])
    turned = w.emit("Transpose", [split], perm=[0, 2, 1, *range(3, len(shape) + 1)])
    return w.emit("Reshape", [turned, w.ints(shape)])


@operator("pad", "constant_pad_nd")
def _pad(w: Walk, a: Arguments) -> Any:
    sizes, pads = w.sizes(a["self"]), list(a["pad"])
    ndim = len(sizes)
    mode, name = a.get("mode", "constant"), w.float_name(a["self"])
    pairs = [(0, 0)] * (ndim - len(pads) // 2) + list(zip(pads[::2], pads[1::2], strict=True))[::-1]
    for axis, (before, after) in enumerate(pairs):
        if before < 0 or after < 0:
            size = w.known(a["self"], axis)
            bounds = [w.ints([v]) for v in (max(-before, 0), size - max(-after, 0), axis, 1)]
            name = w.emit("Slice", [name, *bounds])
    pairs = [(max(before, 0), max(after, 0)) for before, after in pairs]
    if not any(before or after for before, after in pairs):
        return name
    if mode == "circular":
        for axis, (before, after) in enumerate(pairs):
            size = w.known(a["self"], axis) if before or after else 0
            ends = [(size - before, size)] * bool(before), [(0, after)] * bool(after)
            left, right = (
                [w.emit("Slice", [name, *(w.ints([v]) for v in (low, high, axis, 1))]) for low, high in end]
                for end in ends
            )
            name = w.emit("Concat", [*left, name, *right], axis=axis) if left or right else name
        return name
    amounts = w.ints([pair[0] for pair in pairs] + [pair[1] for pair in pairs])
    if mode != "constant":
        return w.emit("Pad", [name, amounts], mode={"reflect": "reflect", "replicate": "edge"}[mode])
    value = float(a["value"] or 0.0)
    return w.emit("Pad", [name, amounts, w.name(value) if value else ""], mode="constant")


@operator("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
           "_upsample_nearest_exact2d", "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d",
           "upsample_bicubic2d")  # fmt: skip
def _upsample(w: Walk, a: Arguments) -> Any:
    kind = str(w.node.target)
    before, after = (list(node.meta["val"].shape[2:]) for node in (a["input"], w.node))
    scales = [np.float32(1), np.float32(1)]
    for old, new in zip(before, after, strict=True):
        scale = np.float32(new / old)
        while math.floor(np.float32(old) * scale) < new:
            scale = np.nextafter(scale, np.float32(np.inf))
        scales.append(scale)
    attributes: dict[str, Any] = {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"}
    if "exact" in kind:
        attributes = {
            "mode": "nearest", "coordinate_transformation_mode": "half_pixel", "nearest_mode": "round_prefer_ceil",
        }  # fmt: skip
    elif "nearest" in kind:
        attributes = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    elif a["align_corners"]:
        attributes["coordinate_transformation_mode"] = "align_corners"
    if "bicubic" in kind:
        attributes.update(mode="cubic", cubic_coeff_a=-0.75)
    return w.emit("Resize", [w.float_name(a["input"]), "", w.constant(np.asarray(scales))], **attributes)
