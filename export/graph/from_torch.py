"""The float network as ONNX, with a marker on every quantized edge, BN folded, and operations named by their layers.

torch's exporters refuse narrow and low-bit fake quantization, so the float graph is exported and the markers say, by
construction and not by matching names, where Q/DQ nodes belong.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import onnx
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, fx, nn

from crqat.core.errors import UsageError
from crqat.export.graph.fold_batchnorm import fold_batchnorm
from crqat.export.graph.fold_shapes import flatten_views, fold_shapes
from crqat.export.graph.linear_to_gemm import linears_as_gemm, scale_behind_product
from crqat.export.graph.onnx_graph import OPSET, Graph, shapes
from crqat.train.placement.insert import FLOAT_LAYER, operation_of
from crqat.train.quantizers import specs_of

DOMAIN = "crqat"


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, edge: str) -> Tensor:
        return x.clone()

    @staticmethod
    def symbolic(g: Any, x: Any, edge: str) -> Any:
        return g.op(f"{DOMAIN}::Edge", x, edge_s=edge).setType(x.type())


class _Marker(nn.Module):
    def __init__(self, edge: str) -> None:
        super().__init__()
        self.edge = edge

    def forward(self, x: Tensor) -> Tensor:
        return _Mark.apply(x, self.edge)  # type: ignore[no-any-return]


def marked_graph(model: fx.GraphModule, input_shape: Sequence[int], classes: int) -> Graph:
    """Export the network with its quantizers turned into markers, and fold BN into the convolutions.

    Args:
        model: Quantized GraphModule on the CPU in eval mode; it is not changed.
        input_shape: [C, H, W].
        classes: Width of the logits.

    Returns:
        The float graph with a `crqat.Edge` node, attribute `edge`, on every quantized edge.
    """
    model = copy.deepcopy(model).eval()
    for spec in specs_of(model):
        model.get_submodule("quantizers").add_module(spec.module_name, _Marker(spec.edge))
    _mark_float_layers(model)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The TorchScript exporter is deprecated and works; the other one has no hook for unknown operations without
        # further packages. Its tracer warnings speak of shapes that are constant here.
        warnings.simplefilter("ignore")
        _export(
            model,
            (torch.zeros(2, *input_shape),),
            buffer,
            dynamo=False,
            opset_version=OPSET,
            input_names=["input"],
            output_names=["logits"],
            dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
            do_constant_folding=True,
            custom_opsets={DOMAIN: 1},
        )
    graph = _take_apart(onnx.load_from_string(buffer.getvalue()), list(input_shape), classes)
    flatten_views(graph)
    fold_shapes(graph)
    if any(node.op_type == "MatMul" for node in graph.nodes):
        linears_as_gemm(graph, shapes(graph), shapes(graph, 2))
        scale_behind_product(graph)
        graph.drop_unused()
    _pool_means(graph)
    fold_batchnorm(graph)
    _name_operations(graph)
    _take_float_markers(graph)
    return graph


def _mark_float_layers(model: fx.GraphModule) -> None:
    """Markers on the weights of layers that the recipe keeps in float, so that their nodes are found and named, too."""
    layers = [node for node in model.graph.nodes if FLOAT_LAYER in node.meta]
    for index, node in enumerate(layers):
        weight = node.args[1]
        model.add_module(f"{FLOAT_LAYER}_{index}", _Marker(f"{FLOAT_LAYER}.{node.meta[FLOAT_LAYER]}__1.0"))
        with model.graph.inserting_after(weight):
            marked = model.graph.call_module(f"{FLOAT_LAYER}_{index}", (weight,))
        node.replace_input_with(weight, marked)
    if layers:
        model.recompile()


def _take_float_markers(graph: Graph) -> None:
    """Remove what `_mark_float_layers` put there, and remember which nodes it was about."""
    for node in graph.nodes:
        edge = _weight_edge(graph, node) if node.op_type in {"Conv", "Gemm", "MatMul"} else None
        if edge is not None and edge.startswith(f"{FLOAT_LAYER}."):
            graph.float_layers[node.name] = operation_of(edge)
            graph.fold.pop(edge, None)
            node.input[1] = graph.producers()[node.input[1]].input[0]
    graph.drop_unused()


@contextlib.contextmanager
def _no_output() -> Iterator[None]:
    """Nothing on stdout: the exporter's C++ part prints the whole graph before it raises."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _export(*arguments: Any, **options: Any) -> None:
    try:
        with _no_output():
            torch.onnx.export(*arguments, **options)
    except torch.onnx.errors.OnnxExporterError as error:
        reason = " ".join(re.split(r"Please |\[Caused", str(error))[0].split())
        msg = f"model.name: torch's ONNX exporter cannot write the network: {reason} Replace that operation"
        raise UsageError(msg) from error


def _take_apart(model: onnx.ModelProto, input_shape: list[int], classes: int) -> Graph:
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    alias: dict[str, str] = {}
    nodes = []
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = alias.get(name, name)
        if node.op_type == "Constant":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        elif node.op_type in {"Identity", "Dropout"}:
            alias[node.output[0]] = node.input[0]
        elif node.input and node.domain == "" and all(name in constants for name in node.input if name):
            # The exporter computes what a Pad needs by a chain of operations on constants.
            feeds = {name: constants[name] for name in node.input if name}
            constants.update(zip(node.output, cast(list[Any], ReferenceEvaluator(node).run(None, feeds)), strict=True))
        else:
            nodes.append(node)
    return Graph(nodes, constants, {}, input_shape, classes)


def _pool_means(graph: Graph) -> None:
    """A mean over the pixels becomes GlobalAveragePool, which runtimes fuse and which is the same in every opset.

    Its quantizer comes before the Flatten that drops the two dimensions: ONNX Runtime would not fuse it behind that.
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
    """The edge name of a Conv or Gemm's quantized weight."""
    marker = graph.producers().get(node.input[1])
    return None if marker is None or marker.op_type != "Edge" else marker.attribute[0].s.decode()


def _name_operations(graph: Graph) -> None:
    """Give each Conv and Gemm the name of its layer; everything else keeps a unique name of its own."""
    for index, node in enumerate(graph.nodes):
        edge = _weight_edge(graph, node) if node.op_type in {"Conv", "Gemm", "MatMul"} else None
        node.name = edge.split(".", 1)[1].rsplit("/", 2)[0] if edge else f"{node.op_type}_{index}"
        if edge and any(other.name == node.name for other in graph.nodes[:index]):
            node.name = f"{node.name}_{index}"
