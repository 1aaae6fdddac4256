"""Converts an ONNX file to a PyTorch network: a module of ordinary layers, built node by node.

Nothing in the file is executed: its operators come from a closed list, and its names become module names only.
"""

from __future__ import annotations

import keyword
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from crqat.core.errors import CrqatError, UsageError
from crqat.train.models.onnx_file import OnnxFile, refusal
from crqat.train.models.onnx_operators import OPERATORS, Node, Refused, Value

if TYPE_CHECKING:
    pass

# Most elements of a constant that is computed from others, such as an expanded one.
_MOST_NUMBERS = 2**28
# Image sides used to trace a file that leaves them open; each of the two traces has its own.
_ANY_SIDES = (224, 256)


@dataclass(frozen=True)
class _Named:
    """Argument of a step: the value of an earlier step."""

    name: str


@dataclass(frozen=True)
class _Stored:
    """Argument of a step: a tensor of the network."""

    path: str


@dataclass
class _Step:
    """One operation: a function, or a module of the network by its path, applied to values, tensors and constants.

    Attributes:
        function: The function, or the path of the module.
        arguments: Arguments of the function, with `_Named` and `_Stored` in them, also inside lists.
        result: Name of the value that it computes.
        node: The file's node that it was converted from; used in messages.
        released: Names of the values that no later step needs.
    """

    function: Callable[..., Any] | str
    arguments: tuple[Any, ...]
    result: str
    node: str
    released: list[str] = field(default_factory=list)


class _Scope(nn.Module):
    """A container of modules. It is called on the way to a submodule, so that tracers record the whole path."""

    def forward(self, path: list[str], *arguments: Any) -> Any:
        """Call the module at `path`, relative to this container, with the arguments."""
        return _called(self, path, *arguments)


def _called(owner: nn.Module, path: list[str], *arguments: Any) -> Any:
    child = getattr(owner, path[0])
    return child(path[1:], *arguments) if isinstance(child, _Scope) else child(*arguments)


class OnnxNetwork(nn.Module):
    """PyTorch network of an ONNX file: layers with parameters of their own, called in the file's order.

    Attributes:
        shape: Shape of the file's input, [N, C, H, W]; None for a size that the file leaves open.
        classes: Number of logits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shape: tuple[int | None, int, int | None, int | None] = (None, 0, None, None)
        self.classes = 0
        self._steps: list[_Step] = []
        self._names = ("", "")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, float32 [N, classes], for images, float32 [N, C, H, W]."""
        values: dict[str, Any] = {self._names[0]: images}

        def given(argument: Any) -> Any:
            if isinstance(argument, _Named):
                return values[argument.name]
            if isinstance(argument, _Stored):
                found: Any = self
                for part in argument.path.split("."):
                    found = getattr(found, part)
                return found
            return type(argument)(map(given, argument)) if isinstance(argument, (list, tuple)) else argument

        for step in self._steps:
            arguments = map(given, step.arguments)
            if isinstance(step.function, str):
                values[step.result] = _called(self, step.function.split("."), *arguments)
            else:
                values[step.result] = step.function(*arguments)
            for name in step.released:
                del values[name]
        logits: Tensor = values[self._names[1]]
        return logits


