"""Converters of ONNX operators: activations."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from crqat.train.models.onnx_operators.node import Node, Refused, Result, Value, of_one


def _clip(node: Node) -> Value:
    low, high = node.constant(1), node.constant(2)
    if not all(bound is None or isinstance(bound, (int, float)) for bound in (low, high)):
        msg = "its bounds must be single numbers"
        raise Refused(msg)
    value = node.input(0)
    if (low, high) == (0.0, 6.0):
        return node.emit(functional.relu6, value)
    if high is None or high >= torch.finfo(torch.float32).max:
        return node.emit(functional.relu, value) if low == 0 else node.emit(torch.clamp, value, low)
    return node.emit(torch.clamp, value, low, high)


def _sigmoid(node: Node) -> Value:
    result = node.emit(torch.sigmoid, node.input(0))
    result.made_of = ("sigmoid", node.input(0))
    return result


def _hard_sigmoid(node: Node) -> Value:
    alpha, beta, value = node.attribute("alpha", 0.2), node.attribute("beta", 0.5), node.input(0)
    if math.isclose(alpha, 1 / 6, rel_tol=1e-5) and beta == 0.5:
        result = node.emit(functional.hardsigmoid, value)
        result.made_of = ("hardsigmoid", value)
        return result
    return node.emit(torch.clamp, node.emit(operator.add, node.emit(operator.mul, value, alpha), beta), 0.0, 1.0)


def _softmax(function: Callable[..., Any]) -> Callable[[Node], Value]:
    return lambda node: node.emit(function, node.input(0), node.attribute("axis", -1))


def _gelu_of(value: Tensor, approximate: str) -> Tensor:
    return functional.gelu(value, approximate=approximate)


OPERATORS: dict[str, Callable[[Node], Result]] = {
    "Clip": _clip,
    "Elu": lambda node: node.emit(functional.elu, node.input(0), node.attribute("alpha", 1.0)),
    "Gelu": lambda node: node.emit(_gelu_of, node.input(0), node.attribute("approximate", "none")),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": of_one(functional.hardswish),
    "LeakyRelu": lambda node: node.emit(functional.leaky_relu, node.input(0), node.attribute("alpha", 0.01)),
    "LogSoftmax": _softmax(torch.log_softmax),
    "Mish": of_one(functional.mish),
    "Relu": of_one(functional.relu),
    "Sigmoid": _sigmoid,
    "Softmax": _softmax(torch.softmax),
    "Softplus": of_one(functional.softplus),
    "Tanh": of_one(torch.tanh),
}
