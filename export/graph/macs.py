"""Counts the multiply-accumulates of each layer and MatMul in an ONNX graph."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import onnx

from crqat.core.results.benchmark import FloatLayers
from crqat.export.graph.onnx_graph import LAYERS, Graph, shapes

COUNTED = (*LAYERS, "MatMul")


def macs(graph: Graph) -> dict[str, int]:
    """Return the multiply-accumulates for one image by node name, for a graph of the exporter.

    Raises:
        ValueError: A shape is unknown, which does not happen in graphs of the exporter.
    """
    sizes = shapes(graph) | {name: list(value.shape) for name, value in graph.constants.items()}
    counted = _count(graph.nodes, sizes)
    if counted is None:
        msg = "a shape is not known"
        raise ValueError(msg)
    return counted


def split_macs(graph: Graph) -> tuple[dict[str, int], FloatLayers]:
    """Split the multiply-accumulates of a graph into those of layers to run in INT8 and those of layers kept in float.

    Returns:
        Two results of `macs`: one for the layers to run in INT8, and one for the layers that the recipe keeps in float.
    """
    amounts = macs(graph)
    total, kept = sum(amounts.values()), dict.fromkeys(graph.float_layers.values(), 0)
    for node, name in graph.float_layers.items():
        kept[name] += amounts.pop(node)
    return amounts, FloatLayers(kept, sum(kept.values()) / total if total else 0.0)


def file_macs(model: onnx.ModelProto) -> dict[str, int] | None:
    """Count the multiply-accumulates for one image in any ONNX file.

    Returns:
        The counts by node, under the name that TensorRT gives it; None if a size is unknown, e.g. because the file has
        dynamic dimensions other than the batch.
    """
    single, batch = onnx.ModelProto(), 1
    single.CopyFrom(model)
    constants = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    for value in single.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name in constants or not dims:
            continue
        if dims[0].dim_value:
            batch = dims[0].dim_value  # shapes inside the file may be fixed to it
        else:
            dims[0].dim_value = 1
    del single.graph.value_info[:]  # may contain the batch size, too
    inferred = onnx.shape_inference.infer_shapes(single, data_prop=True).graph
    sizes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    counted = _count(model.graph.node, sizes | constants)
    return None if counted is None else {name: amount // batch for name, amount in counted.items()}


def _count(nodes: Iterable[onnx.NodeProto], sizes: Mapping[str, Sequence[int]]) -> dict[str, int] | None:
    """Return the count for each node; None if a size of any node is unknown."""
    result = {}
    for node in nodes:
        if node.op_type not in COUNTED or len(node.input) < 2:
            continue
        output, weight = sizes.get(node.output[0], []), sizes.get(node.input[1], [])
        if len(output) < 2 or len(weight) < 2 or 0 in output or 0 in weight:
            return None
        if node.op_type == "ConvTranspose":  # each input element is multiplied with each weight of its channel
            given = sizes.get(node.input[0], [])
            if len(given) < 2 or 0 in given:
                return None
            result[node.name or f"node_of_{node.output[0]}"] = math.prod(given) * math.prod(weight[1:])
            continue
        transposed = node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)
        # Each element of the output takes one multiplication per weight of its channel.
        terms = math.prod(weight[1:]) if node.op_type == "Conv" or transposed else weight[-2]
        result[node.name or f"node_of_{node.output[0]}"] = math.prod(output) * terms
    return result
