"""Conversion of ONNX operators to PyTorch: the closed list of supported operators."""

from __future__ import annotations

from collections.abc import Callable

from crqat.train.models.onnx_operators import activations, arithmetic, layers, movement
from crqat.train.models.onnx_operators.node import Node, Refused, Result, Value

__all__ = ["OPERATORS", "Node", "Refused", "Result", "Value"]

OPERATORS: dict[str, Callable[[Node], Result]] = {
    **layers.OPERATORS,
    **arithmetic.OPERATORS,
    **activations.OPERATORS,
    **movement.OPERATORS,
}
