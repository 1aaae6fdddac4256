"""`crqat inspect`: what a person sees of an engine. Engines are small, and real where there is a builder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from crqat.core import typed_json
from crqat.core.errors import CrqatError, ToolError, UsageError
from crqat.core.results.engine import BuildError, Engines
from crqat.core.results.export import ExportedModel, ExportPayload
from crqat.core.run_directory import Manifest, write_stage
from crqat.pipeline.cli import crqat
from crqat.runtime_eval.trt import engine
from crqat.runtime_eval.trt import versions as tensorrt_api
from crqat.runtime_eval.trt.engine import EngineOptions, Found
from tests.needs import needs

rtx = needs("tensorrt_rtx")


def network(zero_point: int = 0) -> onnx.ModelProto:
    """Two convolutions with a ReLU between them, the first one quantized, the second not."""
    rng = np.random.default_rng(0)
    constants = {
        "s": np.float32(0.05),
        "z": np.int8(zero_point),
        "w1": rng.integers(-127, 128, (16, 16, 3, 3)).astype(np.int8),
        "ws": np.full(16, 0.01, np.float32),
        "wz": np.zeros(16, np.int8),
        "w2": rng.standard_normal((8, 16, 1, 1)).astype(np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "s", "z"], ["q"], "input/QuantizeLinear"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["x"], "input/DequantizeLinear"),
        helper.make_node("DequantizeLinear", ["w1", "ws", "wz"], ["v"], "w1/DequantizeLinear", axis=0),
        helper.make_node("Conv", ["x", "v"], ["c"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("Conv", ["r", "w2"], ["d"], "second"),
        helper.make_node("Flatten", ["d"], ["logits"], "flatten"),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 16, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 512])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


FIRST, SECOND = 16 * 64 * 16 * 9, 8 * 64 * 16


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(network(), "network.onnx")
    return tmp_path


def inspect(*arguments: str) -> None:
    crqat.main(["inspect", *arguments], prog_name="crqat", standalone_mode=False)


def cells(text: str, first: str) -> list[str]:
    """The table's row that begins with a cell."""
    rows = ([cell.strip() for cell in re.split("[│|]", line)[1:-1]] for line in text.splitlines() if "│" in line)
    return next(row for row in rows if row[0] == first)


@rtx
def test_an_engine_as_a_person_reads_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect("network.onnx", "--batch", "2", "--compute-capability", "SM89", "--out", "engine.json")
    text = capsys.readouterr().out
    assert cells(text, "first") == ["first", "correlation", "Int8 x Int8", "Float", f"{FIRST / 1e6:.3f}", "first"]
    second = cells(text, "second")
    assert second[1:3] == ["correlation", "Float x Float"]
    assert cells(text, "Quantize")[1:4] == ["pointwise", "Float", "Int8"]
    share = 100 * FIRST / (FIRST + SECOND)
    assert f"INT8 coverage: {share:.2f} % of {(FIRST + SECOND) / 1e6:.1f} M MACs, 1 of 2 Conv and Gemm" in text
    assert f"not INT8: second: multiplies Float by Float, {100 - share:.2f} % of the MACs" in text
    assert re.search(
        r"tensorrt_rtx [\d.]+, SM89, batch 2, built in [\d.]+ s, [\d.]+ MB; read from the verbose log", text
    )
    assert "does not build for Jetson (SM87" in text
    report = json.loads(Path("engine.json").read_text())
    assert report["coverage"]["int8_macs"] == FIRST

    inspect("engine.json")
    assert capsys.readouterr().out == text
    Path("engine.json").write_text(json.dumps({"schema_version": 1, "engines": {"network.onnx": report}}))
    inspect("engine.json")
    assert capsys.readouterr().out == text


@rtx
def test_macs_come_from_the_manifest_beside_the_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = Manifest("export", "key", None, {}, {})
    models = [
        ExportedModel("float.onnx", "float"),
        ExportedModel("tensorrt.onnx", "tensorrt", macs={"first": 3, "second": 1}),
    ]
    manifest.payload = typed_json.to_json(ExportPayload("run", models, "images.npy", "labels.npy"))
    with write_stage(here / "run", manifest) as out:
        onnx.save(network(), out / "tensorrt.onnx")
    inspect("run/export/tensorrt.onnx")
    assert "INT8 coverage: 75.00 % of 0.0 M MACs" in capsys.readouterr().out


