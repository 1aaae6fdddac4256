"""A node of an ONNX file during conversion, and the values between nodes.

Shapes that the file computes (Shape, Gather, Concat ... Reshape) are lists of numbers here, in which the number of
images is not fixed. Every other value is a tensor, or a Python number if the file has a single number there.
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
    """Exception for an operator that is used in a way that is not supported.

    The message says what is wrong, and how to fix it.
    """


@dataclass(eq=False)
class Value:
    """A value that a node of the file computes or uses.

    Attributes:
        sample: The value for meta images (shapes without data): a tensor, a number or a list of numbers.
        other: The same value for a batch of one more image, and for larger images if the file leaves their size open;
            None if it is constant.
        name: Name under which the network holds it during the forward pass; None if it does not depend on the images.
        origin: For a constant, its name in the file.
        stored: For a constant, the path of the network's tensor that holds it; None until such a tensor is added.
        made_of: If the value may be an intermediate step of an activation function that the file computes by several
            nodes: a name of the step, such as "erf", and the input of the function; otherwise "" and None.
        layer: The linear layer that computes it, to which a bias may be added by the next node.
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
        """Wrap a constant: integers as a list or a number, a single float as a number."""
        if isinstance(constant, Tensor) and constant.ndim <= 1:
            whole = not constant.is_floating_point()
            if whole or constant.numel() == 1:
                constant = constant.tolist() if whole else constant.item()
        return cls(constant, None, origin)

    @property
    def is_tensor(self) -> bool:
        """Whether the value is a tensor; otherwise it is a number or a list of numbers."""
        return isinstance(self.sample, Tensor)

    @property
    def rank(self) -> int:
        """Return the number of dimensions."""
        return self.sample.ndim if isinstance(self.sample, Tensor) else int(isinstance(self.sample, list))


class Node:
    """A node of the file during conversion.

    Attributes:
        inputs: Inputs of the node; None for an omitted one.
        builder: Builder of the network, to which the converted operations are added.
    """

    def __init__(self, proto: onnx.NodeProto, inputs: list[Value | None], builder: Builder) -> None:
        import onnx

        self.inputs, self.builder, self.proto = inputs, builder, proto
        self._attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in proto.attribute}

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute's value; strings are str, tensors stay ONNX tensors."""
        found = self._attributes.get(name, default)
        return found.decode() if isinstance(found, bytes) else found

    def input(self, index: int) -> Value:
        """Return the value of a required input, by its index."""
        found = self.optional(index)
        if found is None:
            msg = f"its input {index} is missing"
            raise Refused(msg)
        return found

    def optional(self, index: int) -> Value | None:
        """Return the value of an optional input, by its index; None if it is omitted."""
        return self.inputs[index] if index < len(self.inputs) else None

    def constant(self, index: int, default: Any = None) -> Any:
        """Return the number, list or array of an input that must be constant, by its index."""
        found = self.optional(index)
        if found is None:
            return default
        if found.name is not None:
            msg = f"its input {self.proto.input[index]} is computed from the image; only a constant is supported there"
            raise Refused(msg)
        return found.sample

    def weight(self, index: int) -> Tensor:
        """Return the float32 tensor of an input that must be constant, by its index."""
        found = self.constant(index)
        if isinstance(found, float):
            found = torch.tensor([found])
        if not isinstance(found, Tensor) or found.dtype != torch.float32:
            kind = str(found.dtype).removeprefix("torch.") if isinstance(found, Tensor) else "no tensor"
            msg = f"its weight {self.proto.input[index]} is {kind}; export the network in float32"
            raise Refused(msg)
        return found

    def whole(self, index: int, name: str = "", default: Any = None) -> Any:
        """Return a list of integers from a constant input or an attribute."""
        found = self.constant(index) if self.optional(index) is not None else self.attribute(name, default)
        return [found] if isinstance(found, int) else found

    def emit(self, function: Callable[..., Any] | str, *arguments: Any) -> Value:
        """Add an operation to the network and return its result; see `crqat.train.models.onnx_network.Builder.emit`."""
        return self.builder.emit(function, *arguments)

    def layer(self, made: nn.Module, *arguments: Any, weight: Value | None = None) -> Value:
        """Add a module to the network, call it, and return its result."""
        return self.builder.emit(self.builder.module(made, weight), *arguments)

    def sole_reader_of(self, index: int) -> bool:
        """Whether this node is the only one that uses its input `index`."""
        return self.builder.used_once(self.proto.input[index])


Result = Value | tuple[Value, ...]


def each_number(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that applies a function of numbers to numbers or lists, element by element.

    A list of a single number is broadcast to the length of the others.
    """

    def of_lists(*arguments: Any) -> Any:
        if not any(isinstance(argument, list) for argument in arguments):
            return function(*arguments)
        lists = [argument if isinstance(argument, list) else [argument] for argument in arguments]
        count = max(map(len, lists))
        return list(starmap(function, zip(*(part * count if len(part) == 1 else part for part in lists), strict=True)))

    return of_lists


def of_one(function: Callable[[Tensor], Tensor]) -> Callable[[Node], Value]:
    """Return the converter of an ONNX operator that applies `function` to its only input, tensor or constant."""

    def convert(node: Node) -> Value:
        value = node.input(0)
        if value.is_tensor or value.name is not None:
            return node.emit(function, value)
        return Value.of(function(torch.tensor(value.sample)), value.origin)

    return convert
