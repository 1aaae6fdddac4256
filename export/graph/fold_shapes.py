"""Shapes that a forward pass computes, as constants: runtimes and the passes behind read sizes, not arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from crqat.export.graph.onnx_graph import OPSET, Graph, build_model, without_markers


def flatten_views(graph: Graph) -> None:
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


def fold_shapes(graph: Graph) -> None:
    """Sizes that a forward pass computes from a tensor's shape become constants, as far as the batch is not in them.

    They are computed for two batch sizes; what is the same in both is constant. A Reshape one dimension of which
    follows the batch gets -1 there, an Expand to the batch gets the input's.
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
        model = build_model(without_markers(graph), graph.constants, graph, {}, OPSET, batch)
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
