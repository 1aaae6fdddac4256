"""Which edges carry quantizers: asked from NNCF, mapped one to one to torch.fx, constrained by the targets.

NNCF decides placement without data and without running a quantizer; its hook names, such as
"post_hooks.layer1/0/relu/relu__0.0", are our edge names, so a checkpoint can go both ways. The quantizers themselves
live in a torch.fx GraphModule, because that is what torch.compile can fuse.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn

from crqat.core import targets as runtimes
from crqat.core.errors import UsageError
from crqat.core.targets import Residual, is_depthwise
from crqat.train.config import QuantizationConfig
from crqat.train.graph.explain import check_module, check_pools
from crqat.train.graph.operations import (
    batch_norm_after,
    convolution_groups,
    is_add,
    is_batch_norm,
    is_concat,
    is_layer_norm,
    is_matmul,
    is_nonnegative,
    is_unfused_activation,
    parameter,
    through_movement,
    trace,
)
from crqat.train.placement import overrides
from crqat.train.placement.nncf_layout import Hooks, ask_layout, name_operations

# Key of an FX node's `meta`: NNCF's name of a layer that the recipe keeps in float.
FLOAT_LAYER = "crqat_float_layer"


@dataclass(frozen=True)
class QuantizerSpec:
    """One quantizer of the layout.

    Attributes:
        edge: Its name: the first of its NNCF hook names.
        hooks: All hook names that share it, sorted.
        kind: "weight" or "activation".
        bits: Bit width asked for, after the targets' constraints.
        qmin: Smallest code.
        qmax: Largest code.
        channels: Length of a per-channel scale, None for per tensor.
        ndim: Dimensions of the quantized tensor.
        input_edge: For a weight, the edge of the activation that it meets.
        bn: For a weight, the name of the BatchNorm that the convolution folds, None if there is none.
        reason: Why the bit width differs from the recipe's, empty if it does not.
    """

    edge: str
    hooks: tuple[str, ...]
    kind: str
    bits: int
    qmin: int
    qmax: int
    channels: int | None
    ndim: int
    input_edge: str | None = None
    bn: str | None = None
    reason: str = ""

    @property
    def module_name(self) -> str:
        """A Python identifier for the quantizer inside the GraphModule."""
        return re.sub(r"\W", "_", self.edge)

    @property
    def operation(self) -> str:
        """The module path or operation that the edge belongs to, for people: "layer1.0.conv1"."""
        return operation_of(self.edge)


def operation_of(edge: str) -> str:
    """The module path or operation that an edge belongs to, for people."""
    name = edge.split(".", 1)[1].rsplit("__", 1)[0]
    return ".".join(name.split("/")[:-2]) or name


@dataclass(frozen=True)
class _Place:
    """Where a hook sits in the FX graph: behind `source`, on all of its uses or on the use by `consumer`."""

    source: fx.Node
    consumer: fx.Node | None


def insert_quantizers(
    model: nn.Module,
    example: Tensor,
    config: QuantizationConfig,
    targets: Sequence[str],
    make_quantizer: Callable[[QuantizerSpec], nn.Module],
    residual: Residual | None = None,
) -> tuple[fx.GraphModule, list[QuantizerSpec]]:
    """Insert quantizers into a copy of the model, where NNCF would put them and as the targets need them.

    Args:
        model: Float network; it is not changed.
        example: Input of shape [N, C, H, W], float32.
        config: Bit widths.
        targets: Names of runtimes; see `crqat.core.targets`.
        make_quantizer: Called once for each spec.
        residual: Which inputs of a residual Add are quantized; None takes what the targets want.

    Returns:
        A GraphModule that keeps the model's state dict keys and has the quantizers under `quantizers.NAME`, and their
        specs in the order of NNCF's layout.

    Raises:
        UsageError: The model cannot be run or traced, has layers that cannot be quantized, or NNCF's layout cannot be
            mapped one to one.
    """
    if hasattr(model, "quantizers"):
        msg = f"model.name: {type(model).__name__}.quantizers is where quantizers are put; rename that attribute"
        raise UsageError(msg)
    check_module(model)
    model = copy.deepcopy(model).eval()
    hooks = ask_layout(model, example)
    in_float = _in_float(hooks, config, targets)
    if in_float:
        hooks = ask_layout(model, example, in_float)
    graph_module = trace(model, example)
    names_of_nodes, places = _map_hooks(graph_module, model, example, hooks)
    for node, name in names_of_nodes.items():
        if name in in_float:
            node.meta[FLOAT_LAYER] = name
    groups = [(names, channels, weight, [places[name] for name in names]) for names, channels, weight in hooks.groups]
    # NNCF quantizes the weight of a LayerNorm, too: no runtime computes one in integers, it would only cost accuracy.
    groups = [group for group in groups if not (group[2] and is_layer_norm(_reader(group[3][0])))]
    constraints = runtimes.union(targets)
    if constraints.quantize_before_activation:
        groups += _before_activations(graph_module, names_of_nodes, places)
    residual = residual or constraints.residual
    if residual != "both":
        dropped = _conv_branches(graph_module, groups)
        groups = [group for group in groups if group[0][0] not in dropped]
    if residual == "none":
        groups = _without_skips(groups)
    specs = _constrain(graph_module, example, groups, config, constraints)
    holder = nn.ModuleDict({spec.module_name: make_quantizer(spec) for spec in specs})
    if len(holder) != len(specs):
        msg = f"model.name: {type(model).__name__} has operations whose names differ only in punctuation; rename one"
        raise UsageError(msg)
    graph_module.add_module("quantizers", holder)
    for spec, (_, _, _, group_places) in zip(specs, groups, strict=True):
        _insert(graph_module.graph, f"quantizers.{spec.module_name}", group_places)
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module, specs


def _in_float(hooks: Hooks, config: QuantizationConfig, targets: Sequence[str]) -> list[str]:
    """NNCF's names of the operations that `float_layers` keeps in float."""
    edges = [names[0] for names, _, weight in hooks.groups if weight]
    layers = {edge.split(".", 1)[1].rsplit("__", 1)[0].replace(":", "."): operation_of(edge) for edge in edges}
    chosen = overrides.in_float(config.float_layers, targets, sorted(layers.values()))
    return [operation for operation, name in layers.items() if name in chosen]


