"""The float network as ONNX, with a marker on every quantized edge, BN folded, and operations named by their layers.

torch's exporters refuse narrow and low-bit fake quantization, so the float graph is exported and the markers say, by
construction and not by matching names, where Q/DQ nodes belong.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, fx, nn

from artifacts.errors import UsageError
from crqat_train.layout import QuantizerSpec
from export.linears import linears_as_gemm, scale_behind_product

OPSET = 17
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


@dataclass
class Graph:
    """An ONNX graph taken apart, so that passes edit plain lists and dictionaries.

    Attributes:
        nodes: In topological order.
        constants: Name to array: initializers and folded Constant nodes.
        fold: For each weight edge, what BN folding multiplied each output channel by, float32 of shape [C].
        input_shape: [C, H, W].
        classes: Width of the logits.
    """

    nodes: list[onnx.NodeProto]
    constants: dict[str, npt.NDArray[Any]]
    fold: dict[str, npt.NDArray[np.float32]]
    input_shape: list[int]
    classes: int

    def producers(self) -> dict[str, onnx.NodeProto]:
        """Tensor name -> the node that writes it."""
        return {output: node for node in self.nodes for output in node.output}

    def consumers(self) -> dict[str, list[onnx.NodeProto]]:
        """Tensor name -> the nodes that read it, in order."""
        result: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                result.setdefault(name, []).append(node)
        return result

    def drop_unused(self) -> None:
        """Remove nodes whose outputs nothing reads."""
        used = {name for node in self.nodes for name in node.input} | {"logits"}
        while any(not used.intersection(node.output) for node in self.nodes):
            self.nodes[:] = [node for node in self.nodes if used.intersection(node.output)]
            used = {name for node in self.nodes for name in node.input} | {"logits"}


def marked_graph(
    model: fx.GraphModule, specs: Sequence[QuantizerSpec], input_shape: Sequence[int], classes: int
) -> Graph:
    """Export the network with its quantizers turned into markers, and fold BN into the convolutions.

    Args:
        model: Quantized GraphModule on the CPU in eval mode; it is not changed.
        specs: Its quantizers.
        input_shape: [C, H, W].
        classes: Width of the logits.

    Returns:
        The float graph with a `crqat.Edge` node, attribute `edge`, on every quantized edge.

    Raises:
        UsageError: ONNX has no operation for one of the network's.
    """
    model = copy.deepcopy(model).eval()
    for spec in specs:
        model.get_submodule("quantizers").add_module(spec.module_name, _Marker(spec.edge))
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The TorchScript exporter is deprecated and works; the other one has no hook for unknown operations without
        # further packages. Its tracer warnings speak of shapes that are constant here.
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                model,
                (torch.zeros(2, *input_shape),),
                buffer,  # type: ignore[arg-type]
                dynamo=False,
                opset_version=OPSET,
                input_names=["input"],
                output_names=["logits"],
                dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
                do_constant_folding=True,
                custom_opsets={DOMAIN: 1},
            )
        except (torch.onnx.errors.OnnxExporterError, ValueError) as error:
            # What it says goes on for many lines; the first names the operation.
            first = " ".join(str(error).split("  [Caused", 1)[0].split("Please feel free", 1)[0].split())
            size = "x".join(map(str, input_shape[1:]))
            msg = (
                f"model.name: the network cannot be written as ONNX for images of {size} pixels: {first}; "
                "change that operation, or the images' size"
            )
            raise UsageError(msg) from error
    graph = _take_apart(onnx.load_from_string(buffer.getvalue()), list(input_shape), classes)
    _flatten_views(graph)
    _fold_shapes(graph)
    if any(node.op_type == "MatMul" for node in graph.nodes):
        linears_as_gemm(graph, _shapes(graph), _shapes(graph, 2))
        scale_behind_product(graph)
        graph.drop_unused()
    _pool_means(graph)
    _fold_bn(graph)
    _name_operations(graph)
    return graph


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


def _flatten_views(graph: Graph) -> None:
    """`x.view(x.size(0), -1)` computes its shape from the batch; Flatten does the same with nothing to compute."""
    producers = graph.producers()

    def is_batch(name: str) -> bool:
        """Shape -> Gather of element 0 -> Unsqueeze, of whatever tensor: they all have the same batch."""
        chain = ("Unsqueeze", "Gather", "Shape")
        for op_type in chain:
            node = producers.get(name)
            if node is None or node.op_type != op_type:
                return False
            if op_type == "Gather" and graph.constants.get(node.input[1], np.ones(1)).any():
                return False
            name = node.input[0]
        return True

    flattened = []
    for node in graph.nodes:
        shape = producers.get(node.input[1]) if node.op_type == "Reshape" else None
        if shape is None or shape.op_type != "Concat" or len(shape.input) != 2 or not is_batch(shape.input[0]):
            continue
        if (graph.constants.get(shape.input[1], np.zeros(1)) == -1).all():
            flattened.append((node, helper.make_node("Flatten", node.input[:1], node.output)))
    for node, flatten in flattened:
        graph.nodes[graph.nodes.index(node)] = flatten
    graph.drop_unused()


def _fold_shapes(graph: Graph) -> None:
    """Sizes that a forward pass computes from a tensor's shape become constants, as far as the batch is not in them.

    They are computed for two batch sizes; what is the same in both is constant. A Reshape one dimension of which
    follows the batch gets -1 there, an Expand to the batch is told the input's.
    """
    computed: list[str] = []
    for node in graph.nodes:
        known = all(name in computed or name in graph.constants for name in node.input if name)
        if node.op_type == "Shape" or (known and node.domain == "" and node.op_type != "Edge"):
            computed += node.output
    if not computed:
        return
    reshapes = [node for node in graph.nodes if node.op_type == "Reshape" and node.input[1] in computed]
    reshaped = [node.output[0] for node in reshapes if node.output[0] not in computed]
    import onnxruntime

    values: list[list[npt.NDArray[Any]]] = []
    for batch in (2, 3):
        model = build_model(_without_markers(graph), graph.constants, graph, {}, OPSET, batch)
        del model.graph.output[:]
        model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in (*computed, *reshaped))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        values.append(session.run(None, {"input": np.zeros((batch, *graph.input_shape), np.float32)}))
    sizes = {name: (small, large) for name, small, large in zip([*computed, *reshaped], *values, strict=True)}
    for name in computed:
        small, large = sizes[name]
        if np.array_equal(small, large):
            graph.constants[name] = small
    batch_nodes: list[onnx.NodeProto] = []
    for index, node in enumerate(graph.nodes):
        shaped = node.op_type in {"Reshape", "Expand"} and node.input[1] in sizes
        if not shaped or node.input[1] in graph.constants:
            continue
        small, large = sizes[node.input[1]]
        if node.op_type == "Reshape":  # where a size is -1, the result tells it
            small, large = (np.array(sizes[node.output[0]][n].shape, np.int64) for n in (0, 1))
        follows, shape = small != large, f"{node.output[0]}.shape"
        if follows.sum() != 1 or not (small > 0).all():
            continue
        if node.op_type == "Reshape":
            graph.constants[shape] = np.where(follows, -1, small).astype(np.int64)
            graph.nodes[index] = helper.make_node("Reshape", [node.input[0], shape], node.output)
        elif follows[0]:
            graph.constants[f"{shape}.rest"] = small[1:].astype(np.int64)
            batch_nodes += [
                helper.make_node("Shape", ["input"], [f"{shape}.batch"], start=0, end=1),
                helper.make_node("Concat", [f"{shape}.batch", f"{shape}.rest"], [shape], axis=0),
            ]
            graph.nodes[index] = helper.make_node("Expand", [node.input[0], shape], node.output)
    graph.nodes[:] = [node for node in graph.nodes if not all(name in graph.constants for name in node.output)]
    graph.nodes[:0] = batch_nodes
    graph.drop_unused()


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


def _fold_bn(graph: Graph) -> None:
    """Conv -> BatchNormalization becomes Conv with scaled weights and a bias; the factor is kept for the Grids.

    y = gamma (conv(x, w) + b - mean) / sigma + beta = conv(x, m w) + beta + (b - mean) m, with m = gamma / sigma.
    """
    producers, consumers = graph.producers(), graph.consumers()
    kept = []
    for node in graph.nodes:
        conv = producers.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        if conv is None or conv.op_type != "Conv" or len(consumers[conv.output[0]]) != 1:
            kept.append(node)
            continue
        gamma, beta, mean, variance = (graph.constants[name].astype(np.float32) for name in node.input[1:5])
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        multiplier = (gamma / np.sqrt(variance + np.float32(epsilon))).astype(np.float32)
        bias = graph.constants[conv.input[2]] if len(conv.input) > 2 else np.zeros_like(mean)
        marker = producers.get(conv.input[1])
        weight_name = conv.input[1] if marker is None else marker.input[0]
        weight = graph.constants[weight_name]
        # Named by the output: the exporter stores equal weights once, and each of their convolutions has its own BN.
        folded_weight, folded_bias = f"{node.output[0]}.folded_weight", f"{node.output[0]}.folded_bias"
        graph.constants[folded_weight] = weight * multiplier.reshape(-1, *[1] * (weight.ndim - 1))
        graph.constants[folded_bias] = (beta + (bias - mean) * multiplier).astype(np.float32)
        if marker is None:
            conv.input[1] = folded_weight
        else:
            marker.input[0] = folded_weight
            graph.fold[marker.attribute[0].s.decode()] = multiplier
        del conv.input[2:]
        conv.input.append(folded_bias)
        conv.output[0] = node.output[0]
    graph.nodes[:] = kept


def _name_operations(graph: Graph) -> None:
    """Give each Conv and Gemm the name of its layer; everything else keeps a unique name of its own."""
    for index, node in enumerate(graph.nodes):
        edge = _weight_edge(graph, node) if node.op_type in {"Conv", "Gemm", "MatMul"} else None
        node.name = edge.split(".", 1)[1].rsplit("/", 2)[0] if edge else f"{node.op_type}_{index}"
        if edge and any(other.name == node.name for other in graph.nodes[:index]):
            node.name = f"{node.name}_{index}"


def macs(graph: Graph) -> dict[str, int]:
    """Multiply-accumulates of each Conv, Gemm and MatMul for one image, by node name, from ONNX shape inference."""
    shapes = _shapes(graph)
    result = {}
    for node in graph.nodes:
        if node.op_type == "MatMul":
            result[node.name] = int(np.prod(shapes[node.output[0]])) * _size(graph, shapes, node.input[0])[-1]
        if node.op_type not in {"Conv", "Gemm"}:
            continue
        producer = graph.producers().get(node.input[1])
        weight = graph.constants[node.input[1] if producer is None else producer.input[0]]
        # Each element of the output takes one multiplication per weight of its channel. A sequence's rows are images'.
        result[node.name] = int(np.prod(shapes[node.output[0]])) * int(weight.size // weight.shape[0])
    return result


def _size(graph: Graph, shapes: dict[str, list[int]], name: str) -> list[int]:
    return list(graph.constants[name].shape) if name in graph.constants else shapes[name]


def _without_markers(graph: Graph) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Identity", node.input, node.output) if node.op_type == "Edge" else node
        for node in graph.nodes
    ]


def _shapes(graph: Graph, batch: int = 1) -> dict[str, list[int]]:
    model = build_model(_without_markers(graph), graph.constants, graph, {}, OPSET, batch)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    values = [*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output]
    return {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in values}


def build_model(
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, npt.NDArray[Any]],
    graph: Graph,
    metadata: dict[str, str],
    opset: int,
    batch: int | str = "batch",
) -> onnx.ModelProto:
    """A checked ONNX model with input "input" float32 [batch, C, H, W] and output "logits" float32 [batch, classes].

    Constants that no node reads are left out.
    """
    used = {name for node in nodes for name in node.input}
    model = helper.make_model(
        helper.make_graph(
            list(nodes),
            "crqat",
            [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, [batch, *graph.input_shape])],
            [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [batch, graph.classes])],
            [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items() if name in used],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8 if opset < 19 else 10,
        producer_name="crqat-edge",
    )
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    return model
