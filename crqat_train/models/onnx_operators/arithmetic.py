"""Converters of ONNX operators: arithmetic on tensors and on computed shapes, and reductions."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from crqat.train.models.onnx_operators.node import (
    IMAGE_RANK,
    Node,
    Refused,
    Result,
    Value,
    each_number,
    of_one,
)


def _two(
    function: Callable[[Any, Any], Any], whole: Callable[[Any, Any], Any] | None = None
) -> Callable[[Node], Value]:
    """Return a converter of an operation on two tensors or two shapes.

    Args:
        function: The operation.
        whole: The operation on the integers of shapes if it is another one, such as floor division; None uses
            `function`.
    """

    def convert(node: Node) -> Value:
        left, right = node.input(0), node.input(1)
        if left.is_tensor or right.is_tensor:
            return node.emit(function, *(_same_rank(node, value) for value in (left, right)))
        are_whole = not isinstance(left.sample, float) and not isinstance(right.sample, float)
        return node.emit(each_number(whole if whole is not None and are_whole else function), left, right)

    return convert


def _same_rank(node: Node, value: Value) -> Value:
    """Return an operand of an operation with a tensor: a constant list of numbers becomes a tensor."""
    if isinstance(value.sample, list):
        if value.name is not None:
            msg = "computes with a shape and a tensor; that is not supported"
            raise Refused(msg)
        return Value(torch.tensor(value.sample), None, value.origin or "numbers")
    return value


def _add(node: Node) -> Value:
    """Convert a sum; with a constant it may be the bias of a linear layer."""
    left, right = node.input(0), node.input(1)
    for index, (product, bias) in enumerate(((left, right), (right, left))):
        linear = product.layer
        if linear is None or linear.bias is not None or bias.name is not None or not node.sole_reader_of(index):
            continue
        if isinstance(bias.sample, Tensor) and tuple(bias.sample.shape) == (linear.out_features,):
            linear.bias = nn.Parameter(bias.sample.detach().clone())
            return product
    result = _two(operator.add)(node)
    for erf, one in ((left, right), (right, left)):
        if erf.made_of[0] == "erf" and _is(one, 1):
            result.made_of = ("1 + erf", erf.made_of[1])
    return result


def _mul(node: Node) -> Value:
    """Convert a product.

    If the product is the last operation of an activation such as SiLU, which exporters write as several operations,
    the activation is added instead.
    """
    left, right = node.input(0), node.input(1)
    for gate, other in ((left, right), (right, left)):
        kind, origin = gate.made_of
        if kind == "sigmoid" and origin is other:
            return node.emit(functional.silu, other)
        if kind == "hardsigmoid" and origin is other:
            return node.emit(functional.hardswish, other)
        # 0.5 * x * (1 + erf(x / sqrt(2))), in any order.
        if kind == "1 + erf" and other.made_of == ("half", origin) and origin is not None:
            return node.emit(functional.gelu, origin)
        if kind == "twice gelu" and _is(other, 0.5) and origin is not None:
            return node.emit(functional.gelu, origin)
    result = _two(operator.mul)(node)
    for value, other in ((left, right), (right, left)):
        if value.made_of[0] == "1 + erf" and value.made_of[1] is other:
            result.made_of = ("twice gelu", other)
        elif _is(other, 0.5):
            result.made_of = ("half", value)
        elif _is(other, math.sqrt(0.5)):
            result.made_of = ("over sqrt(2)", value)
    return result


def _is(value: Value, number: float) -> bool:
    return isinstance(value.sample, float) and value.name is None and math.isclose(value.sample, number, rel_tol=1e-5)


def _div(node: Node) -> Value:
    result = _two(operator.truediv, operator.floordiv)(node)
    if _is(node.input(1), math.sqrt(2)):
        result.made_of = ("over sqrt(2)", node.input(0))
    return result


def _erf(node: Node) -> Value:
    result = node.emit(torch.erf, node.input(0))
    kind, origin = node.input(0).made_of
    if kind == "over sqrt(2)":
        result.made_of = ("erf", origin)
    return result


def _sum(node: Node) -> Value:
    result = node.input(0)
    for index in range(1, len(node.inputs)):
        result = node.emit(operator.add, result, node.input(index))
    return result


def _extreme(function: Callable[[Any, Any], Any], bound: str) -> Callable[[Node], Value]:
    """Return a converter of Max or Min; a Max or Min of a tensor and a number becomes torch.clamp with one bound."""

    def convert(node: Node) -> Value:
        result = node.input(0)
        for index in range(1, len(node.inputs)):
            other = node.input(index)
            if not result.is_tensor:
                result, other = other, result
            if isinstance(other.sample, float):
                low, high = (other, None) if bound == "low" else (None, other)
                result = node.emit(torch.clamp, result, low, high)
            else:
                result = node.emit(function, result, _same_rank(node, other))
        return result

    return convert


def _pow(node: Node) -> Value:
    exponent = node.input(1)
    if isinstance(exponent.sample, (int, float)) and exponent.sample == 2:
        return node.emit(torch.square, node.input(0))
    return node.emit(operator.pow, node.input(0), exponent)


def _reduced(function: Callable[..., Any]) -> Callable[[Node], Value]:
    """Return a converter of a reduction over axes."""

    def convert(node: Node) -> Value:
        value, axes, keep = node.input(0), node.whole(1, "axes"), bool(node.attribute("keepdims", 1))
        if not value.is_tensor:
            msg = "reduces a shape; that is not supported"
            raise Refused(msg)
        if not axes:
            if node.attribute("noop_with_empty_axes", 0):
                return value
            axes = list(range(value.rank))
        axes = sorted(axis % value.rank for axis in axes)
        if function is torch.mean and keep and value.rank == IMAGE_RANK and axes == [2, 3]:
            return node.emit(functional.adaptive_avg_pool2d, value, 1)  # most likely the module before the export
        return node.emit(function, value, tuple(axes), keep)

    return convert


OPERATORS: dict[str, Callable[[Node], Result]] = {
    "Abs": of_one(torch.abs),
    "Ceil": of_one(torch.ceil),
    "Add": _add,
    "Div": _div,
    "Erf": _erf,
    "Exp": of_one(torch.exp),
    "Floor": of_one(torch.floor),
    "Log": of_one(torch.log),
    "Max": _extreme(torch.maximum, "low"),
    "Min": _extreme(torch.minimum, "high"),
    "Mul": _mul,
    "Neg": of_one(torch.neg),
    "Pow": _pow,
    "Reciprocal": of_one(torch.reciprocal),
    "ReduceMax": _reduced(torch.amax),
    "ReduceMean": _reduced(torch.mean),
    "ReduceMin": _reduced(torch.amin),
    "ReduceSum": _reduced(torch.sum),
    "Sqrt": of_one(torch.sqrt),
    "Sub": _two(operator.sub),
    "Sum": _sum,
}