@rtx
def test_bisect_writes_the_smallest_part_that_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(network(zero_point=3), "refused.onnx")
    with pytest.raises(UsageError, match=r"refused.onnx: failed: parse at input/QuantizeLinear \[QuantizeLinear\]: .*"):
        inspect("refused.onnx")
    assert not Path("refused.cut.onnx").exists()
    with pytest.raises(UsageError, match="Non-zero zero point is not supported"):
        inspect("refused.onnx", "--bisect")
    assert [node.name for node in onnx.load("refused.cut.onnx").graph.node] == ["input/QuantizeLinear"]
    assert "wrote refused.cut.onnx: 1 of 7 nodes, which fail in the same way:" in capsys.readouterr().out
    inspect("network.onnx", "--bisect")
    assert "network.onnx builds: there is nothing to bisect" in capsys.readouterr().out
    assert not Path("network.cut.onnx").exists()


def test_the_json_of_an_inspector(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer: dict[str, Any] = {
        "Name": "w + Conv_1",
        "LayerType": "CaskConvolution",
        "ParameterType": "Convolution",
        "Inputs": [{"Name": "x", "Dimensions": [1, 4, 8, 8], "Format/Datatype": "Four wide vectorized Int8 format"}],
        "Outputs": [{"Name": "y", "Dimensions": [1, 4, 8, 8], "Format/Datatype": "Row major linear FP32"}],
        "Weights": {"Type": "Int8", "Count": 144},
    }
    Path("graph.json").write_text(json.dumps({"Layers": [layer], "Bindings": ["x", "y"]}))
    inspect("graph.json")
    text = capsys.readouterr().out
    assert cells(text, "w + Conv_1") == ["w + Conv_1", "CaskConvolution", "Int8 x Int8", "Float", "", "w, Conv_1"]
    assert "INT8 coverage: 1 of 1 Conv and Gemm layers; MACs are not known" in text
    assert "read from the engine inspector" in text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.onnx", None, "no such file"),
        ("text.onnx", "not a model", "not an ONNX file"),
        ("a.json", "{", "not an .onnx file, an engine report or an inspector's JSON"),
        ("a.json", "[1]", "damaged: the file is not an object; give an .onnx file"),
        ("a.json", '{"Layers": 3}', "not an .onnx file"),
        ("a.json", '{"model": "x", "schema_version": 1}', "damaged: model_sha256 is missing; give an .onnx file"),
        ("a.json", '{"model": "x", "schema_version": 9}', "newer crqat with schema version 9"),
    ],
)
def test_what_is_no_engine(here: Path, name: str, content: str | None, words: str) -> None:
    if content is not None:
        Path(name).write_text(content)
    with pytest.raises(UsageError, match=words) as caught:
        inspect(name)
    assert name in str(caught.value)


def test_an_engine_that_was_not_built_is_no_success(here: Path) -> None:
    failure = BuildError("parse", rule="a rule")
    report = engine.report_of(here / "network.onnx", EngineOptions(), "tensorrt_rtx", Found(failure=failure))
    Path("engine.json").write_text(typed_json.text(Engines({"tensorrt.onnx": report})))
    with pytest.raises(UsageError, match=r"1 of 1 engines were not built, first tensorrt.onnx: failed: parse: a rule"):
        inspect("engine.json")
    Path("engine.json").write_text('{"schema_version": 1, "engines": {}}')
    with pytest.raises(UsageError, match="holds no engine report"):
        inspect("engine.json")


def test_without_a_builder_the_message_says_what_to_install(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_api, "installed", lambda module: None)
    with pytest.raises(ToolError, match=r"tensorrt_rtx is not installed.*pip install crqat-edge\[tensorrt-cpu\]"):
        inspect("network.onnx")
    assert ToolError.exit_code == 3


@rtx
def test_targets_that_the_builder_lacks_and_places_that_cannot_be_written(here: Path) -> None:
    with pytest.raises(UsageError, match=r"SM87 \(Jetson Orin\)"):
        inspect("network.onnx", "--compute-capability", "SM87")
    with pytest.raises(CrqatError, match="cannot be written"):
        inspect("network.onnx", "--out", "nowhere/engine.json")
