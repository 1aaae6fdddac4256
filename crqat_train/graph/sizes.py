"""Traces a forward with known tensor sizes, so that it may use shapes, unpack chunks and branch on sizes.

Each proxy carries the values of its operation for two batch sizes. A number that is the same in both is a constant; a
size that differs depends on the batch and stays part of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

_BATCHES = (2, 3)
_UNKNOWN = (None, None)


# A tensor's views of itself as named operations. NNCF treats an unnamed one as a query of the shape.
VIEWS: dict[str, Callable[[Any], Any]] = {
    "T": lambda x: x.permute(*range(x.ndim - 1, -1, -1)),
    "mT": lambda x: x.transpose(-2, -1),
    "H": lambda x: x.transpose(0, 1),
    "mH": lambda x: x.transpose(-2, -1),
    "data": lambda x: x.detach(),
    "real": torch.real,
    "imag": torch.imag,
}


# Attributes of a tensor that a forward may query; they are the same for all tensors here.
_KINDS = ("is_nested", "is_cuda", "is_sparse", "is_quantized", "is_mps", "requires_grad", "is_leaf")


def _written_out(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Trace the operations of a torch function on proxies, instead of recording the function as one operation."""
    asks = vars(functional)["has_torch_function"]
    functional.has_torch_function = lambda _: False  # type: ignore[attr-defined]
    try:
        return function(*args, **kwargs)
    finally:
        functional.has_torch_function = asks  # type: ignore[attr-defined]


class SizedProxy(fx.Proxy):
    """A torch.fx proxy that knows its shape and length, and can compare sizes.

    Attributes:
        known: The proxy's value for each of two batch sizes; None where it is unknown.
    """

    known: tuple[Any, Any] = _UNKNOWN

    @property
    def shape(self) -> Any:
        """Return the shape as a tuple: known sizes as numbers, and a proxy for the batch size."""
        if not isinstance(self.known[0], Tensor):
            return fx.proxy.Attribute(self, "shape")
        return self._sizes()

    @property
    def ndim(self) -> Any:
        """Return the number of dimensions."""
        return self.known[0].ndim if isinstance(self.known[0], Tensor) else fx.proxy.Attribute(self, "ndim")

    def _sizes(self) -> tuple[Any, ...]:
        one, other = (value.shape for value in self.known)
        return tuple(
            int(a) if a == b else self.tracer.create_proxy("call_method", "size", (self, axis), {})
            for axis, (a, b) in enumerate(zip(one, other, strict=True))
        )

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the traced tensor.

        A view such as `.T` is recorded as an operation, a fixed attribute such as `requires_grad` is returned as its
        value, and torch.fx's Proxy handles any other attribute.
        """
        if isinstance(self.known[0], Tensor):
            if name in VIEWS:
                return VIEWS[name](self)
            if name in _KINDS:
                return getattr(self.known[0], name)
        return super().__getattr__(name)

    def __len__(self) -> int:
        one, other = self.known
        if one is None or len(one) != len(other):
            return super().__len__()
        return len(one)

    def __iter__(self) -> Iterator[Any]:
        one, other = self.known
        whole: Any = self
        if isinstance(one, (tuple, list)):
            return iter([whole[index] for index in range(len(one))])
        if isinstance(one, Tensor) and one.ndim and len(one) == len(other):
            parts = whole.unbind(0)  # like a tensor's own iterator
            return iter([parts[index] for index in range(len(one))])
        return super().__iter__()


class SizedTracer(fx.Tracer):
    """A torch.fx tracer that also runs each operation on an example, so that the forward may use tensor sizes.

    Args:
        example: Input of shape [N, C, H, W], float32; without one, no sizes are known.
    """

    record_stack_traces = True
    proxy_buffer_attributes = True

    def __init__(self, example: Tensor | None) -> None:
        super().__init__()
        self.computes = False  # whether a module runs for its values
        self._inputs: tuple[Any, Any] = _UNKNOWN
        if example is not None:
            one, other = (example[:1].repeat(batch, *[1] * (example.ndim - 1)) for batch in _BATCHES)
            self._inputs = one, other

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return a proxy for a node; `create_proxy` sets its values for the two batch sizes."""
        return SizedProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *further: Any, **named: Any) -> Any:
        """Create a node and its values; return a plain number or shape instead if the result is known.

        An argument of the forward with a default keeps the default.
        """
        if kind == "placeholder" and args:
            return args[0]
        if target is functional.multi_head_attention_forward:
            return _written_out(target, args, kwargs)
        made = super().create_proxy(kind, target, args, kwargs, *further, **named)
        if not isinstance(made, SizedProxy) or kind == "output" or self._inputs[0] is None:
            return made
        made.known = (self._value(kind, target, args, kwargs, 0), self._value(kind, target, args, kwargs, 1))
        one, other = made.known
        if isinstance(one, torch.Size):
            self.graph.erase_node(made.node)
            asked = args[0]
            return asked.shape
        if kind.startswith("call") and isinstance(one, (bool, int, float)) and one == other:
            self.graph.erase_node(made.node)
            return one
        return made

    def _value(self, kind: str, target: Any, args: Any, kwargs: Any, which: int) -> Any:
        def known(value: Any) -> Any:
            if isinstance(value, SizedProxy):
                return value.known[which]
            if isinstance(value, fx.proxy.Attribute):
                return getattr(known(value.root), value.attr)
            if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
                return type(value)(map(known, value))
            if isinstance(value, dict):
                return {key: known(item) for key, item in value.items()}
            if isinstance(value, slice):
                return slice(known(value.start), known(value.stop), known(value.step))
            return value

        args, kwargs = known(tuple(args)), known(dict(kwargs))
        if kind == "placeholder":
            return self._inputs[which]
        if kind == "get_attr":
            owner, _, name = target.rpartition(".")
            module = self.root.get_submodule(owner)
            return {**module._parameters, **module._buffers, **module.__dict__}[name]
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if kind == "call_function":
            return target(*args, **kwargs)
        module = self.root.get_submodule(target)
        modes = {part: part.training for part in module.modules()}
        self.computes = True
        try:
            return module.eval()(*args, **kwargs)
        finally:
            self.computes = False
            for part, mode in modes.items():
                part.training = mode

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return a parameter as a proxy, or as its own tensor while a module runs to compute example values."""
        return attr_val if self.computes else super().getattr(attr, attr_val, parameter_proxy_cache)
