"""Linear layers of more than two dimensions and attention, in the form that runtimes compute in integers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper

from crqat.export.graph.onnx_graph import Graph

Shapes = Mapping[str, list[int]]


def linears_as_gemm(graph: Graph, one: Shapes, two: Shapes) -> None:
    """A linear layer that was exported as MatMul with a transposed weight, and its bias as an Add, becomes a Gemm.

    As Gemm it is one that fuses, with its bias inside. A tensor of more than two dimensions is reshaped around it; a
    quantizer behind moves in front of the second Reshape, which then moves codes.

    Args:
        graph: Changed in place.
        one: Tensor name to shape, for a batch of one.
        two: For a batch of two: what differs is the batch.
    """
    producers, consumers = graph.producers(), graph.consumers()
    replaced: dict[int, list[onnx.NodeProto]] = {}
    for node in graph.nodes:
        transpose = producers.get(node.input[1]) if node.op_type == "MatMul" else None
        marker = producers.get(transpose.input[0]) if transpose is not None else None
        if transpose is None or transpose.op_type != "Transpose" or marker is None or marker.op_type != "Edge":
            continue
        shape, features = one[node.output[0]], one[node.input[0]][-1]
        bias, last = _bias(graph, node, consumers)
        readers = consumers.get(last.output[0], [])
        batch = [axis for axis, (a, b) in enumerate(zip(shape, two[node.output[0]], strict=True)) if a != b]
        if len(shape) == 2:
            made = [helper.make_node("Gemm", [node.input[0], marker.output[0], bias], last.output, transB=1)]
        elif len(batch) == 1:
            name = last.output[0]
            graph.constants[f"{name}.rows"] = np.array([-1, features], np.int64)
            graph.constants[f"{name}.shape"] = np.array(
                [-1 if axis in batch else size for axis, size in enumerate(shape)], np.int64
            )
            rows, flat, quantized = f"{name}.flat_input", f"{name}.flat", f"{name}.flat_quantized"
            made = [
                helper.make_node("Reshape", [node.input[0], f"{name}.rows"], [rows]),
                helper.make_node("Gemm", [rows, marker.output[0], bias], [flat], transB=1),
            ]
            if len(readers) == 1 and readers[0].op_type == "Edge":
                edge = onnx.NodeProto()
                edge.CopyFrom(readers[0])
                edge.input[0], edge.output[0] = flat, quantized
                made += [edge, helper.make_node("Reshape", [quantized, f"{name}.shape"], readers[0].output)]
                replaced[id(readers[0])] = []
            else:
                made.append(helper.make_node("Reshape", [flat, f"{name}.shape"], [name]))
        else:
            continue
        replaced[id(node)] = []
        replaced[id(last)] = made
    graph.nodes[:] = [new for node in graph.nodes for new in replaced.get(id(node), [node])]


def _bias(
    graph: Graph, node: onnx.NodeProto, consumers: Mapping[str, list[onnx.NodeProto]]
) -> tuple[str, onnx.NodeProto]:
    """The bias of a MatMul, zeros if it has none; and the last of its nodes."""
    readers = consumers.get(node.output[0], [])
    transposed = graph.producers()[node.input[1]]
    channels = graph.constants[graph.producers()[transposed.input[0]].input[0]].shape[0]
    if len(readers) == 1 and readers[0].op_type == "Add":
        (other,) = [name for name in readers[0].input if name != node.output[0]] or [""]
        if other in graph.constants and graph.constants[other].shape == (channels,):
            return other, readers[0]
    zeros = f"{node.output[0]}.bias"
    graph.constants[zeros] = np.zeros(channels, np.float32)
    return zeros, node


def scale_behind_product(graph: Graph) -> None:
    """Attention multiplies queries and keys by a constant each: the product of both is applied to their product.

    A multiplication between a quantizer and MatMul would keep the MatMul in float.
    """
    producers, consumers = graph.producers(), graph.consumers()
    nodes = []
    for node in graph.nodes:
        scaled = [producers.get(name) for name in node.input] if node.op_type == "MatMul" else []
        factors = [_factor(graph, mul) for mul in scaled if mul is not None and len(consumers[mul.output[0]]) == 1]
        if len(factors) != 2 or any(factor is None for factor in factors):
            nodes.append(node)
            continue
        (a, first), (b, second) = (factor for factor in factors if factor is not None)
        product, constant = f"{node.output[0]}.unscaled", f"{node.output[0]}.scale"
        graph.constants[constant] = np.asarray(first * second, np.float32)
        nodes.append(helper.make_node("MatMul", [a, b], [product]))
        nodes.append(helper.make_node("Mul", [product, constant], node.output))
    graph.nodes[:] = nodes
    graph.drop_unused()


def _factor(graph: Graph, node: onnx.NodeProto) -> tuple[str, float] | None:
    """The tensor and the number that a Mul multiplies it by."""
    if node.op_type != "Mul":
        return None
    for tensor, constant in (node.input, reversed(node.input)):
        if constant in graph.constants and graph.constants[constant].size == 1 and tensor not in graph.constants:
            return tensor, float(graph.constants[constant].reshape(()))
    return None
