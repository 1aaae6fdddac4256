"""Converters of ONNX operators: layers with weights, pools and dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from crqat.train.models.onnx_operators.node import IMAGE_RANK, Node, Refused, Result, Value


def _fill(parameter: Tensor | None, values: Tensor | None) -> None:
    if parameter is not None and values is not None:
        with torch.no_grad():
            parameter.copy_(values.reshape(parameter.shape))


def _sides(node: Node, rank: int) -> tuple[list[int], list[int]]:
    """Return the padding at the start and at the end of each dimension."""
    pads = list(node.attribute("pads", [0] * 2 * rank))
    mode = node.attribute("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        msg = f"auto_pad {mode} depends on the image's size; export it with pads"
        strides, dilations = node.attribute("strides", [1] * rank), node.attribute("dilations", [1] * rank)
        if any(stride != 1 for stride in strides):
            raise Refused(msg)
        totals = [
            dilation * (size - 1) for dilation, size in zip(dilations, node.attribute("kernel_shape"), strict=True)
        ]
        less, more = [total // 2 for total in totals], [total - total // 2 for total in totals]
        return (less, more) if mode == "SAME_UPPER" else (more, less)
    return (pads[:rank], pads[rank:]) if mode == "NOTSET" else ([0] * rank, [0] * rank)


def _padded(node: Node, value: Value, front: list[int], behind: list[int]) -> tuple[Value, tuple[int, ...]]:
    """Return a layer's input and the padding that the layer itself applies.

    If the padding differs between the two sides, which PyTorch's layers do not support, the input is padded by zeros
    in an operation of its own, and the layer's padding is 0.
    """
    if front == behind:
        return value, tuple(front)
    order = [side for pair in reversed(list(zip(front, behind, strict=True))) for side in pair]
    return node.emit(functional.pad, value, order), tuple(0 for _ in front)


def _conv(node: Node) -> Value:
    weight = node.weight(1)
    if weight.ndim != IMAGE_RANK or node.input(0).rank != IMAGE_RANK:
        msg = f"is a convolution over {weight.ndim - 2} dimensions; only convolutions over 2D images are supported"
        raise Refused(msg)
    node._attributes.setdefault("kernel_shape", list(weight.shape[2:]))
    value, padding = _padded(node, node.input(0), *_sides(node, 2))
    groups, bias = node.attribute("group", 1), node.optional(2)
    sizes: dict[str, Any] = {
        "kernel_size": tuple(weight.shape[2:]),
        "stride": tuple(node.attribute("strides", [1, 1])),
        "padding": padding,
        "dilation": tuple(node.attribute("dilations", [1, 1])),
    }
    made = nn.Conv2d(weight.shape[1] * groups, weight.shape[0], groups=groups, bias=bias is not None, **sizes)
    _fill(made.weight, weight)
    _fill(made.bias, None if bias is None else node.weight(2))
    return node.layer(made, value, weight=node.input(1))


def _transposed_conv(node: Node) -> Value:
    weight = node.weight(1)
    front, behind = _sides(node, 2)
    if weight.ndim != IMAGE_RANK or front != behind or node.attribute("output_shape") is not None:
        msg = "this transposed convolution is not supported: only over images, with equal pads and without output_shape"
        raise Refused(msg)
    groups, bias = node.attribute("group", 1), node.optional(2)
    sizes: dict[str, Any] = {
        "kernel_size": tuple(weight.shape[2:]),
        "stride": tuple(node.attribute("strides", [1, 1])),
        "padding": tuple(front),
        "output_padding": tuple(node.attribute("output_padding", [0, 0])),
        "dilation": tuple(node.attribute("dilations", [1, 1])),
    }
    made = nn.ConvTranspose2d(weight.shape[0], weight.shape[1] * groups, groups=groups, bias=bias is not None, **sizes)
    _fill(made.weight, weight)
    _fill(made.bias, None if bias is None else node.weight(2))
    return node.layer(made, node.input(0), weight=node.input(1))


def _batch_norm(node: Node) -> Value:
    if node.attribute("training_mode", 0):
        msg = "is in training mode; call eval() before the export"
        raise Refused(msg)
    scale, bias, mean, variance = (node.weight(index) for index in range(1, 5))
    kind = nn.BatchNorm2d if node.input(0).rank == IMAGE_RANK else nn.BatchNorm1d
    # PyTorch's momentum is the share of the new statistics, ONNX's that of the old ones.
    made = kind(len(scale), node.attribute("epsilon", 1e-5), 1 - node.attribute("momentum", 0.9))
    _fill(made.weight, scale)
    _fill(made.bias, bias)
    _fill(made.running_mean, mean)
    _fill(made.running_var, variance)
    return node.layer(made, node.input(0), weight=node.input(1))


def _layer_norm(node: Node) -> Value:
    value, scale, bias = node.input(0), node.weight(1), node.optional(2)
    axis = node.attribute("axis", -1) % value.rank
    if list(scale.shape) != list(value.sample.shape[axis:]):
        msg = "its scale must have the shape of the normalized dimensions"
        raise Refused(msg)
    made = nn.LayerNorm(list(scale.shape), node.attribute("epsilon", 1e-5), bias=bias is not None)
    _fill(made.weight, scale)
    _fill(made.bias, None if bias is None else node.weight(2))
    return node.layer(made, value, weight=node.input(1))


def _linear(node: Node, weight: Tensor, bias: Tensor | None) -> Value:
    """Return a linear layer with a weight of shape [out, in]."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    _fill(made.weight, weight)
    _fill(made.bias, bias)
    result = node.layer(made, node.input(0), weight=node.input(1))
    result.layer = made
    return result


