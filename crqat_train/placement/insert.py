"""Inserts quantizers: NNCF decides the edges, which are mapped one to one to torch.fx and constrained by the targets.

NNCF decides placement without data and without running a quantizer. Its hook names, such as
"post_hooks.layer1/0/relu/relu__0.0", are our edge names, so checkpoints can be converted in both directions. The
quantizers live in a torch.fx GraphModule, because torch.compile can fuse their operations with those around them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from crqat.core import targets as runtimes
from crqat.core.errors import UsageError
from crqat.core.targets import Residual
from crqat.train.config import QuantizationConfig
from crqat.train.graph.attention import write_out
from crqat.train.graph.computed_weights import channels_of, copied, fold_graph, fold_modules
from crqat.train.graph.explain import check_module, check_norms, check_pools, forward_of, place
from crqat.train.graph.operations import NOTES, is_linear, is_matmul, of_images, parameter, reads_images, trace
from crqat.train.graph.sizes import VIEWS
from crqat.train.placement import overrides
from crqat.train.placement.nncf_layout import Hooks, ask_layout, name_operations, parts_of
from crqat.train.placement.quantizer_spec import QuantizerSpec, operation_of
from crqat.train.placement.target_rules import (
    FLOAT_LAYER,
    Groups,
    Place,
    behind_layers,
    constrain,
    conv_branches,
    in_front_of_layers,
    without_skips,
)


def insert_quantizers(
    model: nn.Module,
    example: Tensor,
    config: QuantizationConfig,
    targets: Sequence[str],
    make_quantizer: Callable[[QuantizerSpec], nn.Module],
    residual: Residual | None = None,
) -> tuple[fx.GraphModule, list[QuantizerSpec]]:
    """Insert quantizers into a copy of the model, at NNCF's positions and within the limits of the targets.

    Args:
        model: Float network. It is not changed.
        example: Input of shape [N, C, H, W], float32.
        config: Bit widths and quantization methods.
        targets: Names of runtimes; see `crqat.core.targets`.
        make_quantizer: Creates the quantizer of a spec; called once for each.
        residual: Which inputs of a residual Add are quantized; None uses the targets' choice.

    Returns:
        A GraphModule that keeps the model's state dict keys and has the quantizers under `quantizers.NAME`, and the
        specs of the quantizers in NNCF's order.

    Raises:
        UsageError: The model cannot be run or traced, has layers that cannot be quantized, or NNCF's placement
            cannot be mapped to the graph one to one.
    """
    if hasattr(model, "quantizers"):
        msg = f"model.name: {type(model).__name__}.quantizers is reserved for the quantizers; rename that attribute"
        raise UsageError(msg)
    check_module(model)
    model = copy.deepcopy(model, copied(model)).eval()
    notes = fold_modules(model)
    write_out(model)
    with _written_out():
        hooks = ask_layout(model, example)
    in_float = _in_float(hooks, config, targets)
    with _written_out():
        if in_float:
            hooks = ask_layout(model, example, in_float)
        graph_module = trace(model, example)
        _check_weights(graph_module, model)
        names_of_nodes, places, values = _map_hooks(graph_module, model, example, hooks)
    folded, found = fold_graph(graph_module, model, values)
    graph_module.meta[NOTES] += notes + found
    for node, name in names_of_nodes.items():
        if name in in_float:
            node.meta[FLOAT_LAYER] = name
    alive, groups = set(graph_module.graph.nodes), []
    for names, channels, weight in hooks.groups:
        # Folded operations that computed a layer's weight no longer exist.
        kept = [places[name] for name in names if name in places and places[name].source in alive]
        if weight:
            # A layer on constants, such as learned queries, has no quantized input.
            kept = [p for p in kept if p.consumer and p.consumer not in folded and reads_images(p.consumer)]
        if kept:
            groups.append((names, channels, weight, kept))
    for node, stored in folded.items():
        if names_of_nodes[node] not in in_float and reads_images(node):
            edge = f"pre_hooks.{names_of_nodes[node].replace('.', ':')}__1.0"
            channels = channels_of(node, parameter(graph_module, stored))
            groups.append(((edge,), channels, True, [Place(stored, node)]))
    groups += _left_out(graph_module, names_of_nodes, groups, in_float)
    constraints = runtimes.union(targets)
    if constraints.quantize_before_activation:
        groups = behind_layers(graph_module, names_of_nodes, groups)
    groups += in_front_of_layers(graph_module, names_of_nodes, groups)
    residual = residual or constraints.residual
    if residual != "both":
        dropped = conv_branches(graph_module, groups)
        groups = [group for group in groups if group[0][0] not in dropped]
    if residual == "none":
        groups = without_skips(groups)
    specs = constrain(graph_module, example, groups, config, constraints)
    holder = nn.ModuleDict({spec.module_name: make_quantizer(spec) for spec in specs})
    if len(holder) != len(specs):
        taken = {spec.module_name: spec for spec in specs}
        twin = next(spec for spec in specs if taken[spec.module_name] is not spec)
        both = f"{twin.operation} and {taken[twin.module_name].operation}"
        kind = type(model).__name__
        msg = f"model.name: {kind} has operations whose names differ only in punctuation, {both}; rename one"
        raise UsageError(msg)
    graph_module.add_module("quantizers", holder)
    for spec, (_, _, _, group_places) in zip(specs, groups, strict=True):
        _insert(graph_module.graph, f"quantizers.{spec.module_name}", group_places)
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module, specs


@contextmanager
def _written_out() -> Iterator[None]:
    """Let transformer layers avoid torch's fused kernel, and NNCF see `VIEWS`, such as x.T, as operations."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for name, view in VIEWS.items():
        own = getattr(torch._C.TensorBase, name)
        setattr(Tensor, name, property(view, own.__set__))
    try:
        yield
    finally:
        for name in VIEWS:
            delattr(Tensor, name)
        torch.backends.mha.set_fastpath_enabled(before)