def _map_hooks(
    graph_module: fx.GraphModule, model: nn.Module, example: Tensor, hooks: Hooks
) -> tuple[dict[fx.Node, str], dict[str, _Place]]:
    """NNCF's name of each node and each hook name's place; certain, because NNCF's own code names the nodes too.

    The FX graph is run once node by node under NNCF's naming. The two lists of operations must agree in number, order
    and name; then a hook is the edge whose value is the very tensor that the operation read or wrote.
    """
    operations, values = name_operations(graph_module, model, example)
    check_pools(graph_module, values)
    # A Proxy turns `a += b` into `add`, so a trailing underscore is no difference, nor is the number behind it that
    # counts calls of the same name; the order stands for that.
    if [_plain(name) for name in operations] != [_plain(name) for name in hooks.operations]:
        odd = set(map(_plain, hooks.operations)) ^ set(map(_plain, operations))
        some = ", ".join(sorted(odd)[:3]) or "their order"
        msg = f"model.name: torch.fx and NNCF see different operations in {type(model).__name__} ({some})"
        raise UsageError(msg)
    by_name = dict(zip(hooks.operations, operations.values(), strict=True))
    inputs = {node.target: node for node in graph_module.graph.nodes if node.op == "placeholder"}
    places: dict[str, _Place] = {}
    for name in (name for names, _, _ in hooks.groups for name in names):
        side, rest = name.split(".", 1)
        operation, port = rest.rsplit(".", 1)[0].replace(":", ".").rsplit("__", 1)
        if side == "post_hooks" and operation in inputs:
            places[name] = _Place(inputs[operation], None)
            continue
        if operation not in by_name:
            msg = f"model.name: NNCF quantizes {operation}, which torch.fx does not show; it is inside a leaf module"
            raise UsageError(msg)
        node, arguments, output = by_name[operation]
        if side == "post_hooks":
            written = output[int(port)] if isinstance(output, (tuple, list)) else output
            found = [node] if values[node] is written else []
        else:
            read = arguments[int(port)]
            found = [source for source in node.all_input_nodes if values[source] is read]
        if len(found) != 1:
            msg = f"model.name: {name} cannot be mapped to one edge of the FX graph (node {node.name})"
            raise UsageError(msg)
        places[name] = _Place(found[0], None if side == "post_hooks" else node)
    return {node: name for name, (node, _, _) in by_name.items()}, places