def _gemm(node: Node) -> Value:
    weight = node.weight(1) * node.attribute("alpha", 1.0)
    if node.attribute("transA", 0):
        msg = "transA is not supported: a linear layer has its images in rows"
        raise Refused(msg)
    weight = weight if node.attribute("transB", 0) else weight.t()
    bias = None if node.optional(2) is None else node.weight(2) * node.attribute("beta", 1.0)
    if bias is not None and bias.numel() != len(weight):
        if bias.numel() != 1:
            msg = f"its bias has {bias.numel()} numbers for {len(weight)} outputs; each output needs one"
            raise Refused(msg)
        bias = bias.expand(len(weight))
    return _linear(node, weight, bias)


def _matmul(node: Node) -> Value:
    left, right = node.input(0), node.input(1)
    if left.name is not None and right.name is None and right.rank == 2:
        return _linear(node, node.weight(1).t(), None)
    return node.emit(torch.matmul, left, right)


def _prelu(node: Node) -> Value:
    slope = node.weight(1).flatten()
    if len(slope) not in (1, node.input(0).sample.shape[1]):
        msg = "its slope must be one number, or one for each channel"
        raise Refused(msg)
    made = nn.PReLU(len(slope))
    _fill(made.weight, slope)
    return node.layer(made, node.input(0), weight=node.input(1))


def _dropout(node: Node) -> Value:
    """Return dropout, which does nothing in eval mode and is active again when the recipe trains."""
    ratio = node.constant(1, 0.5)
    if node.constant(2, 0):
        msg = "is in training mode; call eval() before the export"
        raise Refused(msg)
    return node.layer(nn.Dropout(float(ratio)), node.input(0))


def _max_pool(node: Node) -> Value:
    front, behind = _sides(node, 2)
    if front != behind or len(node.attribute("kernel_shape")) != 2 or node.attribute("storage_order", 0):
        msg = "this max pool is not supported: only over images, with the same pads on both sides"
        raise Refused(msg)
    return node.emit(
        functional.max_pool2d, node.input(0), tuple(node.attribute("kernel_shape")),
        tuple(node.attribute("strides", [1, 1])), tuple(front), tuple(node.attribute("dilations", [1, 1])),
        bool(node.attribute("ceil_mode", 0)),
    )  # fmt: skip


def _average_pool(node: Node) -> Value:
    front, behind = _sides(node, 2)
    counts = bool(node.attribute("count_include_pad", 0))
    if len(node.attribute("kernel_shape")) != 2 or set(node.attribute("dilations", [1, 1])) != {1}:
        msg = "this average pool is not supported: only over images, without dilations"
        raise Refused(msg)
    if front != behind and not counts:
        msg = "an average pool with different pads on both sides is supported only with count_include_pad"
        raise Refused(msg)
    value, padding = _padded(node, node.input(0), front, behind)
    return node.emit(
        functional.avg_pool2d, value, tuple(node.attribute("kernel_shape")), tuple(node.attribute("strides", [1, 1])),
        padding, bool(node.attribute("ceil_mode", 0)), counts,
    )  # fmt: skip


def _global_pool(function: Callable[..., Any]) -> Callable[[Node], Value]:
    return lambda node: node.emit(function, node.input(0), 1)


OPERATORS: dict[str, Callable[[Node], Result]] = {
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "ConvTranspose": _transposed_conv,
    "Dropout": _dropout,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_pool(functional.adaptive_avg_pool2d),
    "GlobalMaxPool": _global_pool(functional.adaptive_max_pool2d),
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "MaxPool": _max_pool,
    "PRelu": _prelu,
}
