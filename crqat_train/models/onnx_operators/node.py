"""A node of an ONNX file while it is converted, and the values between nodes.

Shapes that the file computes (Shape, Gather, Concat ... Reshape) are lists of numbers here, in which the number of
images stays open. Everything else is a tensor, or a Python number where the file has a single one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import starmap
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import onnx

    from crqat.train.models.onnx_network import Builder

IMAGE_RANK = 4


class Refused(Exception):
    """An operator is used in a way that is not read; its text says which, and what to do."""


@dataclass(eq=False)
class Value:
    """A value between the file's nodes.

    Attributes:
        sample: What it is for images without content: a tensor, a number or a list of numbers.
        other: Likewise for one image more, and for larger ones if the file leaves their size open; None of a constant.
        name: Under which the network holds it while it computes; None if it depends on no image.
        origin: What a constant is called in the file.
        stored: The path of the network's tensor that holds a constant, once there is one.
        made_of: What it is of which value, where it may be a part of an activation; "" and None of others.
        layer: The linear layer that it comes from, whose bias may be added behind it.
    """

    sample: Any
    name: str | None
    origin: str = ""
    other: Any = None
    stored: str | None = None
    made_of: tuple[str, Value | None] = ("", None)
    layer: nn.Linear | None = None

    @classmethod
    def of(cls, constant: Any, origin: str) -> Value:
        """A constant: whole numbers as a list or a number, a single float as a number."""
        if isinstance(constant, Tensor) and constant.ndim <= 1:
            whole = not constant.is_floating_point()
            if whole or constant.numel() == 1:
                constant = constant.tolist() if whole else constant.item()
        return cls(constant, None, origin)

    @property
    def is_tensor(self) -> bool:
        """Whether it is a tensor, else a number or a list of numbers."""
        return isinstance(self.sample, Tensor)

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return self.sample.ndim if isinstance(self.sample, Tensor) else int(isinstance(self.sample, list))


class Node:
    """A node of the file while it is converted.

    Attributes:
        inputs: Its inputs; None for one that is left out.
        builder: Takes the operations that it becomes.
    """

    def __init__(self, proto: onnx.NodeProto, inputs: list[Value | None], builder: Builder) -> None:
        import onnx

        self.inputs, self.builder, self.proto = inputs, builder, proto
        self._attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in proto.attribute}

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute's value; texts are str, tensors stay ONNX's."""
        found = self._attributes.get(name, default)
        return found.decode() if isinstance(found, bytes) else found

    def input(self, index: int) -> Value:
        """An input that must be there."""
        found = self.optional(index)
        if found is None:
            msg = f"its input {index} is missing"
            raise Refused(msg)
        return found

    def optional(self, index: int) -> Value | None:
        """An input that may be left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def constant(self, index: int, default: Any = None) -> Any:
        """The value of an input that must depend on no image."""
        found = self.optional(index)
        if found is None:
            return default
        if found.name is not None:
            msg = f"its input {self.proto.input[index]} is computed from the image; only a constant is read there"
            raise Refused(msg)
        return found.sample

    def weight(self, index: int) -> Tensor:
        """A constant tensor of float32."""
        found = self.constant(index)
        if isinstance(found, float):
            found = torch.tensor([found])
        if not isinstance(found, Tensor) or found.dtype != torch.float32:
            kind = str(found.dtype).removeprefix("torch.") if isinstance(found, Tensor) else "no tensor"
            msg = f"its weight {self.proto.input[index]} is {kind}; export the network in float32"
            raise Refused(msg)
        return found

    def whole(self, index: int, name: str = "", default: Any = None) -> Any:
        """A list of whole numbers: a constant input, or an attribute."""
        found = self.constant(index) if self.optional(index) is not None else self.attribute(name, default)
        return [found] if isinstance(found, int) else found

    def emit(self, function: Callable[..., Any] | str, *arguments: Any) -> Value:
        """See `crqat.train.models.onnx_file.Builder.emit`."""
        return self.builder.emit(function, *arguments)

    def layer(self, made: nn.Module, *arguments: Any, weight: Value | None = None) -> Value:
        """A module of the network, called."""
        return self.builder.emit(self.builder.module(made, weight), *arguments)

    def sole_reader_of(self, index: int) -> bool:
        """Whether no other node reads an input."""
        return self.builder.used_once(self.proto.input[index])


Result = Value | tuple[Value, ...]


def each_number(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of numbers for lists of them, too; a list of a single number goes with each of the others."""

    def of_lists(*arguments: Any) -> Any:
        if not any(isinstance(argument, list) for argument in arguments):
            return function(*arguments)
        lists = [argument if isinstance(argument, list) else [argument] for argument in arguments]
        count = max(map(len, lists))
        return list(starmap(function, zip(*(part * count if len(part) == 1 else part for part in lists), strict=True)))

    return of_lists


def of_one(function: Callable[[Tensor], Tensor]) -> Callable[[Node], Value]:
    """An operation on one tensor, or on a number that is known."""

    def convert(node: Node) -> Value:
        value = node.input(0)
        if value.is_tensor or value.name is not None:
            return node.emit(function, value)
        return Value.of(function(torch.tensor(value.sample)), value.origin)

    return convert
