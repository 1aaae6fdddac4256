"""Adapts NNCF's quantizer placement to the targets.

The targets determine which inputs of residual Adds and which activations get quantizers. They also limit code ranges
and bit widths.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from crqat.core import targets as runtimes
from crqat.core.targets import is_depthwise
from crqat.train.config import QuantizationConfig
from crqat.train.graph.operations import (
    batch_norm_after,
    convolution_groups,
    is_add,
    is_batch_norm,
    is_concat,
    is_fused_activation,
    is_linear,
    is_matmul,
    is_nonnegative,
    is_softmax,
    is_transposed,
    is_unfused_activation,
    moves_values,
    parameter,
    through_movement,
)
from crqat.train.placement import overrides
from crqat.train.placement.quantizer_spec import QuantizerSpec, operation_of

# Key of an FX node's `meta`: NNCF's name of a layer that the recipe keeps in float.
FLOAT_LAYER = "crqat_float_layer"
# Key of an FX node's `meta`: its quantizer only enables fusion, and its consumers compute in float.
BEFORE_FLOAT = "crqat_before_float"


@dataclass(frozen=True)
class Place:
    """Position of a quantizer in the FX graph: after node `source`.

    It applies to the use by node `consumer` only, or to all uses if `consumer` is None.
    """

    source: fx.Node
    consumer: fx.Node | None


def first_reader(place: Place) -> fx.Node:
    """Return the first node that uses the value at a place."""
    return place.consumer or next(iter(place.source.users))


Groups = list[tuple[tuple[str, ...], "int | None", bool, list[Place]]]


def behind_layers(graph_module: fx.GraphModule, names_of_nodes: dict[fx.Node, str], groups: Groups) -> Groups:
    """Add a quantizer after each convolution whose result is used in float, so that the convolution runs in integers.

    A runtime computes a layer, with its BatchNorm and ReLU, in integers only if a quantizer follows directly. NNCF
    places no quantizer between a layer and an activation such as SiLU, or places it only after a data movement. If some
    consumers of the result have a quantizer already, all consumers share that quantizer.
    """
    places = {place: index for index, (_, _, weight, own) in enumerate(groups) if not weight for place in own}
    weights = {place.consumer for _, _, weight, own in groups if weight for place in own}
    # The last layer's result is the network's: operations after it, such as a LogSoftmax, are no reason to round it.
    quantized = weights | {place.source for place in places}
    before_others: set[fx.Node] = set()
    for node in reversed(graph_module.graph.nodes):
        if any(user in quantized or user in before_others for user in node.users):
            before_others.add(node)

    def covered(source: fx.Node) -> bool:
        if Place(source, None) in places:
            return True
        users = list(source.users)
        moved = len(users) == 1 and moves_values(graph_module, users[0]) and covered(users[0])
        return moved or all(Place(source, user) in places or user.op == "output" for user in users)

    def feeds_softmax(source: fx.Node) -> bool:
        return any(
            is_softmax(graph_module, user) or (moves_values(graph_module, user) and feeds_softmax(user))
            for user in source.users
        )

    result = list(groups)
    merged: set[int] = set()
    for node in graph_module.graph.nodes:
        if not is_matmul(node) or FLOAT_LAYER in node.meta or not node.users:
            continue
        source = node
        if batch_norm_after(graph_module, node) is not None and Place(node, None) not in places:
            source = next(iter(node.users))
        reader = next(iter(source.users))
        if len(source.users) == 1 and Place(source, None) not in places and is_fused_activation(graph_module, reader):
            source = reader
        bent = any(is_unfused_activation(graph_module, user) for user in source.users)
        # A linear layer needs no quantizer: its integer kernel also returns float values.
        if not bent and (is_linear(node) or node not in weights or node not in before_others):
            continue
        # ONNX Runtime's integer Softmax, which runs between two quantizers, is off by many codes.
        if covered(source) or feeds_softmax(source):
            continue
        # A layer that the recipe keeps in float takes float inputs.
        if any(FLOAT_LAYER in user.meta for user in source.users):
            continue
        shared = {places[Place(source, user)] for user in source.users if Place(source, user) in places}
        if shared:
            # A value has one quantizer: if its consumers had several, they share the first.
            first, *rest = sorted(shared)
            hooks = tuple(sorted({name for index in (first, *rest) for name in result[index][0]}))
            own = [place for index in (first, *rest) for place in result[index][3] if place.source is not source]
            result[first] = hooks, result[first][1], False, [Place(source, None), *own]
            places.update(dict.fromkeys([Place(source, None), *own], first))
            merged.update(rest)
        else:
            source.meta[BEFORE_FLOAT] = True
            name = f"post_hooks.{names_of_nodes[source].replace('.', ':')}__0.0"
            result.append(((name,), None, False, [Place(source, None)]))
    return [group for index, group in enumerate(result) if index not in merged]


def in_front_of_layers(graph_module: fx.GraphModule, names_of_nodes: dict[fx.Node, str], groups: Groups) -> Groups:
    """Add quantizers to the inputs of layers with quantized weights, where NNCF places none."""
    places = {place for _, _, weight, own in groups if not weight for place in own}
    added: Groups = []

    def quantized(source: fx.Node, reader: fx.Node) -> bool:
        for moved in through_movement(graph_module, source):
            if Place(moved, reader) in places or Place(moved, None) in places:
                return True
            source, reader = moved, moved
        return is_concat(source) and all(quantized(part, source) for part in source.all_input_nodes)

    for _, _, weight, own in groups:
        node = first_reader(own[0])
        if weight and is_matmul(node) and not quantized(node.all_input_nodes[0], node):
            name = f"pre_hooks.{names_of_nodes[node].replace('.', ':')}__0.0"
            places.add(Place(node.all_input_nodes[0], node))
            added.append(((name,), None, False, [Place(node.all_input_nodes[0], node)]))
    return added


def conv_branches(graph_module: fx.GraphModule, groups: Groups) -> set[str]:
    """Return, for each residual Add, the name of the quantized edge that leads from a convolution directly to the Add.

    If both inputs of the Add come directly from convolutions, only the edge of the convolution deeper in the graph is
    returned.
    """
    # A quantizer that several edges share stays, because the others need it.
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


def without_skips(groups: Groups) -> Groups:
    """Remove the quantizers from the inputs of residual Adds; other consumers of the same value keep theirs."""
    result: Groups = []
    for names, channels, weight, places in groups:
        kept: list[Place] = []
        for place in places:
            readers = [place.consumer] if place.consumer is not None else list(place.source.users)
            others = [reader for reader in readers if not is_add(reader)]
            kept += [place] if len(others) == len(readers) else [Place(place.source, reader) for reader in others]
        if kept:
            result.append((names, channels, weight, kept))
    return result


def constrain(
    graph_module: fx.GraphModule,
    example: Tensor,
    groups: Groups,
    config: QuantizationConfig,
    constraints: runtimes.Constraints,
) -> list[QuantizerSpec]:
    """Return the spec of each placed quantizer, with its code range and bit width.

    The graph decides whether codes are signed; the recipe and the targets' limits decide the bit width.
    """
    activation_at = {place: names[0] for names, _, weight, places in groups if not weight for place in places}
    matmuls = [node for node in graph_module.graph.nodes if is_matmul(node)]

    def edge_between(source: fx.Node, reader: fx.Node) -> str | None:
        for moved in through_movement(graph_module, source):
            for place in (Place(moved, reader), Place(moved, None)):
                if place in activation_at:
                    return activation_at[place]
            reader = moved
        if is_concat(reader):
            edges = {edge_between(part, reader) for part in reader.all_input_nodes}
            return edges.pop() if len(edges) == 1 else None
        return None

    def edge_into(node: fx.Node) -> str | None:
        return edge_between(node.all_input_nodes[0], node)

    def feeds_float(places: list[Place]) -> bool:
        sources = [place.source for place in places]
        return any(BEFORE_FLOAT in source.meta for source in sources) or any(
            is_unfused_activation(graph_module, user) for source in sources for user in source.users
        )

    last_input = edge_into(matmuls[-1]) if matmuls else None
    readers = [(names[0], first_reader(places[0])) for names, _, weight, places in groups if weight]
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
            bits = 8  # its consumers compute in float: fewer bits would only cost accuracy
        bits = overridden.get(names[0], bits)
        nonnegative = all(is_nonnegative(graph_module, place.source) for place in places)
        qmin, qmax = constraints.activation_codes(bits, nonnegative)
        specs[names[0]] = QuantizerSpec(names[0], names, "activation", bits, qmin, qmax, None, example.ndim)
    ordered = []
    for names, channels, weight, places in groups:
        if not weight:
            ordered.append(specs[names[0]])
            continue
        node = first_reader(places[0])
        weights = parameter(graph_module, places[0].source)
        bits = config.weights
        if node is matmuls[0]:
            bits = config.first_layer
        elif node is matmuls[-1]:
            bits = config.last_layer
        bits = overridden.get(names[0], bits)
        input_edge = edge_into(node)
        fed = specs.get(input_edge or "")
        # A transposed convolution has its output channels on axis 1, those of one group only: groups share a scale.
        axis, grouped = int(is_transposed(node)), convolution_groups(node) > 1
        channels = None if axis and grouped else channels
        depthwise = not axis and is_depthwise(weights.shape, convolution_groups(node))
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
                axis if channels is not None else 0,
            )
        )
    return ordered
