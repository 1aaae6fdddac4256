"""Finds the smallest part of an ONNX file that a builder refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx
from onnx import TensorProto, helper

# Returns a builder's error message for a part that it refuses, None for one that it accepts.
Refusal = Callable[[onnx.ModelProto], str | None]


def smallest_cut(model: onnx.ModelProto, refused: Refusal) -> onnx.ModelProto:
    """Return the smallest part found that fails with the same error message as the whole file.

    First, the shortest failing beginning of the file is found, which ends with the node at fault. Then as many nodes as
    possible are removed from the start of this beginning. Both steps use bisection, which assumes that a part fails
    whenever it contains a failing part.

    Args:
        model: A file that the builder refuses.
        refused: Tries to build a part, and returns the builder's error message or None; it is called about
            2 log2(nodes) times.
    """
    parts = _Parts(model)
    rule = refused(model)

    def fails(part: onnx.ModelProto | None) -> bool:
        return part is not None and refused(part) == rule

    nodes = list(model.graph.node)
    ends = _smallest(len(nodes), lambda count: fails(parts.cut(nodes[:count])))
    beginning = parts.cut(nodes[:ends])
    if beginning is None or not fails(beginning):
        return model
    chain = parts.ancestors(nodes[:ends])
    length = _smallest(len(chain), lambda count: fails(parts.cut(chain[-count:])))
    smallest = parts.cut(chain[-length:])
    return smallest if smallest is not None and fails(smallest) else beginning


def _smallest(highest: int, holds: Callable[[int], bool]) -> int:
    """Return the smallest number from 1 to `highest` for which `holds`, trying small ones first because they are fast.

    `holds` must be monotone and true for `highest`.
    """
    low, high = 0, 1
    while high < highest and not holds(high):
        low, high = high, 2 * high
    high = min(high, highest)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


class _Parts:
    """Builds models of some nodes of a given model."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        inferred = onnx.shape_inference.infer_shapes(model).graph
        self.values = {value.name: value for value in (*inferred.value_info, *inferred.input, *inferred.output)}
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producer = {name: node for node in model.graph.node for name in node.output}
        # Nodes that depend only on constants, such as a weight's DequantizeLinear, are copied with their consumers.
        self.fixed: set[str] = set(self.constants)
        for node in model.graph.node:
            if all(name in self.fixed for name in node.input if name) and node.input:
                self.fixed |= set(node.output)

    def ancestors(self, nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """Return the last node of `nodes` and all nodes that it depends on."""
        wanted, found = set(nodes[-1].output), []
        for node in reversed(nodes):
            if wanted.intersection(node.output):
                found.append(node)
                wanted |= set(node.input)
        return found[::-1]

    def cut(self, nodes: Sequence[onnx.NodeProto]) -> onnx.ModelProto | None:
        """Return a model of these nodes, in order; None if the type of an input is unknown."""
        kept = {id(node) for node in nodes}
        needed = [name for node in nodes for name in node.input]
        while needed:
            node = self.producer.get(needed.pop())
            if node is not None and id(node) not in kept and self.fixed.issuperset(node.output):
                kept.add(id(node))
                needed += node.input
        chosen = [node for node in self.model.graph.node if id(node) in kept]
        written = {name for node in chosen for name in node.output}
        read = list(dict.fromkeys(name for node in chosen for name in node.input if name))
        inputs = [name for name in read if name not in written and name not in self.constants]
        if any(name not in self.values for name in inputs) or not chosen:
            return None
        ends = [name for node in chosen for name in node.output if name and name not in read]
        float_type = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
        graph = helper.make_graph(
            chosen,
            "cut",
            [self.values[name] for name in inputs],
            [self.values.get(name) or helper.make_value_info(name, float_type) for name in ends],
            [self.constants[name] for name in read if name in self.constants],
        )
        return helper.make_model(
            graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version, producer_name="crqat-edge"
        )
