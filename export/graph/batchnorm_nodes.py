"""Folds BatchNorm into the convolutions of an ONNX graph, using `crqat.train.graph.fold_batchnorm`."""

from __future__ import annotations

import numpy as np

from crqat.export.graph.onnx_graph import Graph
from crqat.train.graph.fold_batchnorm import folded_bias, folded_weight, multiplier


def fold_batchnorm(graph: Graph) -> None:
    """Replace Conv -> BatchNormalization by a Conv with scaled weights and a bias; store factors in `Graph.fold`."""
    producers, consumers = graph.producers(), graph.consumers()
    kept = []
    for node in graph.nodes:
        conv = producers.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        if conv is None or conv.op_type != "Conv" or len(consumers[conv.output[0]]) != 1:
            kept.append(node)
            continue
        gamma, beta, mean, variance = (graph.constants[name].astype(np.float32) for name in node.input[1:5])
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        factor = multiplier(gamma, np.sqrt(variance + np.float32(epsilon)))
        bias = graph.constants[conv.input[2]] if len(conv.input) > 2 else np.zeros_like(mean)
        marker = producers.get(conv.input[1])
        weight = graph.constants[conv.input[1] if marker is None else marker.input[0]]
        # Named after the output: the exporter stores equal weights once, and each convolution that uses them has its
        # own BN.
        weight_name, bias_name = f"{node.output[0]}.folded_weight", f"{node.output[0]}.folded_bias"
        graph.constants[weight_name] = folded_weight(weight, factor)
        graph.constants[bias_name] = folded_bias(bias, beta, mean, factor)
        if marker is None:
            conv.input[1] = weight_name
        else:
            marker.input[0] = weight_name
            graph.fold[marker.attribute[0].s.decode()] = factor
        del conv.input[2:]
        conv.input.append(bias_name)
        conv.output[0] = node.output[0]
    graph.nodes[:] = kept
