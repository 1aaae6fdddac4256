"""Records a network's computation as a flat list of torch operators with known sizes.

The network runs twice, with two batch sizes, and each operator is recorded before autograd decomposes it. A value that
is the same in both runs is a constant; a size that differs depends on the batch.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from crqat.core.errors import UsageError

DOMAIN = "crqat"
BATCHES = (2, 3)
_LIBRARY = torch.library.Library(DOMAIN, "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("edge(Tensor x, str edge) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.impl("edge", lambda x, edge: x.clone(), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
# These use only the sizes and the type of a tensor.
_MAKERS = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}


class Marker(nn.Module):
    """Identity that marks the position of a quantizer.

    Args:
        edge: Name of the edge, by which `record` finds the marker.
    """

    def __init__(self, edge: str) -> None:
        super().__init__()
        self.edge = edge

    def forward(self, x: Tensor) -> Tensor:
        """Return a copy of `x`."""
        return cast("Tensor", torch.ops.crqat.edge(x, self.edge))


class Program:
    """Operators of a network that is recorded twice, with the two batch sizes in `BATCHES`.

    Attributes:
        nodes: Operators in execution order, recorded with the first batch size; `meta["val"]` holds their sizes.
        twins: Maps each of these operators to the same operator in the recording with the other batch size.
    """

    def __init__(self, model: fx.GraphModule, input_shape: list[int]) -> None:
        self._runs = [_recorded(model, input_shape, batch) for batch in BATCHES]
        lists = [list(run.graph.nodes) for run in self._runs]
        if [str(node.target) for node in lists[0]] != [str(node.target) for node in lists[1]]:
            msg = (
                f"model.name: {type(model).__name__} computes differently for {BATCHES[0]} images than for "
                f"{BATCHES[1]}; let no `if` or loop depend on the number of images"
            )
            raise UsageError(msg)
        self.nodes: list[fx.Node] = lists[0]
        self.twins: dict[fx.Node, fx.Node] = dict(zip(*lists, strict=True))
        self._names = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        self._fixed: dict[fx.Node, bool] = {}
        self._values: dict[fx.Node, Any] = {}

    def sizes(self, node: fx.Node) -> list[int | None]:
        """Return the shape of a node's result; None stands for the batch size, or a multiple of it."""
        shapes = [n.meta["val"].shape for n in (node, self.twins[node])]
        return [int(a) if a == b else None for a, b in zip(*shapes, strict=True)]

    def is_fixed(self, node: fx.Node) -> bool:
        """Whether a node's values do not depend on the images."""
        if node not in self._fixed:
            schema = getattr(node.target, "_schema", None)
            if node.op in ("placeholder", "output") or node.target is torch.ops.crqat.edge.default:
                self._fixed[node] = False
            elif schema is not None and schema.name.partition("::")[2] in _MAKERS:
                self._fixed[node] = True
            else:
                self._fixed[node] = all(self.is_fixed(source) for source in node.all_input_nodes)
        return self._fixed[node]

    def value(self, node: fx.Node) -> Any:
        """Return the value of a node that does not depend on the images."""
        if node not in self._values:
            if node.op == "get_attr":
                self._values[node] = getattr(self._runs[0], str(node.target))
            else:
                made = getattr(getattr(node.target, "_schema", None), "name", "").partition("::")[2] in _MAKERS

                def known(source: fx.Node) -> Any:
                    if made:
                        return torch.empty(source.meta["val"].shape, dtype=source.meta["val"].dtype)
                    return self.value(source)

                args, kwargs = fx.map_arg((node.args, node.kwargs), known)
                with torch.no_grad():
                    self._values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self._values[node]

    def stored_name(self, node: fx.Node) -> str | None:
        """Return the name of the parameter or buffer that a node loads."""
        return self._names.get(id(self.value(node))) if node.op == "get_attr" else None


def _recorded(model: fx.GraphModule, input_shape: list[int], batch: int) -> fx.GraphModule:
    with torch.no_grad(), preserve_node_meta():
        return make_fx(fx.Interpreter(model).run, pre_dispatch=True)(torch.zeros(batch, *input_shape))


def module_of(node: fx.Node) -> str:
    """Return the path of the module that called an operator; empty for the network itself."""
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return str(stack[-1]) if stack else ""
