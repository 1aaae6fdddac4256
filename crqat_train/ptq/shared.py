"""Checks whether a parameter is used in one place of a network only, so that it can be changed there."""

from __future__ import annotations

from torch import Tensor, fx

from crqat.train.graph.operations import parameter


def is_shared(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node's stored tensor or module is used elsewhere as well, under any name."""
    twins = [other for other in model.graph.nodes if (other.op, other.target) == (node.op, node.target)]
    if len(twins) > 1 or (node.op == "get_attr" and len(node.users) > 1):
        return True
    own: list[Tensor] = [parameter(model, node)] if node.op == "get_attr" else []
    if node.op == "call_module":
        own = list(model.get_submodule(str(node.target)).parameters(recurse=False))
    every = [tensor for _, tensor in model.named_parameters(remove_duplicate=False)]
    return any(sum(tensor is other for other in every) > 1 for tensor in own)
