"""2 to 6 bits in one network: both targets' files are verified, and TensorRT plans all of it in INT8."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from crqat.core.progress import quiet
from crqat.core.run_directory import read_manifest
from crqat.core.typed_json import to_json
from crqat.export import stage
from crqat.export.config import ExportConfig
from crqat.runtime_eval.trt.engine import EngineOptions, build
from crqat.train.config import Override, QuantizationConfig, TrainConfig
from tests.export.conftest import DIGITS, nodes
from tests.needs import needs

rtx = needs("tensorrt_rtx")
OVERRIDES = {
    "layer1.0.*": Override(weights=5, activations=6),
    "layer2.*": Override(weights=3, activations=5),
    "layer2.0.conv2": Override(weights=2, activations=2),
    "layer3.*": Override(weights=6, activations=3),
}
MIXED = QuantizationConfig(weights=4, activations=4, overrides=OVERRIDES, calibration_images=128)


@pytest.fixture(scope="module")
def exported(
    trained: Callable[..., tuple[Path, TrainConfig]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], Path]:
    """The export of a trained network of mixed widths, its payload, and the train directory."""
    directory, config = trained(quantization=MIXED, qat=replace(DIGITS.qat, lr=0.01))
    out = tmp_path_factory.mktemp("export")
    return out, to_json(stage.export(directory, config, ExportConfig(), out, quiet, "mixed", "")), directory


def test_all_widths_are_there_and_the_network_has_learned(exported: tuple[Path, dict[str, Any], Path]) -> None:
    layout = json.loads((exported[2] / "layout.json").read_text())
    assert {row["bits"] for row in layout if row["kind"] == "weight"} == {2, 3, 4, 5, 6, 7, 8}
    assert {2, 3, 4, 5, 6, 8} >= {row["bits"] for row in layout if row["kind"] == "activation"} >= {2, 3, 4, 5, 6}
    assert read_manifest(exported[2]).payload["candidates"]["student"]["validation_accuracy"] > 0.5


def test_the_three_checks_hold_for_both_targets(exported: tuple[Path, dict[str, Any], Path]) -> None:
    entries = {entry["target"]: entry for entry in exported[1]["models"]}
    for target in ("onnxruntime", "tensorrt"):
        proof = entries[target]["verification"]
        assert (proof["status"], proof["differing_codes"]) == ("passed", 0)
        assert proof["codes"] > 100_000
        assert {claim["claim"] for claim in entries[target]["claims"].values()} == {"exact"}
        assert entries[target]["findings"] == []
        assert len(nodes(onnx.load(exported[0] / f"{target}.onnx"), "Clip")) >= 15
    assert entries["onnxruntime"]["fusion"]["complete"]


@rtx
def test_tensorrt_plans_every_layer_in_int8(exported: tuple[Path, dict[str, Any], Path]) -> None:
    macs = next(entry["macs"] for entry in exported[1]["models"] if entry["target"] == "tensorrt")
    report = build(exported[0] / "tensorrt.onnx", EngineOptions(), macs)
    assert report.status == "built"
    assert report.coverage is not None
    assert (report.coverage.by_macs, report.coverage.uncovered) == (1.0, [])
    assert [message for message in report.messages if message.severity != "harmless"] == []
