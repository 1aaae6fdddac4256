"""From a recipe to the verdict by the command line: a good model passes, a broken one fails, a damaged one is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from crqat.core.run_directory import MANIFEST, read_manifest, verify_stage, write_stage

# Measured: drops of 0.1 and 0.0 points with upper bounds of 0.7, agreements of 0.99 with lower bounds of 0.98.
RECIPE = """
name: small
compile: never
data: {source: digits, crop_padding: 0, flip: false}
model: {name: cifar/resnet20}
float: {epochs: 4, batch_size: 64, lr: 0.05}
quantization: {calibration_images: 128}
qat: {epochs: 1, batch_size: 64, lr: 0.005}
consistency: {teacher: none}
export: {verify_images: 8}
benchmark: {latency_rounds: 6, latency_seconds: 0.3, warm_up_seconds: 0.0}
gate: {max_accuracy_drop: 5.0, min_agreement: 0.9, max_size_ratio: 0.8}
"""


def crqat(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a user starts it."""
    command = [sys.executable, "-m", "crqat", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def results(folder: Path) -> dict[str, Any]:
    """The benchmark's results."""
    content: dict[str, Any] = json.loads((folder / "runs" / "small" / "benchmark" / "results.json").read_text())
    return content


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe and its complete run, not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "recipe.yaml").write_text(RECIPE)
    for stage in ("train", "export", "benchmark", "gate"):
        process = crqat(folder, stage, "recipe.yaml")
        assert process.returncode == 0, f"{stage}: {process.stdout}{process.stderr}"
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may break."""
    shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


def test_a_good_model_passes(finished: Path) -> None:
    run = finished / "runs" / "small"
    payload = verify_stage(run / "export").payload
    assert [entry["file"] for entry in payload["models"]] == [
        "float.onnx",
        "float16.onnx",
        "onnxruntime.onnx",
        "tensorrt.onnx",
    ]
    measured = results(finished)["models"]
    for file in ("onnxruntime.onnx", "tensorrt.onnx"):
        assert measured[file]["verification"]["status"] == "passed"
        assert abs(measured[file]["versus_float"]["drop_points"]) < 3
    assert 'failures="0"' in (run / "benchmark" / "junit.xml").read_text()


def test_a_second_run_does_nothing(finished: Path) -> None:
    run = finished / "runs" / "small"
    before = {
        stage: ((run / stage).readlink(), read_manifest(run / stage)) for stage in ("train", "export", "benchmark")
    }
    process = crqat(finished, "run", "recipe.yaml")
    assert process.returncode == 0, process.stderr
    said = process.stdout + process.stderr
    for stage in ("train", "export", "benchmark"):
        assert f"{stage} is up to date" in said
        assert ((run / stage).readlink(), read_manifest(run / stage)) == before[stage]


def break_a_layer(folder: Path, layer: str, factor: float) -> None:
    """Multiply a convolution's weight scale in onnxruntime.onnx, codes kept, and make that the current export."""
    run = folder / "runs" / "small"
    with write_stage(run, replace(read_manifest(run / "export"), files={})) as out:
        shutil.copytree(run / "export", out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
        model = onnx.load(out / "onnxruntime.onnx")
        names = {node.name: list(node.input) for node in model.graph.node}
        weight = next(node for node in model.graph.node if node.output[0] == names[layer][1])
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == weight.input[1])
        scale = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array((scale * np.float32(factor)).astype(np.float32), tensor.name))
        onnx.save(model, out / "onnxruntime.onnx")


def test_a_broken_model_fails(copied: Path) -> None:
    break_a_layer(copied, "layer3/2/conv1", 100)
    stale = crqat(copied, "gate", "recipe.yaml")
    assert stale.returncode == 2
    assert "stale" in stale.stderr
    assert crqat(copied, "benchmark", "recipe.yaml").returncode == 0
    measured = results(copied)["models"]
    float_accuracy = measured["float.onnx"]["accuracy"]["top1"]
    assert float_accuracy - measured["onnxruntime.onnx"]["accuracy"]["top1"] > 0.1
    verdict = crqat(copied, "gate", "recipe.yaml")
    assert verdict.returncode == 1, verdict.stdout + verdict.stderr
    text = (copied / "runs" / "small" / "benchmark" / "junit.xml").read_text()
    assert 'type="fail"' in text
    # The other target's file is as good as before.
    assert abs(measured["tensorrt.onnx"]["versus_float"]["drop_points"]) < 3


@pytest.mark.parametrize("command", ["export", "benchmark", "gate", "run"])
def test_one_altered_byte_is_named(copied: Path, command: str) -> None:
    path = copied / "runs" / "small" / "export" / "onnxruntime.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    process = crqat(copied, command, "recipe.yaml")
    assert process.returncode == 2
    assert "Traceback" not in process.stdout + process.stderr
    errors = [line for line in process.stderr.splitlines() if "error" in line]
    assert len(errors) == 1, process.stderr
    assert "runs/small/export/onnxruntime.onnx: altered or damaged" in errors[0]
