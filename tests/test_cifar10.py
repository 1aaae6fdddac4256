"""The whole path on CIFAR-10 with published float weights: W8A8 without training keeps their accuracy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from crqat.pipeline.cli import crqat

pytestmark = pytest.mark.slow

FLOAT_ACCURACY = 0.9173
RECIPE = Path(__file__).parent.parent / "recipes" / "cifar10_resnet20_w8a8.yaml"


@pytest.fixture(scope="module")
def results(cifar10_root: Path, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    runs = tmp_path_factory.mktemp("runs")
    values = {
        "data.root": cifar10_root,
        "data.download": "false",
        "model.weights": shared_data / "weights" / "resnet20-12fca82f.th",
        "qat.epochs": 0,
        "compile": "never",
        "export.tensorrt_precision": "float32",  # CPUs convert float16, which takes a minute for 10,000 images
        "benchmark.latency_seconds": 1,
    }
    options = [argument for key, value in values.items() for argument in ("--set", f"{key}={value}")]
    for stage in ("train", "export", "benchmark"):
        outcome = CliRunner().invoke(crqat, [stage, str(RECIPE), "--runs", str(runs), *options], catch_exceptions=False)
        assert outcome.exit_code in (0, None), outcome.output
    loaded: dict[str, Any] = json.loads((runs / "cifar10_resnet20_w8a8" / "benchmark" / "results.json").read_text())
    return loaded


def test_the_float_file_has_the_published_accuracy(results: dict[str, Any]) -> None:
    accuracy = results["models"]["float.onnx"]["accuracy"]
    assert accuracy["n"] == 10000
    assert accuracy["top1"] == pytest.approx(FLOAT_ACCURACY, abs=1e-4)


@pytest.mark.parametrize("file", ["onnxruntime.onnx", "tensorrt.onnx"])
def test_int8_stays_within_half_a_point_and_every_code_is_right(results: dict[str, Any], file: str) -> None:
    model = results["models"][file]
    assert model["accuracy"]["n"] == 10000
    assert model["accuracy"]["top1"] > FLOAT_ACCURACY - 0.005
    assert model["verification"]["status"] == "passed"
    assert model["verification"]["differing_codes"] == 0
    assert model["verification"]["codes"] > 1_000_000


def test_every_operation_is_fused(results: dict[str, Any]) -> None:
    fusion = results["models"]["onnxruntime.onnx"]["fusion"]
    assert fusion["float"] == []
    assert fusion["expected"] == {"QLinearConv": 19, "QGemm": 1, "QLinearAdd": 9, "QLinearGlobalAveragePool": 1}
    assert fusion["expected"] == {name: fusion["operations"][name] for name in fusion["expected"]}
