"""Converters of torch operators: convolutions, linear layers, normalization, pooling, matrix products and attention."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from crqat.export.graph.operators.walk import Arguments, Walk, as_list, operator
from crqat.export.graph.record import DOMAIN


@operator("conv1d", "conv2d", "conv3d")
def _conv(w: Walk, a: Arguments) -> Any:
    dims = a["weight"].meta["val"].ndim - 2
    kernel = list(a["weight"].meta["val"].shape[2:])
    dilations = as_list(a["dilation"], dims)
    padding = a["padding"]
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        pads = [t // 2 for t in total] + [t - t // 2 for t in total]
    else:
        pads = as_list(0 if padding == "valid" else padding, dims) * 2
    inputs = [w.float_name(a["input"]), w.float_name(a["weight"])]
    if a["bias"] is not None:
        inputs.append(w.float_name(a["bias"]))
    return w.emit(
        "Conv", inputs, dilations=dilations, group=int(a["groups"]), kernel_shape=kernel, pads=pads,
        strides=as_list(a["stride"], dims),
    )  # fmt: skip


@operator("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(w: Walk, a: Arguments) -> Any:
    dims = a["weight"].meta["val"].ndim - 2
    inputs = [w.float_name(a["input"]), w.float_name(a["weight"])]
    if a["bias"] is not None:
        inputs.append(w.float_name(a["bias"]))
    further = as_list(a["output_padding"], dims)
    attributes: Arguments = {"output_padding": further} if any(further) else {}
    return w.emit(
        "ConvTranspose", inputs, dilations=as_list(a["dilation"], dims), group=int(a["groups"]),
        kernel_shape=list(a["weight"].meta["val"].shape[2:]), pads=as_list(a["padding"], dims) * 2,
        strides=as_list(a["stride"], dims), **attributes,
    )  # fmt: skip


@operator("linear")
def _linear(w: Walk, a: Arguments) -> Any:
    """Write a linear layer as a Gemm with its bias; tensors of more than two dimensions are reshaped around it.

    If a quantizer is the only consumer of the result, it is placed before the second Reshape, so that the Reshape moves
    codes instead of float values.
    """
    x, weight = a["input"], a["weight"]
    name, weights = w.float_name(x), w.float_name(weight)
    channels, features = weight.meta["val"].shape
    bias = np.zeros(channels, np.float32)
    given = w.constant(bias) if a["bias"] is None else w.float_name(a["bias"])
    if x.meta["val"].ndim == 2:
        return w.emit("Gemm", [name, weights, given], transB=1)
    rows = w.emit("Reshape", [name, w.ints([-1, features])])
    flat = w.emit("Gemm", [rows, weights, given], transB=1)
    shape, users = w.shape(w.node), list(w.node.users)
    if len(users) == 1 and users[0].target is torch.ops.crqat.edge.default:
        quantized = w.emit("Edge", [flat], domain=DOMAIN, edge=users[0].args[1])
        w.names[users[0]] = w.emit("Reshape", [quantized, w.ints(shape)])
        return flat
    return w.emit("Reshape", [flat, w.ints(shape)])


@operator("edge")
def _edge(w: Walk, a: Arguments) -> Any:
    if w.node in w.names:
        return w.names[w.node]
    return w.emit("Edge", [w.name(a["x"])], domain=DOMAIN, edge=a["edge"])


@operator("batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def _batch_norm(w: Walk, a: Arguments) -> Any:
    channels = a["input"].meta["val"].shape[1]
    names = []
    for key, default in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
        filled = np.full(channels, default, np.float32)
        names.append(w.constant(filled) if a[key] is None else w.float_name(a[key]))
    return w.emit("BatchNormalization", [w.float_name(a["input"]), *names], epsilon=float(a["eps"]))


@operator("instance_norm")
def _instance_norm(w: Walk, a: Arguments) -> Any:
    if not a["use_input_stats"]:
        return _batch_norm(w, a)
    channels = a["input"].meta["val"].shape[1]
    gain = w.constant(np.ones(channels, np.float32)) if a["weight"] is None else w.float_name(a["weight"])
    shift = w.constant(np.zeros(channels, np.float32)) if a["bias"] is None else w.float_name(a["bias"])
    return w.emit("InstanceNormalization", [w.float_name(a["input"]), gain, shift], epsilon=float(a["eps"]))


@operator("group_norm")
def _group_norm(w: Walk, a: Arguments) -> Any:
    x, groups = a["input"], int(a["num_groups"])
    sizes = w.sizes(x)
    inner = math.prod(w.known(x, axis) for axis in range(1, len(sizes))) // groups
    grouped = w.emit("Reshape", [w.float_name(x), w.ints([-1, groups, inner])])
    ones, zeros = (w.constant(np.full(groups, value, np.float32)) for value in (1, 0))
    normal = w.emit("InstanceNormalization", [grouped, ones, zeros], epsilon=float(a["eps"]))
    result = w.emit("Reshape", [normal, w.ints(w.shape(x))])
    for operation, value in (("Mul", a["weight"]), ("Add", a["bias"])):
        if value is not None:
            stored = w.constants[w.float_name(value)].reshape(-1, *[1] * (len(sizes) - 2))
            result = w.emit(operation, [result, w.constant(stored)])
    return result


@operator("layer_norm")
def _layer_norm(w: Walk, a: Arguments) -> Any:
    shape = list(a["normalized_shape"])
    gain = w.constant(np.ones(shape, np.float32)) if a["weight"] is None else w.float_name(a["weight"])
    shift = w.constant(np.zeros(shape, np.float32)) if a["bias"] is None else w.float_name(a["bias"])
    inputs = [w.float_name(a["input"]), gain, shift]
    return w.emit("LayerNormalization", inputs, axis=-len(shape), epsilon=float(a["eps"]))


@operator("rms_norm")
def _rms_norm(w: Walk, a: Arguments) -> Any:
    name, axes = w.float_name(a["input"]), list(range(-len(a["normalized_shape"]), 0))
    epsilon = float(torch.finfo(torch.float32).eps if a["eps"] is None else a["eps"])
    mean = w.emit("ReduceMean", [w.emit("Mul", [name, name])], axes=axes, keepdims=1)
    root = w.emit("Sqrt", [w.emit("Add", [mean, w.name(epsilon)])])
    result = w.emit("Div", [name, root])
    return result if a["weight"] is None else w.emit("Mul", [result, w.float_name(a["weight"])])


def _pool_attributes(a: Arguments, dims: int) -> dict[str, Any]:
    kernel = as_list(a["kernel_size"], dims)
    strides = as_list(a["stride"], dims) if a["stride"] not in (None, []) else kernel
    return {
        "kernel_shape": kernel,
        "strides": strides,
        "pads": as_list(a["padding"], dims) * 2,
        "ceil_mode": int(a["ceil_mode"]),
    }


@operator("max_pool1d", "max_pool2d", "max_pool3d")
def _max_pool(w: Walk, a: Arguments) -> Any:
    dims = w.node.meta["val"].ndim - 2
    attributes = {**_pool_attributes(a, dims), "dilations": as_list(a["dilation"], dims)}
    return w.emit("MaxPool", [w.float_name(a["self"])], **attributes)


@operator("avg_pool1d", "avg_pool2d", "avg_pool3d")
def _avg_pool(w: Walk, a: Arguments) -> Any:
    """Write an average pool, with a Pad before it and a Mul after it where ONNX's AveragePool alone is not enough.

    With ceil_mode, the last window may reach beyond the padded image, and ONNX Runtime's integer kernel would divide
    the sum of such a window by a wrong number. The Pad therefore makes the padding part of the image, and with a
    divisor also what the window covers beyond it. The Mul replaces torch's `divisor_override`, which ONNX lacks.
    """
    x, name, divisor = a["self"], w.float_name(a["self"]), a.get("divisor_override")
    dims = w.node.meta["val"].ndim - 2
    attributes = _pool_attributes(a, dims)
    kernel, strides, pads = (attributes[key] for key in ("kernel_shape", "strides", "pads"))
    beyond = []  # by how much the last window reaches beyond the padded image
    for axis in range(dims):
        covered = (w.known(w.node, axis + 2) - 1) * strides[axis] + kernel[axis]
        beyond.append(covered - w.known(x, axis + 2) - 2 * pads[axis])
    if not any(further > 0 for further in beyond):
        attributes["ceil_mode"] = 0
    counts = bool(any(pads) and (a["count_include_pad"] or divisor))
    if attributes["ceil_mode"] and (counts or divisor):
        behind = [pad + (further if divisor or further < 0 else 0) for pad, further in zip(pads, beyond, strict=False)]
        if min(behind) < 0:
            w.refuse("an average pool with ceil_mode whose last pixels are in no window; crop its input")
        name = w.emit("Pad", [name, w.ints([0, 0, *pads[:dims], 0, 0, *behind])])
        attributes["pads"], counts = [0] * 2 * dims, False
        attributes["ceil_mode"] = int(not divisor)
    result = w.emit("AveragePool", [name], count_include_pad=int(counts), **attributes)
    if divisor:
        result = w.emit("Mul", [result, w.name(math.prod(kernel) / divisor)])
    return result


@operator("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
           "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")  # fmt: skip
def _adaptive_pool(w: Walk, a: Arguments) -> Any:
    kind = "Max" if "max" in str(w.node.target) else "Average"
    value = w.node.meta["val"]
    after = list((value[0] if isinstance(value, (tuple, list)) else value).shape[2:])
    before = list(a["self"].meta["val"].shape[2:])
    name = w.float_name(a["self"])
    if all(size == 1 for size in after):
        result = w.emit(f"Global{kind}Pool", [name])
    elif any(size % pooled for size, pooled in zip(before, after, strict=True)):
        w.refuse(f"{before} pixels are pooled to {after}, which ONNX cannot express")
    else:
        kernel = [size // pooled for size, pooled in zip(before, after, strict=True)]
        result = w.emit(f"{kind}Pool", [name], kernel_shape=kernel, strides=kernel) if before != after else name
    return [result, ""] if isinstance(value, (tuple, list)) else result


@operator("matmul", "bmm", "mm", "__matmul__")
def _matmul(w: Walk, a: Arguments) -> Any:
    return w.emit("MatMul", [w.float_name(value) for value in list(a.values())[:2]])


@operator("addmm", "baddbmm")
def _addmm(w: Walk, a: Arguments) -> Any:
    names = [a[key] for key in (("mat1", "mat2") if "mat1" in a else ("batch1", "batch2"))]
    product = w.emit("MatMul", [w.float_name(name) for name in names])
    if a["alpha"] != 1:
        product = w.emit("Mul", [product, w.name(a["alpha"])])
    if a["beta"] == 0:
        return product
    added = w.float_name(a["self"])
    if a["beta"] != 1:
        added = w.emit("Mul", [added, w.name(a["beta"])])
    return w.emit("Add", [product, added])


@operator("einsum")
def _einsum(w: Walk, a: Arguments) -> Any:
    return w.emit("Einsum", [w.float_name(value) for value in a["tensors"]], equation=a["equation"].replace(" ", ""))


@operator("scaled_dot_product_attention")
def _attention(w: Walk, a: Arguments) -> Any:
    """Write attention, scaling after the product of query and key, so that the product's inputs are quantized."""
    query, key = a["query"], a["key"]
    if a["enable_gqa"]:
        w.refuse("attention with fewer key heads than query heads has no form in ONNX")
    ndim, features = query.meta["val"].ndim, query.meta["val"].shape[-1]
    turned = w.emit("Transpose", [w.float_name(key)], perm=[*range(ndim - 2), ndim - 1, ndim - 2])
    scale = 1 / math.sqrt(features) if a["scale"] is None else float(a["scale"])
    scores = w.emit("Mul", [w.emit("MatMul", [w.float_name(query), turned]), w.name(scale)])
    mask = a["attn_mask"]
    if a["is_causal"]:
        length, keys = query.meta["val"].shape[-2], key.meta["val"].shape[-2]
        scores = w.emit("Add", [scores, w.constant(np.triu(np.full((length, keys), -np.inf, np.float32), 1))])
    elif mask is not None and mask.meta["val"].dtype == torch.bool:
        scores = w.emit("Where", [w.name(mask), scores, w.name(-math.inf)])
    elif mask is not None:
        scores = w.emit("Add", [scores, w.float_name(mask)])
    return w.emit("MatMul", [w.emit("Softmax", [scores], axis=ndim - 1), w.float_name(a["value"])])
