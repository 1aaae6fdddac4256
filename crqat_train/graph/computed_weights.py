"""Folds weights that are computed from parameters alone into plain weights, which can be quantized.

Parametrizations, weight and spectral norm and pruning of `torch.nn.utils` are folded in the module. Weights that a
forward computes itself are folded in the graph: weight standardization, a transposed weight that two layers share, a
low-rank product. Training then continues with the plain weight, so each fold is reported.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from crqat.train.graph.explain import place
from crqat.train.graph.operations import is_matmul, is_transposed

_PRODUCTS: set[Any] = {torch.matmul, torch.mm, operator.matmul, "matmul", "mm"}
_MOVES = {"t", "transpose", "permute", "chunk", "split", "getitem", "view", "reshape", "unbind", "squeeze", "unsqueeze"}
_RANDOM = {"dropout", "bernoulli", "normal", "multinomial"}


def copied(model: nn.Module) -> dict[int, Any]:
    """Return a memo for `copy.deepcopy`, so that it accepts a network with tensors that hooks compute.

    The memo maps the id of each such tensor, which deepcopy refuses, to a copy of it.
    """
    values = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return {id(value): value.detach().clone() for value in values if not value.is_leaf}


def fold_modules(model: nn.Module) -> list[str]:
    """Fold the weights that `torch.nn.utils` computes in hooks and parametrizations.

    Args:
        model: Network in eval mode; changed in place.

    Returns:
        One line for each folded weight.
    """
    notes = []
    for path, module in list(model.named_modules()):
        found = []
        if parametrize.is_parametrized(module):
            made: dict[str, tuple[Tensor, nn.Module]] = {
                name: (getattr(module, name).detach().clone(), parts)
                for name, parts in module.get_submodule("parametrizations").named_children()
            }
            # torch's own removal would also take the weight from the original network, of which this one is a copy.
            module.__class__ = parametrize.type_before_parametrizations(module)
            del module.parametrizations
            for name, (value, parts) in made.items():
                trained = [parameter.requires_grad for parameter in parts.parameters()]
                if trained:
                    module.register_parameter(name, nn.Parameter(value, any(trained)))
                else:
                    module.register_buffer(name, value)
                found.append((name, ", ".join(type(part).__name__.strip("_") for part in parts.children())))
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, (WeightNorm, SpectralNorm)):
                found.append((str(hook.name), type(hook).__name__))
            elif isinstance(hook, prune.BasePruningMethod):
                by = f"{type(hook).__name__}, which prunes: training may change the pruned zeros"
                found.append((str(hook._tensor_name), by))
            else:
                continue
            hook.remove(module)
            del module._forward_pre_hooks[key]
        notes += [_folded(f"{path} ({type(module).__name__})", name, by) for name, by in found]
    return notes


def fold_graph(
    graph_module: fx.GraphModule, model: nn.Module, values: Mapping[fx.Node, Any]
) -> tuple[dict[fx.Node, fx.Node], list[str]]:
    """Fold computed weights and biases of a traced forward, and turn products with a weight into linear layers.

    Args:
        graph_module: Traced graph; changed in place.
        model: The network that it was traced from.
        values: Value of each node for an example.

    Returns:
        A mapping of each changed layer's node to the node of its new weight; and one line for each layer that trains
        differently because of it.
    """
    graph = graph_module.graph
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        if _is_constant(node, constant):
            constant.add(node)
    weights: dict[fx.Node, fx.Node] = {}
    folded: dict[fx.Node, list[fx.Node]] = {}
    for node in list(graph.nodes):
        if node in constant:
            continue
        if _is_product(node) and node.args[1] in constant and values[node.args[1]].ndim == 2:
            source = node.args[1]
            with graph.inserting_before(node):
                turned = graph.call_function(torch.t, (source,))
            constant.add(turned)
            node.op, node.target, node.args = "call_function", functional.linear, (node.args[0], turned)
            values = {**values, turned: values[source].t()}
        if not is_matmul(node):
            continue
        for index, name in ((1, "weight"), (2, "bias")):
            source = node.args[index] if len(node.args) > index else node.kwargs.get(name)
            if isinstance(source, fx.Node) and source in constant and source.op != "get_attr":
                folded.setdefault(source, []).append(node)
                if index == 1:
                    weights[node] = source
    notes: list[str] = []
    sources = {source: _sources(source) for source in folded}
    names_of = {source: _names_between(source) for source in folded}
    users = {origin: set(origin.users) for found in sources.values() for origin in found}
    made: dict[fx.Node, fx.Node] = {}
    for source, readers in folded.items():
        made[source] = _store(graph_module, source, readers[0], values[source])
        for reader in readers:
            reader.replace_input_with(source, made[source])
    if not folded:
        return {}, []
    graph.eliminate_dead_code()
    alive = set(graph.nodes)
    for source, readers in folded.items():
        shared = any(user in alive for origin in sources[source] for user in users[origin])
        names = names_of[source]
        if source in weights.values() and (shared or not names <= _MOVES):
            by = ", ".join(sorted(names - {"t"} or names)) + (", of a weight that is used elsewhere" if shared else "")
            notes.append(_folded(place(model, readers[0]), "weight", by))
    return {node: made[source] for node, source in weights.items()}, notes


def _folded(owner: str, name: str, by: str) -> str:
    return f"{owner}: its {name} is computed ({by}); training continues with the computed {name} as a plain parameter"


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).strip("_")


def _is_constant(node: fx.Node, constant: set[fx.Node]) -> bool:
    if node.op == "get_attr":
        return True
    inputs = node.all_input_nodes
    random = _name(node) in _RANDOM or "rand" in _name(node)
    return node.op in {"call_function", "call_method"} and bool(inputs) and not random and set(inputs) <= constant


def _is_product(node: fx.Node) -> bool:
    return node.op in {"call_function", "call_method"} and node.target in _PRODUCTS and len(node.args) == 2


def _between(source: fx.Node) -> set[fx.Node]:
    found, left = set(), [source]
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += node.all_input_nodes
    return found


def _sources(source: fx.Node) -> list[fx.Node]:
    return [node for node in _between(source) if node.op == "get_attr"]


def _names_between(source: fx.Node) -> set[str]:
    return {_name(node) for node in _between(source) if node.op != "get_attr"}


def _store(graph_module: fx.GraphModule, source: fx.Node, reader: fx.Node, value: Tensor) -> fx.Node:
    """Store a new parameter, or a buffer if computed from buffers only, in the module that uses it."""
    owners = [path for path, _ in (reader.meta.get("nn_module_stack") or {}).values() if path]
    owner: nn.Module = graph_module
    for part in owners[-1].split(".") if owners else ():
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    taken = [name for name in (*owner._parameters, *owner._buffers) if name.startswith("folded_")]
    name = f"folded_{len(taken)}"
    stored = value.detach().clone().contiguous()
    parameters = dict(graph_module.named_parameters(remove_duplicate=False))
    origins = [parameters[str(node.target)] for node in _sources(source) if str(node.target) in parameters]
    if origins:
        owner.register_parameter(name, nn.Parameter(stored, any(origin.requires_grad for origin in origins)))
    else:
        owner.register_buffer(name, stored)
    with graph_module.graph.inserting_before(reader):
        return graph_module.graph.get_attr(".".join([*owners[-1:], name]))


def channels_of(node: fx.Node, weight: Tensor) -> int:
    """Return the number of output channels of a layer's weight."""
    return int(weight.shape[int(is_transposed(node))])
