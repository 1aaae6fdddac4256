"""Where the time goes: each node has a kind, a fused one finds its layer, and a slow one its reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from crqat.core.results.benchmark import NodeTime, Results
from crqat.core.results.export import ExportedModel, ExportPayload, LayerSummary
from crqat.core.results.verification import FloatNode, Fusion
from crqat.core.typed_json import from_json
from crqat.pipeline.report.time_spent import KINDS, time_spent
from tests.pipeline.conftest import measured

LAYERS, CONVERSIONS, CLIPS, OTHERS = KINDS
# Of the float file: named by the last result that was fused into a node.
BEFORE = [
    NodeTime("/stem/relu", "Conv", 100.0), NodeTime("/wide/relu", "Conv", 50.0),
    NodeTime("/depthwise/out", "Conv", 40.0), NodeTime("ReorderOutput", "ReorderOutput", 5.0),
    NodeTime("Add_3", "Add", 7.0), NodeTime("fc", "Gemm", 3.0),
]  # fmt: skip
AFTER = [
    NodeTime("input/QuantizeLinear", "QuantizeLinear", 4.0), NodeTime("stem", "QLinearConv", 30.0),
    NodeTime("relu/Clip", "Clip", 2.0), NodeTime("wide", "Conv", 50.0), NodeTime("depthwise", "QLinearConv", 39.0),
    NodeTime("Add_3", "QLinearAdd", 6.0), NodeTime("fc", "QGemm", 3.0),
]  # fmt: skip


def case(folder: Path) -> tuple[ExportPayload, Results]:
    """A float file of three convolutions and a Gemm, and times of it and of an INT8 file."""
    nodes = []
    for layer, source, result in (("stem", "input", "/stem/relu"), ("wide", "/stem/relu", "/wide/relu")):
        nodes += [helper.make_node("Conv", [source, "w"], [f"{layer}.out"], name=layer)]
        nodes += [helper.make_node("Relu", [f"{layer}.out"], [result], name=f"Relu_{layer}")]
    nodes += [helper.make_node("Conv", ["/wide/relu", "w"], ["/depthwise/out"], name="depthwise")]
    nodes += [helper.make_node("Gemm", ["/depthwise/out", "w"], ["logits"], name="fc")]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("input", "w", "logits")]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", value[:2], value[2:])), folder / "float.onnx")
    onnx.save(helper.make_model(helper.make_graph([], "g", [], [])), folder / "onnxruntime.onnx")
    fusion = Fusion({}, {}, [FloatNode("wide", "Conv", "Swish stands between it and a quantizer")], False)
    models = [ExportedModel("float.onnx", "float"), ExportedModel("onnxruntime.onnx", "onnxruntime", fusion=fusion)]
    layers = [
        LayerSummary(name, "Conv", 1, products, 8, 8, None, None)
        for name, products in (("stem", 27), ("wide", 576), ("depthwise", 9), ("fc", 64))
    ]
    results = from_json(Results, measured(0.2, (0.1, 0.3)))
    times = {"float.onnx": BEFORE, "onnxruntime.onnx": AFTER}
    timed = {file: replace(model, node_times=times.get(file)) for file, model in results.models.items()}
    return ExportPayload("run", models, layers=layers), replace(results, models=timed)


def test_kinds_add_up_and_slow_layers_have_a_reason(tmp_path: Path) -> None:
    (found,) = time_spent(tmp_path, *case(tmp_path))
    assert found.file == "onnxruntime.onnx"
    assert found.kinds == {
        LAYERS: (193.0, 4, 122.0, 4),
        CONVERSIONS: (5.0, 1, 4.0, 1),
        CLIPS: (0.0, 0, 2.0, 1),
        OTHERS: (7.0, 1, 6.0, 1),
    }
    assert [(row.layer, row.float_microseconds, row.microseconds) for row in found.layers] == [
        ("wide", 50.0, 50.0), ("depthwise", 40.0, 39.0), ("stem", 100.0, 30.0), ("fc", 3.0, 3.0),
    ]  # fmt: skip
    assert [(row.operation, row.nodes, row.microseconds) for row in found.others] == [
        ("QLinearAdd", 1, 6.0), ("QuantizeLinear", 1, 4.0), ("Clip", 1, 2.0),
    ]  # fmt: skip
    assert found.costly == []  # all below a twentieth of 134 µs
    assert found.unmatched == 0
    limits = {row.layer: row.limit for row in found.limited}
    assert limits == {
        "wide": "float: Swish stands between it and a quantizer",
        "depthwise": "9 products for each output: little arithmetic to save",
        "fc": "small: a call alone takes about 2 µs, as the cheapest node shows",
    }


def test_an_activation_that_was_fused_and_an_operation_that_costs(tmp_path: Path) -> None:
    export, results = case(tmp_path)
    model = onnx.load(tmp_path / "float.onnx")
    model.graph.node[1].op_type = "Sigmoid"
    onnx.save(model, tmp_path / "float.onnx")
    slow = [*AFTER[:-1], NodeTime("Mul_1", "Mul", 30.0), NodeTime("Mul_2", "Mul", 25.0)]
    results.models["onnxruntime.onnx"] = replace(results.models["onnxruntime.onnx"], node_times=slow)
    (found,) = time_spent(tmp_path, export, results)
    assert [(row.operation, row.nodes, row.microseconds) for row in found.costly] == [("Mul", 2, 55.0)]
    assert {row.layer for row in found.layers} == {"stem", "wide", "depthwise"}
    assert found.unmatched == 1  # fc has no node of its own


@pytest.mark.parametrize("file", ["float.onnx", "onnxruntime.onnx"])
def test_without_times_there_is_nothing_to_show(tmp_path: Path, file: str) -> None:
    export, results = case(tmp_path)
    results.models[file] = replace(results.models[file], node_times=None)
    assert time_spent(tmp_path, export, results) == []
