"""Exports the float network to ONNX, with markers on quantized edges, BN folded, and nodes named after their layers.

`operators` converts the graph that was trained, one operation at a time. Markers in the graph, not names to be matched,
show where Q/DQ nodes belong. torch's own exporters are not used, because they refuse fake quantization with a narrow
range or few bits.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import onnx
from onnx import helper
from torch import fx

from crqat.export.graph.batchnorm_nodes import fold_batchnorm
from crqat.export.graph.onnx_graph import LAYERS, Graph
from crqat.export.graph.operators import Walk
from crqat.export.graph.record import Marker, Program
from crqat.train.placement.quantizer_spec import operation_of
from crqat.train.placement.target_rules import FLOAT_LAYER
from crqat.train.quantizers import specs_of


def marked_graph(model: fx.GraphModule, input_shape: Sequence[int], classes: int) -> Graph:
    """Export the network with its quantizers replaced by markers, and fold BN into the convolutions.

    Args:
        model: Quantized GraphModule on the CPU in eval mode. It is not changed.
        input_shape: [C, H, W].
        classes: Number of logits.

    Returns:
        The float graph with a `crqat.Edge` node, attribute `edge`, on every quantized edge.

    Raises:
        UsageError: ONNX cannot express an operation; the message names module and line.
    """
    model = copy.deepcopy(model).eval()
    for spec in specs_of(model):
        model.get_submodule("quantizers").add_module(spec.module_name, Marker(spec.edge))
    _mark_float_layers(model)
    walk = Walk(Program(model, list(input_shape)))
    walk.run()
    graph = Graph(walk.nodes, walk.constants, {}, list(input_shape), classes)
    graph.drop_unused()
    _pool_means(graph)
    fold_batchnorm(graph)
    _name_operations(graph)
    _take_float_markers(graph)
    return graph


def _mark_float_layers(model: fx.GraphModule) -> None:
    """Mark the weights of layers that the recipe keeps in float, so that their nodes are found and named, too."""
    layers = [node for node in model.graph.nodes if FLOAT_LAYER in node.meta]
    for index, node in enumerate(layers):
        weight = node.args[1]
        model.add_module(f"{FLOAT_LAYER}_{index}", Marker(f"{FLOAT_LAYER}.{node.meta[FLOAT_LAYER]}__1.0"))
        with model.graph.inserting_after(weight):
            marked = model.graph.call_module(f"{FLOAT_LAYER}_{index}", (weight,))
        node.replace_input_with(weight, marked)
    if layers:
        model.recompile()


def _take_float_markers(graph: Graph) -> None:
    """Remove the markers of `_mark_float_layers`, and record the nodes that they marked."""
    for node in graph.nodes:
        edge = _weight_edge(graph, node) if node.op_type in {*LAYERS, "MatMul"} else None
        if edge is not None and edge.startswith(f"{FLOAT_LAYER}."):
            graph.float_layers[node.name] = operation_of(edge)
            graph.fold.pop(edge, None)
            node.input[1] = graph.producers()[node.input[1]].input[0]
    graph.drop_unused()


def _pool_means(graph: Graph) -> None:
    """Convert means over the pixels to GlobalAveragePool, which runtimes fuse and which is the same in every opset.

    A mean without keepdims also needs a Flatten. Its quantizer is placed before the Flatten, because ONNX Runtime would
    not fuse the quantizer with the pool if the Flatten stood between them.
    """
    consumers, nodes = graph.consumers(), []
    behind: dict[str, onnx.NodeProto] = {}
    for node in graph.nodes:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type != "ReduceMean" or sorted(attributes.get("axes", [])) not in ([2, 3], [-2, -1]):
            nodes.append(node)
            if node.output[0] in behind:
                nodes.append(behind[node.output[0]])
            continue
        readers = consumers.get(node.output[0], [])
        pooled = f"{node.output[0]}.pooled"
        if attributes.get("keepdims", 1):
            nodes.append(helper.make_node("GlobalAveragePool", node.input, node.output))
        elif [reader.op_type for reader in readers] == ["Edge"]:
            quantized, edge = f"{readers[0].output[0]}.pooled", readers[0]
            behind[quantized] = helper.make_node("Flatten", [quantized], edge.output)
            edge.input[0], edge.output[0] = pooled, quantized
            nodes.append(helper.make_node("GlobalAveragePool", node.input, [pooled]))
        else:
            nodes.append(helper.make_node("GlobalAveragePool", node.input, [pooled]))
            nodes.append(helper.make_node("Flatten", [pooled], node.output))
    graph.nodes[:] = nodes


def _weight_edge(graph: Graph, node: onnx.NodeProto) -> str | None:
    """Return the edge name of the quantized weight of a Conv or Gemm."""
    marker = graph.producers().get(node.input[1])
    return None if marker is None or marker.op_type != "Edge" else marker.attribute[0].s.decode()


def _name_operations(graph: Graph) -> None:
    """Name each node with a weight after its layer; all other nodes keep a unique name of their own."""
    for index, node in enumerate(graph.nodes):
        edge = _weight_edge(graph, node) if node.op_type in {*LAYERS, "MatMul"} else None
        node.name = edge.split(".", 1)[1].rsplit("/", 2)[0] if edge else f"{node.op_type}_{index}"
        if edge and any(other.name == node.name for other in graph.nodes[:index]):
            node.name = f"{node.name}_{index}"