def _plain(operation: str) -> str:
    module, function, _ = operation.rsplit("/", 2)
    return f"{module}/{function if function.endswith('__') else function.rstrip('_')}"


def _reader(place: _Place) -> fx.Node:
    """The first that reads a place."""
    return place.consumer or next(iter(place.source.users))


_Groups = list[tuple[tuple[str, ...], "int | None", bool, list[_Place]]]


def _before_activations(
    graph_module: fx.GraphModule, names_of_nodes: dict[fx.Node, str], places: dict[str, _Place]
) -> _Groups:
    """Quantizers that NNCF does not ask for: between a convolution and an activation that is not fused with it.

    Without them the convolution itself would run in float.
    """
    quantized = {place.source for place in places.values()}
    groups: _Groups = []
    for activation in graph_module.graph.nodes:
        if not is_unfused_activation(graph_module, activation):
            continue
        source = activation.all_input_nodes[0]
        producer = source.all_input_nodes[0] if is_batch_norm(graph_module, source) else source
        if is_matmul(producer) and source not in quantized and FLOAT_LAYER not in producer.meta:
            quantized.add(source)
            name = f"post_hooks.{names_of_nodes[source].replace('.', ':')}__0.0"
            groups.append(((name,), None, False, [_Place(source, None)]))
    return groups


def _conv_branches(graph_module: fx.GraphModule, groups: _Groups) -> set[str]:
    """Edges on the convolution side of a residual Add; of two such sides the deeper, the other is the downsample."""
    # A quantizer that edges share stays: the others need it.
    quantized = {places[0].source: names[0] for names, _, weight, places in groups if not weight and len(places) == 1}
    depth: dict[fx.Node, int] = {}
    for node in graph_module.graph.nodes:
        depth[node] = 1 + max((depth[source] for source in node.all_input_nodes), default=0)
    dropped = set()
    for add in filter(is_add, graph_module.graph.nodes):
        candidates = []
        for source in add.all_input_nodes:
            producer = source.all_input_nodes[0] if is_batch_norm(graph_module, source) else source
            if is_matmul(producer) and len(source.users) == 1 and source in quantized:
                candidates.append(source)
        if candidates and len(add.all_input_nodes) == 2:
            dropped.add(quantized[max(candidates, key=depth.__getitem__)])
    return dropped


def _without_skips(groups: _Groups) -> _Groups:
    """The groups with each Add reading float values; a quantizer that nothing else reads is left out."""
    result: _Groups = []
    for names, channels, weight, places in groups:
        kept: list[_Place] = []
        for place in places:
            readers = [place.consumer] if place.consumer is not None else list(place.source.users)
            others = [reader for reader in readers if not is_add(reader)]
            kept += [place] if len(others) == len(readers) else [_Place(place.source, reader) for reader in others]
        if kept:
            result.append((names, channels, weight, kept))
    return result


