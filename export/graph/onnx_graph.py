"""Represents ONNX graphs as plain lists and dictionaries, infers their shapes, and converts them back to models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

# Operations with a weight that may be quantized.
LAYERS = ("Conv", "ConvTranspose", "Gemm")
OPSET = 17


@dataclass
class Graph:
    """An ONNX graph as plain lists and dictionaries, which passes can edit.

    Attributes:
        nodes: In topological order.
        constants: Arrays by name: initializers and folded Constant nodes.
        fold: For each weight edge, the BN multiplier of each output channel, float32 of shape [C].
        input_shape: [C, H, W].
        classes: Number of logits.
        float_layers: Layer name of each node that the recipe keeps in float, by node name.
    """

    nodes: list[onnx.NodeProto]
    constants: dict[str, npt.NDArray[Any]]
    fold: dict[str, npt.NDArray[np.float32]]
    input_shape: list[int]
    classes: int
    float_layers: dict[str, str] = field(default_factory=dict)

    def producers(self) -> dict[str, onnx.NodeProto]:
        """Return the node that computes each tensor, by tensor name."""
        return {output: node for node in self.nodes for output in node.output}

    def consumers(self) -> dict[str, list[onnx.NodeProto]]:
        """Return the nodes that use each tensor, in order, by tensor name."""
        result: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                result.setdefault(name, []).append(node)
        return result

    def drop_unused(self) -> None:
        """Remove nodes whose outputs are not used."""
        used = {name for node in self.nodes for name in node.input} | {"logits"}
        while any(not used.intersection(node.output) for node in self.nodes):
            self.nodes[:] = [node for node in self.nodes if used.intersection(node.output)]
            used = {name for node in self.nodes for name in node.input} | {"logits"}


def build_model(
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, npt.NDArray[Any]],
    graph: Graph,
    metadata: dict[str, str],
    opset: int,
    batch: int | str = "batch",
) -> onnx.ModelProto:
    """Build a checked ONNX model: input "input" float32 [batch, C, H, W], output "logits" float32 [batch, classes].

    Constants that no node uses are left out.
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


def without_markers(graph: Graph) -> list[onnx.NodeProto]:
    """Return the nodes with an Identity in place of each marker (`crqat.Edge`), which other tools do not know."""
    return [
        helper.make_node("Identity", node.input, node.output) if node.op_type == "Edge" else node
        for node in graph.nodes
    ]


def shapes(graph: Graph, batch: int = 1) -> dict[str, list[int]]:
    """Return the shape of each tensor by name for `batch` images, from ONNX shape inference."""
    model = build_model(without_markers(graph), graph.constants, graph, {}, OPSET, batch)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    values = [*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output]
    return {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in values}