def _check_weights(graph_module: fx.GraphModule, model: nn.Module) -> None:
    """Refuse convolutions whose weight depends on the image: no runtime computes these in integers."""
    for node in filter(is_matmul, graph_module.graph.nodes):
        weight = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
        if not is_linear(node) and of_images(weight):
            msg = (
                f"model.name: {place(model, node)} convolves with a weight that depends on the image; convolve with "
                "each of the fixed weights that it mixes, and mix the results instead"
            )
            raise UsageError(msg)


def _left_out(
    graph_module: fx.GraphModule, names_of_nodes: dict[fx.Node, str], groups: Groups, in_float: Sequence[str]
) -> Groups:
    """Return the weights in squeeze-and-excitation, which the recipe quantizes although NNCF leaves them in float.

    They are up to a tenth of a small network's multiply-accumulates. In float they would keep everything between the
    global pool and the sigmoid in float.
    """
    quantized = {place.consumer for _, _, weight, own in groups if weight for place in own}
    added: Groups = []
    for node in filter(is_matmul, graph_module.graph.nodes):
        stored = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
        if node in quantized or names_of_nodes[node] in in_float or not reads_images(node) or stored.op != "get_attr":
            continue
        edge = f"pre_hooks.{names_of_nodes[node].replace('.', ':')}__1.0"
        added.append(((edge,), channels_of(node, parameter(graph_module, stored)), True, [Place(stored, node)]))
    return added


def _in_float(hooks: Hooks, config: QuantizationConfig, targets: Sequence[str]) -> list[str]:
    """Return NNCF's names of the operations that `float_layers` keeps in float."""
    edges = [names[0] for names, _, weight in hooks.groups if weight]
    layers = {edge.split(".", 1)[1].rsplit("__", 1)[0].replace(":", "."): operation_of(edge) for edge in edges}
    # Operations that NNCF leaves out by itself are quantized here, see `_left_out`.
    for name in hooks.operations:
        if re.search(r"/(conv[123]d|linear|conv_transpose[123]d)/\d+$", name):
            layers.setdefault(name, operation_of(f"pre_hooks.{name.replace('.', ':')}__1.0"))
    chosen = overrides.in_float(config.float_layers, targets, sorted(layers.values()))
    return [operation for operation, name in layers.items() if name in chosen]


