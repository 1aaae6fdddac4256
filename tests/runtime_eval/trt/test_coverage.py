from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from crqat.core.results.engine import Coverage, EngineLayer, Uncovered
from crqat.core.typed_json import to_json
from crqat.runtime_eval.trt.coverage import counts, coverage, described, headline, warnings
from crqat.runtime_eval.trt.engine import EngineOptions, Found, report_of
from crqat.runtime_eval.trt.plan_layers import Kind, Layer


def layer(name: str, *nodes: str, kind: Kind = "matmul", inputs: str = "Int8", weights: str = "Int8") -> Layer:
    return Layer(name, kind, "a type", (inputs,), ("Float",), weights if kind == "matmul" else None, nodes)


PLAN = [
    layer("a_1", "a", "a.weight/DequantizeLinear"),
    layer("b_2", "b", weights="Half"),
    layer("p_3", "a", "b", "c", kind="pointwise"),
    layer("r_4", kind="reformat"),
]
MACS = {"c": 10, "a": 60, "b": 30}


def test_coverage_by_macs_and_by_count() -> None:
    assert coverage(PLAN, MACS) == Coverage(
        by_count=1 - 2 / 3,
        by_macs=0.6,
        nodes=3,
        int8_nodes=1,
        macs=100,
        int8_macs=60,
        # A pointwise layer that came from a node does not compute it.
        uncovered=[
            Uncovered("b", "multiplies Int8 by Half", 30),
            Uncovered("c", "no layer of the plan is known to compute it", 10),
        ],
    )


def test_a_node_is_covered_only_if_all_its_layers_are() -> None:
    both = [layer("x", "a"), layer("y", "a", inputs="Float")]
    assert coverage(both, {"a": 5}).by_macs == 0.0
    together = [layer("x", "a", "b")]
    assert coverage(together, {"a": 5, "b": 1}).by_macs == 1.0


def test_without_macs_layers_are_counted() -> None:
    found = coverage(PLAN, None)
    assert (found.by_count, found.by_macs, found.nodes, found.int8_nodes) == (0.5, None, 2, 1)
    assert [entry.node for entry in found.uncovered or []] == ["b_2"]
    assert coverage([], None).by_count is None
    assert coverage(PLAN, {}).by_macs is None


def test_layers_are_described_and_counted() -> None:
    layers = described(PLAN, MACS)
    assert [layer.macs for layer in layers] == [60, 30, None, None]
    assert [layer.int8 for layer in layers] == [True, False, None, None]
    assert layers[0] == EngineLayer(
        name="a_1",
        kind="matmul",
        type="a type",
        inputs=["Int8"],
        outputs=["Float"],
        weights="Int8",
        int8=True,
        macs=60,
        nodes=["a", "a.weight/DequantizeLinear"],
    )
    kinds = {"matmul": 2, "pointwise": 1, "pooling": 0, "reformat": 1, "copy": 0, "opaque": 0}
    assert to_json(counts(PLAN)) == {"layers": 4, **kinds}


UINT8 = (
    "WARNING",
    "onnxOpImporters.cpp:1980: TensorRT supports QuantizeLinear/DequantizeLinear with UINT8 zero_point only on DLA "
    "(version >= 3.16). Defaulting to INT8 instead. To import as UINT8, set the kIMPORT_UINT8_QUANTIZATION flag.",
)


def test_warnings_are_classified_counted_and_placed() -> None:
    found = warnings(
        [
            ("VERBOSE", "Static check for parsing node: x [QuantizeLinear]"),
            ("VERBOSE", "Parsing node: relu [1]/QuantizeLinear [QuantizeLinear]"),
            UINT8,
            ("VERBOSE", "Parsing node: relu/DequantizeLinear [DequantizeLinear]"),
            UINT8,
            UINT8,
            ("INFO", "a warning is not information"),
            ("WARNING", " (foreignNode) Converting conv activation scales to fp32."),
            ("WARNING", " (foreignNode) Converting conv weight scales to fp32."),
            ("WARNING", "Check verbose logs for the list of affected weights: 3 have subnormal FP16 values."),
            ("ERROR", "Skipping\ntactic 0x1"),
        ]
    )
    assert [(entry.kind, entry.severity, entry.count) for entry in found] == [
        ("uint8_read_as_int8", "error", 3),
        ("float16_scales", "harmless", 2),
        ("subnormal_weights", "warning", 1),
        ("other", "warning", 1),
    ]
    assert found[0].nodes == ["relu [1]/QuantizeLinear", "relu/DequantizeLinear"]
    assert found[1].nodes == []
    assert found[3].message == "logged as an error: Skipping tactic 0x1"


def test_a_zero_point_that_quantizers_share_is_read_as_int8_too() -> None:
    words = "ModelImporter.cpp:416: UINT8 data onnx::QuantizeLinear_775 is being converted to INT32."
    (found,) = warnings([("WARNING", words)])
    assert (found.kind, found.severity) == ("uint8_read_as_int8", "error")


def test_headline_is_small_and_has_what_the_gate_reads() -> None:
    many = {str(number): 1 for number in range(100)}
    report = report_of(
        Path(__file__),
        EngineOptions(batch=(1, 1, 8)),
        "tensorrt",
        Found(seconds=1.0, layers=described(PLAN, many), coverage=coverage(PLAN, many), counts=counts(PLAN)),
    )
    short = to_json(headline(report))
    assert len(short["uncovered"]) == 5
    assert short["coverage"]["nodes"] == 100
    assert "uncovered" not in short["coverage"]
    assert "layers" not in short
    failed = headline(replace(report, status="failed: x", coverage=None, counts=None))
    assert (failed.coverage, failed.uncovered, failed.counts) == (None, [], None)
    with pytest.raises(ValueError, match="has status built but no coverage"):
        replace(report, coverage=None)