class Builder:
    """Converts a file's nodes in order to a network, while meta images (shapes without data) pass through it.

    Attributes:
        batch: Batch size that the file fixes; None if the file leaves it open.
    """

    def __init__(self, file: OnnxFile) -> None:
        import onnx

        self.network, self.batch, self._file = OnnxNetwork(), file.shape[0], file
        batch, channels, height, width = file.shape
        # A value that is the same in both traces does not depend on the number and size of images.
        sample, other = (
            torch.zeros((batch or 2) + more, channels, height or _ANY_SIDES[more], width or _ANY_SIDES[more])
            for more in (0, 1)
        )
        self._values: dict[str, Value] = {file.input: Value(sample, "images", other=other)}
        self._stored = {tensor.name: tensor for tensor in file.model.graph.initializer}
        self._to_array = onnx.numpy_helper.to_array
        uses = [name for node in file.model.graph.node for name in node.input]
        self._uses = Counter([*uses, file.output])
        self._node = ""
        # Paths with `_` for each dot, as quantizers and NNCF name operations.
        self._flat: set[str] = set()

    def build(self) -> OnnxNetwork:
        """Return the network in eval mode.

        Raises:
            UsageError: An operator is used in a way that is not supported.
        """
        for proto in self._file.model.graph.node:
            self._node = proto.name or next(iter(proto.output), "")
            node = Node(proto, [self._value(name) for name in proto.input], self)
            try:
                results = OPERATORS[proto.op_type](node)
            except Refused as error:
                raise refusal(self._file.path, proto, str(error)) from error
            except (CrqatError, MemoryError):
                raise
            except Exception as error:  # raised by an operator's function for unexpected arguments
                words = " ".join(str(error).split())[:200] or type(error).__name__
                raise refusal(self._file.path, proto, f"cannot be read: {words}") from error
            for name, value in zip(proto.output, results if isinstance(results, tuple) else (results,), strict=False):
                self._values[name] = value
            missing = [name for name in proto.output if name and name not in self._values]
            if any(self._uses[name] for name in missing):
                raise refusal(self._file.path, proto, f"its output {missing[0]} is not supported")
        return self._finished(self._values[self._file.output])

    def _finished(self, output: Value) -> OnnxNetwork:
        network = self.network.eval()
        shapes = [list(value.shape) if isinstance(value, Tensor) else [] for value in (output.sample, output.other)]
        shape, batch = shapes[0], self.batch or 2
        if len(shape) != 2 or shapes != [[batch, shape[1]], [batch + 1, shape[1]]] or output.name is None:
            made = " x ".join(map(str, shape))
            msg = (
                f"{self._file.path}: the output {self._file.output} of {batch} images is {made}; "
                "that of a classifier is one row of logits for each image"
            )
            raise UsageError(msg)
        network.shape, network.classes = self._file.shape, shape[1]
        network._names = ("images", output.name)
        # Leave out operations whose value is not used, such as those fused into an activation.
        needed, kept = {output.name}, []
        for step in reversed(network._steps):
            if step.result in needed:
                names = dict.fromkeys(_names_in(step.arguments))
                step.released = [name for name in names if name not in needed]
                needed.update(names)
                kept.append(step)
        network._steps = kept[::-1]
        return network

    def _value(self, name: str) -> Value | None:
        """Return a value by its name in the file; None for an omitted input."""
        if not name:
            return None
        if name not in self._values:
            stored = torch.from_numpy(self._to_array(self._stored[name]).copy())
            self._values[name] = Value.of(stored, name)
        return self._values[name]

    def used_once(self, name: str) -> bool:
        """Whether exactly one node of the file reads the value of a given name."""
        return self._uses[name] == 1

    def emit(self, function: Callable[..., Any] | str, *arguments: Any) -> Value:
        """Add an operation to the network; an operation on constants is not added but computed at once.

        Args:
            function: A function, or the path of a module.
            arguments: Arguments of the function, with `Value`s in them, also inside lists.

        Returns:
            The result of the operation.
        """
        called = self.network.get_submodule(function).eval() if isinstance(function, str) else function
        with torch.no_grad():
            sample = called(*_samples(arguments, 0))
            if not any(value.name is not None for value in _values_in(arguments)) and not isinstance(function, str):
                return Value.of(sample, self._node)
            try:
                other = called(*_samples(arguments, 1))
            except (RuntimeError, ValueError) as error:
                if self.batch is None:
                    raise
                msg = f"works only for batches of {self.batch} images; export it with a dynamic batch size"
                raise Refused(msg) from error
        if isinstance(sample, (bool, int, float, list)) and sample == other:
            return Value.of(sample, self._node)
        result = f"{len(self.network._steps)} {self._node}"
        self.network._steps.append(_Step(function, self._recorded(arguments), result, self._node))
        return Value(sample, result, other=other)

    def module(self, made: nn.Module, weight: Value | None = None) -> str:
        """Add a layer to the network, named after its weight in the file if possible, otherwise after the node.

        Returns:
            The layer's path.
        """
        origin = weight.origin if weight is not None else ""
        name = origin.removesuffix(".weight") if origin.endswith(".weight") else _layer_name(self._node)
        return self._place(name, lambda owner, leaf: owner.add_module(leaf, made))

    def _recorded(self, argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return type(argument)(map(self._recorded, argument))
        if not isinstance(argument, Value):
            return argument
        if argument.name is not None:
            return _Named(argument.name)
        if not isinstance(argument.sample, Tensor):
            return argument.sample
        if argument.stored is None:
            if argument.sample.numel() > _MOST_NUMBERS:
                msg = f"computes a constant of {argument.sample.numel()} numbers; so large a constant is refused"
                raise Refused(msg)
            tensor = argument.sample.detach().clone()
            if tensor.is_floating_point():
                parameter = nn.Parameter(tensor)
                argument.stored = self._place(
                    argument.origin, lambda owner, leaf: owner.register_parameter(leaf, parameter)
                )
            else:
                argument.stored = self._place(argument.origin, lambda owner, leaf: owner.register_buffer(leaf, tensor))
        return _Stored(argument.stored)

    def _place(self, name: str, put: Callable[[nn.Module, str], None]) -> str:
        """Add a module or a tensor to the network at a free path, and return the path.

        Args:
            name: Wanted path. The path has only letters, digits and `_` between its dots, and a number if `name` is
                taken.
            put: Adds the module or tensor, given its parent module and its attribute name there.
        """
        parts = [_identifier(re.sub(r"[^A-Za-z0-9_]", "_", part)) for part in name.strip("/.").split(".")]
        if "/" in name or ":" in name or not all(parts) or not self._free(parts):
            parts = [_identifier(re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_") or "unnamed")]
        last, count = parts[-1], 1
        while not self._free(parts):
            count += 1
            parts[-1] = f"{last}_{count}"
        owner: nn.Module = self.network
        for part in parts[:-1]:
            if part not in owner._modules:
                owner.add_module(part, _Scope())
            owner = owner.get_submodule(part)
        put(owner, parts[-1])
        self._flat.update("_".join(parts[:length]) for length in range(1, len(parts) + 1))
        return ".".join(parts)

    def _free(self, parts: list[str]) -> bool:
        """Whether a module or a tensor can be added at a path.

        Nothing may be there yet, and only containers may lie on the way. The parts must not be attributes of nn.Module,
        and the path joined by `_` must not equal another path joined by `_`.
        """
        owner: Any = self.network
        for part in parts:
            if not isinstance(owner, (OnnxNetwork, _Scope)):
                return False
            if not hasattr(owner, part):
                return "_".join(parts) not in self._flat and not any(hasattr(nn.Module(), name) for name in parts)
            owner = getattr(owner, part)
        return False


def _identifier(part: str) -> str:
    """Return a valid attribute name that is not a Python keyword."""
    return f"{part}_" if keyword.iskeyword(part) else part


def _layer_name(node: str) -> str:
    """Return a layer's name in PyTorch: layer1.0.conv1 for /layer1/layer1.0/conv1/Conv; other names unchanged."""
    path, before = "", ""
    for scope in node.strip("/").split("/")[:-1]:
        inside = scope.rpartition(".")[0] == before and bool(before)  # a sequence repeats its own name
        path = path[: -len(before)] + scope if inside else f"{path}.{scope}" if path else scope
        before = scope
    return path if node.startswith("/") and path else node


def _samples(argument: Any, which: int) -> Any:
    if isinstance(argument, (list, tuple)):
        return type(argument)(_samples(part, which) for part in argument)
    if isinstance(argument, Value):
        return argument.other if which and argument.name is not None else argument.sample
    return argument


def _values_in(argument: Any) -> list[Value]:
    if isinstance(argument, (list, tuple)):
        return [value for part in argument for value in _values_in(part)]
    return [argument] if isinstance(argument, Value) else []


def _names_in(argument: Any) -> list[str]:
    if isinstance(argument, (list, tuple)):
        return [name for part in argument for name in _names_in(part)]
    return [argument.name] if isinstance(argument, _Named) else []