def _constrain(
    graph_module: fx.GraphModule,
    example: Tensor,
    groups: _Groups,
    config: QuantizationConfig,
    constraints: runtimes.Constraints,
) -> list[QuantizerSpec]:
    """Each quantizer's codes: signedness from the graph, bit widths from the recipe, within the targets' limits."""
    activation_at = {place: names[0] for names, _, weight, places in groups if not weight for place in places}
    matmuls = [node for node in graph_module.graph.nodes if is_matmul(node)]

    def edge_between(source: fx.Node, reader: fx.Node) -> str | None:
        for moved in through_movement(graph_module, source):
            for place in (_Place(moved, reader), _Place(moved, None)):
                if place in activation_at:
                    return activation_at[place]
            reader = moved
        if is_concat(reader):
            edges = {edge_between(part, reader) for part in reader.all_input_nodes}
            return edges.pop() if len(edges) == 1 else None
        return None

    def edge_into(node: fx.Node) -> str | None:
        return edge_between(node.all_input_nodes[0], node)

    def feeds_float(places: list[_Place]) -> bool:
        return any(is_unfused_activation(graph_module, user) for place in places for user in place.source.users)

    last_input = edge_into(matmuls[-1]) if matmuls else None
    readers = [(names[0], _reader(places[0])) for names, _, weight, places in groups if weight]
    layers = [overrides.Layer(edge, operation_of(edge), edge_into(node)) for edge, node in readers if is_matmul(node)]
    free = [names[0] for names, _, weight, places in groups if not weight and not feeds_float(places)]
    overridden = overrides.widths(config.overrides, layers, {edge: operation_of(edge) for edge in free})
    specs: dict[str, QuantizerSpec] = {}
    for names, _, weight, places in groups:
        if weight:
            continue
        bits = config.activations
        if any(place.source.op == "placeholder" for place in places):
            bits = config.first_layer
        elif names[0] == last_input:
            bits = config.last_layer
        elif feeds_float(places):
            bits = 8  # what it feeds is computed in float: fewer bits would only cost accuracy
        bits = overridden.get(names[0], bits)
        nonnegative = all(is_nonnegative(graph_module, place.source) for place in places)
        qmin, qmax = constraints.activation_codes(bits, nonnegative)
        specs[names[0]] = QuantizerSpec(names[0], names, "activation", bits, qmin, qmax, None, example.ndim)
    ordered = []
    for names, channels, weight, places in groups:
        if not weight:
            ordered.append(specs[names[0]])
            continue
        node = _reader(places[0])
        if not is_matmul(node):
            msg = f"model.name: the weight of {names[0]} is of no Conv1d, Conv2d or Linear, the ones that are quantized"
            raise UsageError(msg)
        weights = parameter(graph_module, places[0].source)
        bits = config.weights
        if node is matmuls[0]:
            bits = config.first_layer
        elif node is matmuls[-1]:
            bits = config.last_layer
        bits = overridden.get(names[0], bits)
        input_edge = edge_into(node)
        fed = specs.get(input_edge or "")
        depthwise = is_depthwise(weights.shape, convolution_groups(node))
        codes = None if fed is None else fed.qmax - fed.qmin
        bits, reason = constraints.weight_bits(bits, codes, depthwise)
        qmin, qmax = runtimes.weight_codes(bits)
        ordered.append(
            QuantizerSpec(
                names[0],
                names,
                "weight",
                bits,
                qmin,
                qmax,
                channels,
                weights.ndim,
                input_edge,
                batch_norm_after(graph_module, node),
                reason,
            )
        )
    return ordered


def codes_at(spec: QuantizerSpec, bits: int) -> tuple[int, int]:
    """Smallest and largest code of a quantizer at another bit width than its own, whatever the targets say of it."""
    if bits == spec.bits:
        return spec.qmin, spec.qmax
    if spec.kind == "weight":
        return runtimes.weight_codes(bits)
    return runtimes.activation_codes(bits, spec.qmin == 0)


def _insert(graph: fx.Graph, target: str, places: list[_Place]) -> None:
    for place in places:
        with graph.inserting_after(place.source):
            quantized = graph.call_module(target, (place.source,))
        if place.consumer is None:
            others = [user for user in place.source.users if user is not quantized]
            place.source.replace_all_uses_with(quantized, delete_user_cb=others.__contains__)
        else:
            place.consumer.replace_input_with(place.source, quantized)


def quantizer_node(model: fx.GraphModule, spec: QuantizerSpec) -> fx.Node:
    """The first call of a quantizer in the GraphModule."""
    found: fx.Node = next(node for node in model.graph.nodes if node.target == f"quantizers.{spec.module_name}")
    return found


def weight_node(model: fx.GraphModule, spec: QuantizerSpec) -> fx.Node:
    """The get_attr node of the float tensor that a weight's quantizer sits on."""
    return quantizer_node(model, spec).all_input_nodes[0]
