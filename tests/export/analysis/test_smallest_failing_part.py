from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from crqat.export.analysis.smallest_failing_part import smallest_cut
from tests.export.conftest import session


def chain(length: int = 20) -> onnx.ModelProto:
    """Alternating Adds and Relus, the Adds with a weight behind a DequantizeLinear, and a branch past them all."""
    nodes, name = [], "input"
    for index in range(length):
        dequantize = [f"w{index}", "scale", "zero"]
        nodes += [
            helper.make_node("DequantizeLinear", dequantize, [f"v{index}"], f"dequantize{index}"),
            helper.make_node("Add", [name, f"v{index}"], [f"a{index}"], f"add{index}"),
            helper.make_node("Relu", [f"a{index}"], [f"r{index}"], f"relu{index}"),
        ]
        name = f"r{index}"
    nodes.append(helper.make_node("Add", [name, "input"], ["logits"], "last"))
    shape: list[int | str | None] = ["batch", 4]
    constants = {f"w{index}": np.ones(4, np.int8) for index in range(length)}
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        [
            *(numpy_helper.from_array(value, key) for key, value in constants.items()),
            numpy_helper.from_array(np.float32(0.5), "scale"),  # type: ignore[arg-type]
            numpy_helper.from_array(np.int8(0), "zero"),  # type: ignore[arg-type]
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def names(model: onnx.ModelProto) -> list[str]:
    return [node.name for node in model.graph.node]


class Builder:
    """Refuses a part that has all of some nodes; counts its calls, and loads what it is given into ONNX Runtime."""

    def __init__(self, *culprits: str, elsewhere: str = "") -> None:
        self.culprits, self.elsewhere, self.calls = set(culprits), elsewhere, 0

    def __call__(self, part: onnx.ModelProto) -> str | None:
        self.calls += 1
        onnx.checker.check_model(part)
        session(part)  # a part is a model of its own
        if self.culprits <= set(names(part)):
            return "the rule"
        return "another rule" if self.elsewhere in names(part) else None


@pytest.mark.parametrize(
    ("culprits", "left"),
    [
        (["relu0"], ["relu0"]),
        (["relu13"], ["relu13"]),
        (["add7"], ["dequantize7", "add7"]),
        (["dequantize7"], ["dequantize7"]),
        (["last"], ["last"]),
        (["add5", "relu6"], ["dequantize5", "add5", "relu5", "dequantize6", "add6", "relu6"]),
    ],
)
def test_the_cut_has_what_fails_and_what_its_constants_need(culprits: list[str], left: list[str]) -> None:
    builder = Builder(*culprits)
    cut = smallest_cut(chain(), builder)
    assert names(cut) == left
    assert builder.calls <= 30  # of 61 nodes
    used = {name for node in cut.graph.node for name in node.input}
    assert {tensor.name for tensor in cut.graph.initializer} <= used


def test_another_failure_is_not_the_one_that_is_looked_for() -> None:
    assert names(smallest_cut(chain(), Builder("relu10", elsewhere="relu3"))) == ["relu10"]


def test_what_only_fails_as_a_whole_stays_whole() -> None:
    model = chain()
    assert names(smallest_cut(model, lambda part: "the rule" if part == model else None)) == names(model)


def test_a_part_after_a_node_of_unknown_type_starts_before_it() -> None:
    model = chain(4)
    model.graph.node[5].domain, model.graph.node[5].op_type = "nowhere", "Unknown"
    model.opset_import.append(helper.make_opsetid("nowhere", 1))
    cut = smallest_cut(model, lambda part: "the rule" if "relu2" in names(part) else None)
    assert [node.op_type for node in cut.graph.node][-4:] == ["Unknown", "DequantizeLinear", "Add", "Relu"]
