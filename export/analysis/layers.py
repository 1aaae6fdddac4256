"""Summarizes each layer: bit widths, quantization error and share of the multiply-accumulates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from onnx import NodeProto

from crqat.core.results.export import LayerSummary
from crqat.export.graph.data_movement import ON_CODES
from crqat.export.graph.macs import macs
from crqat.export.graph.onnx_graph import Graph, shapes
from crqat.train.placement.quantizer_spec import QuantizerSpec

_MOVEMENT = {*ON_CODES, "Concat"}


def layer_summaries(
    graph: Graph, specs: Sequence[QuantizerSpec], noise: Mapping[str, float | None]
) -> list[LayerSummary]:
    """Return a row for each Conv, ConvTranspose, Gemm and MatMul, in the order of computation.

    Args:
        graph: Float graph that the exporter made from the network.
        specs: Specs of the network's quantizers.
        noise: SQNR of each quantizer from `crqat.export.analysis.sqnr.quantizer_noise`.
    """
    amounts, producers = macs(graph), graph.producers()
    sizes = shapes(graph) | {name: list(value.shape) for name, value in graph.constants.items()}
    by_edge = {hook: spec for spec in specs for hook in (spec.edge, *spec.hooks)}

    def quantizer(name: str) -> QuantizerSpec | None:
        source = producers.get(name)
        while source is not None and source.op_type in _MOVEMENT:
            source = producers.get(source.input[0])
        if source is None or source.op_type != "Edge":
            return None
        return by_edge.get(source.attribute[0].s.decode())

    def row(node: NodeProto) -> LayerSummary:
        first, second = quantizer(node.input[0]), quantizer(node.input[1])
        outputs = math.prod(sizes[node.output[0]])
        return LayerSummary(
            layer=node.name,
            operation=node.op_type,
            macs=amounts[node.name],
            products=max(1, round(amounts[node.name] / outputs)),
            weight_bits=None if second is None else second.bits,
            input_bits=None if first is None else first.bits,
            weight_snr=None if second is None else noise.get(second.edge),
            input_snr=None if first is None else noise.get(first.edge),
            reason="kept in float by quantization.float_layers" if node.name in graph.float_layers else "",
        )

    return [row(node) for node in graph.nodes if node.name in amounts]
