from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from crqat.core.errors import ToolError
from crqat.core.progress import quiet
from crqat.core.results.benchmark import Int8Layers
from crqat.pipeline.gate.rules import GateConfig, judge
from crqat.runtime_eval.benchmark import benchmark as typed_benchmark
from crqat.runtime_eval.measure.worker_client import Worker
from crqat.runtime_eval.trt import versions as tensorrt_api
from tests.needs import require
from tests.runtime_eval.conftest import (
    PREPROCESSING,
    QUICK,
    WITHOUT_TENSORRT,
    Digits,
    WriteExport,
    metadata,
    onnx_bytes,
)

OPENVINO = replace(QUICK, openvino=True)
# What the files are said to take: no real time is asserted.
TOLD = {
    ("onnxruntime", "float.onnx"): 0.009,
    ("onnxruntime", "onnxruntime.onnx"): 0.003,
    ("openvino", "float.onnx"): 0.004,
    ("openvino", "onnxruntime.onnx"): 0.001,
}

require("openvino")
import openvino  # noqa: E402

from crqat.runtime_eval.runners.openvino import OpenVINORunner  # noqa: E402

# A test knows which of the parts that may be None are there.
benchmark: Callable[..., Any] = typed_benchmark


def test_the_runner_says_what_it_is_and_computes_the_networks_logits(write_export: WriteExport, digits: Digits) -> None:
    with OpenVINORunner(write_export() / "float.onnx", 1) as runner:
        said = runner.describe()
        logits = runner.infer(PREPROCESSING(digits.images[:7]))
        again = runner.infer(PREPROCESSING(digits.images[7:9]))
    assert (said.runtime, said.provider, said.metadata) == ("openvino", "CPU", metadata("float"))
    assert openvino.__version__.startswith(said.version)
    assert said.int8_layers is not None and said.int8_layers.int8 == 0
    assert said.int8_layers.layers == len(said.int8_layers.in_float) == 2
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, digits.logits()[:7], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(again, digits.logits()[7:9], rtol=1e-4, atol=1e-4)  # another batch; the first stays
    np.testing.assert_allclose(logits, digits.logits()[:7], rtol=1e-4, atol=1e-4)


def clipped(clip: bool) -> bytes:
    """Two convolutions as in onnxruntime.onnx: UINT8 codes with zero point 0, and an integer Clip to 127."""
    generator = np.random.default_rng(0)
    constants: dict[str, Any] = {
        "scale": np.float32(0.125), "zero": np.uint8(0), "low": np.uint8(0), "high": np.uint8(127),
        "weight": generator.integers(-64, 64, (16, 16, 3, 3)).astype(np.int8), "second": np.float32(0.5),
        "step": np.full(16, 2.0**-7, np.float32), "none": np.zeros(16, np.int8),
    }  # fmt: skip
    nodes = [helper.make_node("DequantizeLinear", ["weight", "step", "none"], ["w"], axis=0)]
    value = "input"
    for number, scale in enumerate(("scale", "second")):
        nodes.append(helper.make_node("Relu", [value], [f"r{number}"]))
        nodes.append(helper.make_node("QuantizeLinear", [f"r{number}", scale, "zero"], [f"q{number}"]))
        codes = f"q{number}"
        if clip:
            codes = f"c{number}"
            nodes.append(helper.make_node("Clip", [f"q{number}", "low", "high"], [codes]))
        nodes.append(helper.make_node("DequantizeLinear", [codes, scale, "zero"], [f"d{number}"]))
        value = "logits" if number else "y"
        nodes.append(helper.make_node("Conv", [f"d{number}", "w"], [value], pads=[1] * 4, name=f"conv{number}"))
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "clipped",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 16, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 16, 8, 8])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def test_codes_are_clipped_in_int8_kernels(tmp_path: Path) -> None:
    # What lets OpenVINO run the file for ONNX Runtime: its Clip holds, and all steps are powers of two, so every
    # product is exact and both runtimes have to give the same numbers.
    drawn = np.random.default_rng(1).random((2, 16, 8, 8)) * 40 - 5
    values = (np.round(drawn * 16) / 16).astype(np.float32)
    results = {}
    for name, clip in (("clip", True), ("whole", False)):
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(clipped(clip))
        with OpenVINORunner(path, 1) as runner:
            layers = runner.describe().int8_layers
            results[name] = runner.infer(values)
        assert layers == Int8Layers(2, 2, [])
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        np.testing.assert_array_equal(results[name], session.run(None, {"input": values})[0])
    assert np.abs(results["clip"] - results["whole"]).max() > 1


def test_a_file_that_it_refuses(tmp_path: Path, digits: Digits) -> None:
    model = onnx.load_from_string(onnx_bytes(digits.layers, "float", None))
    model.graph.node[0].op_type = "NoSuchOperation"
    path = tmp_path / "odd.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ToolError, match=r"OpenVINO does not load odd\.onnx: .*NoSuchOperation"):
        OpenVINORunner(path, 1)


def test_a_worker_runs_it(write_export: WriteExport) -> None:
    export = write_export()
    with Worker(export / "onnxruntime.onnx", export / "images.npy", QUICK, "openvino") as worker:
        assert (worker.runtime, worker.provider, worker.classes) == ("openvino", "CPU", 10)
        assert worker.int8_layers is not None
        samples, computed = worker.latency(0.0, 0.02)
    assert len(samples) >= 1
    assert computed == []


@pytest.mark.slow
def test_a_benchmark_measures_both_files_in_openvino(
    write_export: WriteExport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_api, "choose", lambda: None)
    original = Worker.latency

    def told(self: Worker, warm_up_seconds: float, seconds: float) -> tuple[list[float], list[float]]:
        samples, computed = original(self, warm_up_seconds, seconds)
        assert all(sample > 0 for sample in samples)
        return [TOLD[self.runtime, self._name]] * len(samples), computed

    monkeypatch.setattr(Worker, "latency", told)
    results = benchmark(write_export(payload=WITHOUT_TENSORRT), OPENVINO, quiet)
    models = results.models
    assert list(models) == ["float.onnx", "onnxruntime.onnx", "float.onnx@openvino", "onnxruntime.onnx@openvino"]
    base, fast = models["float.onnx@openvino"], models["onnxruntime.onnx@openvino"]
    assert [(model.target, model.runtime, model.status) for model in (base, fast)] == [
        ("float_openvino", "openvino", "measured"),
        ("openvino", "openvino", "measured"),
    ]
    assert base.accuracy.top1 == models["float.onnx"].accuracy.top1
    assert base.versus_float is None
    assert fast.versus_float.agreement > 0.7
    # Against the float network in OpenVINO, not in ONNX Runtime.
    assert fast.versus_float.latency_ratio == pytest.approx(0.25)
    assert fast.int8_layers.layers == 2
    rules = [(verdict.rule, verdict.file) for verdict in judge(results, GateConfig(max_latency_ratio=9.0))]
    assert ("accuracy_drop", "onnxruntime.onnx@openvino") in rules
    assert ("latency_ratio", "onnxruntime.onnx@openvino") in rules
    assert not [file for _, file in rules if file == "float.onnx@openvino"]
    assert ("verification", "onnxruntime.onnx@openvino") not in rules
