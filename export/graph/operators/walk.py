"""Converts a recorded program to ONNX: names, constants, sizes, and the registry of operator converters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, fx

from crqat.core.errors import UsageError
from crqat.export.graph.record import Program, module_of
from crqat.train.graph.explain import source_line

Arguments = dict[str, Any]
TYPES = {
    torch.float32: TensorProto.FLOAT, torch.float64: TensorProto.DOUBLE, torch.float16: TensorProto.FLOAT16,
    torch.int64: TensorProto.INT64, torch.int32: TensorProto.INT32, torch.bool: TensorProto.BOOL,
    torch.uint8: TensorProto.UINT8,
}  # fmt: skip


class Walk:
    """Writes a recorded `Program` as ONNX nodes, one operator after another.

    Attributes:
        nodes: In topological order; the last one's output is "logits".
        constants: Arrays by tensor name.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, npt.NDArray[Any]] = {}
        self.names: dict[fx.Node, Any] = {}
        self.node: fx.Node = program.nodes[0]  # the current operator
        self._batch = ""

    def run(self) -> None:
        """Convert the whole program.

        Raises:
            UsageError: ONNX cannot express an operator; the message names module and line.
        """
        for node in self.program.nodes:
            self.node = node
            if node.op == "placeholder":
                self.names[node] = "input"
            elif node.op == "output":
                (result,) = node.all_input_nodes
                self._end(self.name(result))
            elif node.op == "call_function" and not self.program.is_fixed(node):
                self.names[node] = self._written(node)

    def _end(self, last: str) -> None:
        if not any(last in node.output for node in self.nodes):
            last = self.emit("Identity", [last])
        for node in self.nodes:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    if name == last:
                        names[index] = "logits"

    def _written(self, node: fx.Node) -> Any:
        target: Any = node.target
        if getattr(target, "__name__", "") == "getitem":
            return self.names[node.args[0]][node.args[1]]  # type: ignore[index]
        schema = target._schema
        name = schema.name.partition("::")[2]
        if name.endswith("_"):
            self._refuse_shared(node)
            name = name[:-1]
        handler = HANDLERS.get(name)
        if handler is None:
            self.refuse(f"torch's {name} has no form in ONNX that crqat knows")
        arguments = {a.name: a.default_value for a in schema.arguments}
        arguments.update(zip(arguments, node.args, strict=False))
        arguments.update(node.kwargs)
        return handler(self, arguments)

    def _refuse_shared(self, node: fx.Node) -> None:
        """Refuse an in-place operator if views share its input; otherwise it equals the out-of-place operator."""
        changed = node.all_input_nodes[0]
        shared = any(_is_view(user) for user in changed.users if user is not node)
        if shared or (_is_view(changed) and len(changed.all_input_nodes[0].users) > 1):
            self.refuse("a tensor is changed in place while a part or another view of it is in use")

    def refuse(self, what: str) -> NoReturn:
        """Raise a UsageError that names the module and line of the current operator, and says `what` is wrong there."""
        place = module_of(self.node) or "the network itself"
        msg = f"model.name: {place}{source_line(self.node.stack_trace)}: {what}; replace that operation"
        raise UsageError(msg)

    def sizes(self, node: fx.Node) -> list[int | None]:
        """Return the shape of a node; see `Program.sizes`."""
        return self.program.sizes(node)

    def shape(self, node: fx.Node) -> list[int]:
        """Return the shape of a node with -1 for the batch size, which may occur in one dimension only."""
        sizes = self.sizes(node)
        if sizes.count(None) > 1:
            self.refuse("the number of images is in two dimensions of a tensor")
        return [-1 if size is None else size for size in sizes]

    def known(self, node: fx.Node, axis: int) -> int:
        """Return the size of a node's result along an axis; refuse one that depends on the batch size."""
        size = self.sizes(node)[axis]
        if size is None:
            self.refuse("images of a batch are mixed with one another")
        return int(size)

    def name(self, value: Any, dtype: torch.dtype | None = None) -> str:
        """Return the tensor name of a node or a number.

        Args:
            value: An fx node, or a number that becomes a constant.
            dtype: Type to convert to; None keeps the type.
        """
        if not isinstance(value, fx.Node):
            return self.constant(np.asarray(value, numpy_type(dtype or torch.float32)))
        found = value.meta["val"].dtype
        if value not in self.names:
            self.names[value] = self._fixed(value)
        name = str(self.names[value])
        if dtype is None or found == dtype:
            return name
        if name in self.constants:
            return self.constant(self.constants[name].astype(numpy_type(dtype)))
        return str(self.emit("Cast", [name], to=TYPES[dtype]))

    def _fixed(self, node: fx.Node) -> str:
        value: Tensor = self.program.value(node).detach()
        sizes = self.sizes(node)
        if None not in sizes:
            return self.constant(value.cpu().numpy(), self.program.stored_name(node))
        axis = sizes.index(None)
        row = value.narrow(axis, 0, 1)
        if sizes.count(None) > 1 or not torch.equal(row.expand_as(value), value):
            self.refuse("a tensor is computed from the number of images")
        return str(self.emit("Expand", [self.constant(row.cpu().numpy()), self.batch_shape(self.shape(node))]))

    def batch_shape(self, shape: Sequence[int]) -> str:
        """Return the name of a tensor that holds `shape`, with the batch size in place of -1.

        Nodes that compute it are added.
        """
        if not self._batch:
            self._batch = self.emit("Shape", ["input"], start=0, end=1)
        axis = list(shape).index(-1)
        parts = [self._batch]
        if shape[:axis]:
            parts.insert(0, self.ints(shape[:axis]))
        if shape[axis + 1 :]:
            parts.append(self.ints(shape[axis + 1 :]))
        return str(self.emit("Concat", parts, axis=0))

    def constant(self, value: npt.NDArray[Any], name: str | None = None) -> str:
        """Add a constant and return its name."""
        name = name or f"constant.{len(self.constants)}"
        self.constants[name] = value
        return name

    def ints(self, values: Sequence[int]) -> str:
        """Add an int64 constant and return its name."""
        return self.constant(np.asarray(values, np.int64))

    def emit(self, operation: str, inputs: Sequence[str], outputs: int = 1, **attributes: Any) -> Any:
        """Add a node; return the name of its output, or a list of names."""
        scope = module_of(self.node).replace(".", "/")
        base = f"/{scope}/{operation}_{len(self.nodes)}" if scope else f"/{operation}_{len(self.nodes)}"
        names = [base] if outputs == 1 else [f"{base}.{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(operation, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def float_name(self, value: Any) -> str:
        """Return the tensor name of a node or a number, converted to float32; see `name`."""
        return self.name(value, torch.float32)

    def reshaped(self, name: str, source: Sequence[int | None], shape: Sequence[int]) -> str:
        """Return the name of tensor `name` in another shape; a Reshape or Flatten is added if the shapes differ.

        Args:
            name: Name of the tensor.
            source: Its present shape; None stands for the batch size.
            shape: The new shape; -1 stands for the batch size.
        """
        if [-1 if size is None else size for size in source] == list(shape):
            return name
        inner = [size for size in source[1:] if size is not None]
        flattens = len(inner) == len(source) - 1 > 1 and source[0] is None and list(shape) == [-1, math.prod(inner)]
        if flattens:
            return str(self.emit("Flatten", [name], axis=1))
        return str(self.emit("Reshape", [name, self.ints(shape)]))


def _is_view(node: fx.Node) -> bool:
    returns = getattr(getattr(node.target, "_schema", None), "returns", [])
    return bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write


def numpy_type(dtype: torch.dtype) -> Any:
    """Return the numpy type that has the same name as a torch dtype, e.g. numpy.float32 for torch.float32."""
    return torch.empty((), dtype=dtype).numpy().dtype


# Converters by the name of torch's operator without its overload. The other files of this folder register them.
HANDLERS: dict[str, Callable[[Walk, Arguments], Any]] = {}
Handler = Callable[[Walk, Arguments], Any]


def operator(*names: str) -> Callable[[Handler], Handler]:
    """Return a decorator that registers a function as the converter of the torch operators of these names."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def first(a: Arguments) -> Any:
    """Return the operator's first argument, whatever its name."""
    return next(iter(a.values()))


def as_list(value: Any, count: int) -> list[int]:
    """Return a list of `count` numbers, one for each dimension; a single number is repeated."""
    values = [value] if isinstance(value, int) else list(value)
    return [int(v) for v in (values * count if len(values) == 1 else values)]


def axis_of(node: fx.Node, axis: int) -> int:
    """Return an axis of a node's result as a non-negative index."""
    return axis % int(node.meta["val"].ndim)


def axes_of(node: fx.Node, axes: Any) -> list[int]:
    """Return axes of a node's result as sorted non-negative indices; all axes if none is given."""
    ndim = node.meta["val"].ndim
    if axes is None or axes == []:
        return list(range(ndim))
    return sorted(axis % ndim for axis in ([axes] if isinstance(axes, int) else axes))