def _map_hooks(
    graph_module: fx.GraphModule, model: nn.Module, example: Tensor, hooks: Hooks
) -> tuple[dict[fx.Node, str], dict[str, Place], dict[fx.Node, Any]]:
    """Return NNCF's name of each node, the place of each hook name, and the value of each node.

    The FX graph is run once node by node under NNCF's naming. The two lists of operations must agree in number, order
    and names; each hook is then the edge whose value is the same tensor object as the operation's input or output.
    """
    check_norms(graph_module)
    operations, values = name_operations(graph_module, model, example)
    check_pools(graph_module, values)
    # Ignore a trailing underscore, because a Proxy turns `a += b` into `add`, and the number that counts calls of the
    # same name, because the order identifies them.
    if [_plain(name) for name in operations] != [_plain(name) for name in hooks.operations]:
        odd = set(map(_plain, hooks.operations)) ^ set(map(_plain, operations))
        some = ", ".join(_described(model, name) for name in sorted(odd)[:3]) or "their order"
        msg = (
            f"model.name: {type(model).__name__}{forward_of(model)} runs different operations when it is traced "
            f"({some}); the forward must not test a tensor's type (isinstance, type), and must call only "
            "functions that torch can trace"
        )
        raise UsageError(msg)
    by_name = dict(zip(hooks.operations, operations.values(), strict=True))
    inputs = {node.target: node for node in graph_module.graph.nodes if node.op == "placeholder"}
    places: dict[str, Place] = {}
    for name, weight in ((name, weight) for names, _, weight in hooks.groups for name in names):
        side, operation, port = parts_of(name)
        if side == "post_hooks" and operation in inputs:
            places[name] = Place(inputs[operation], None)
            continue
        if operation not in by_name:
            msg = (
                f"model.name: {_described(model, operation)} is hidden in a module that is traced as one operation; "
                "write that module's forward out in a module of your own"
            )
            raise UsageError(msg)
        node, arguments, output = by_name[operation]
        # No runtime computes a normalization or an embedding in integers: its weight stays in float.
        if weight and not is_matmul(node):
            continue
        if side == "post_hooks":
            written = output[port] if isinstance(output, (tuple, list)) else output
            found = [node] if values[node] is written else []
            if isinstance(output, (tuple, list)) and node.op != "call_module":
                # Of several results, such as min's, take the one that is used.
                found = [taken for taken in node.users if values[taken] is written]
        else:
            read = arguments[port]
            found = [source for source in node.all_input_nodes if values[source] is read]
        if len(found) != 1:
            msg = (
                f"model.name: no quantizer can be placed around {_function(operation)} in {place(graph_module, node)}; "
                "write it with convolutions, linear layers and plain tensor operations"
            )
            raise UsageError(msg)
        places[name] = Place(found[0], None if side == "post_hooks" else node)
    return {node: name for name, (node, _, _) in by_name.items()}, places, values


def _described(model: nn.Module, operation: str) -> str:
    """Describe an NNCF operation for messages: "conv2d in layer1.conv (Conv2d)"."""
    path, _, function = operation.rpartition("/")
    path = path.replace("/", ".")
    if not path:
        return function
    return f"{function} in {path} ({type(model.get_submodule(path)).__name__})"


def _function(operation: str) -> str:
    return _plain(operation).rpartition("/")[2]


def _plain(operation: str) -> str:
    module, function, _ = operation.rsplit("/", 2)
    return f"{module}/{function if function.endswith('__') else function.rstrip('_')}"


def _insert(graph: fx.Graph, target: str, places: list[Place]) -> None:
    for edge in places:
        with graph.inserting_after(edge.source):
            quantized = graph.call_module(target, (edge.source,))
        if edge.consumer is None:
            others = [user for user in edge.source.users if user is not quantized]
            edge.source.replace_all_uses_with(quantized, delete_user_cb=others.__contains__)
        else:
            edge.consumer.replace_input_with(edge.source, quantized)


def quantizer_node(model: fx.GraphModule, spec: QuantizerSpec) -> fx.Node:
    """Return the first call of a quantizer in the GraphModule."""
    found: fx.Node = next(node for node in model.graph.nodes if node.target == f"quantizers.{spec.module_name}")
    return found


def weight_node(model: fx.GraphModule, spec: QuantizerSpec) -> fx.Node:
    """Return the get_attr node of the float tensor that a weight's quantizer quantizes."""
    return quantizer_node(model, spec).all_input_nodes[0]
