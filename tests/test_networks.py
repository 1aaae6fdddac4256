"""Each kind of network from a recipe to its verdict, on a few real images: both files verified in integer codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from crqat.pipeline.cli import crqat
from crqat.train.data import sources
from crqat.train.data.dataset import Dataset
from crqat.train.models import build as models
from tests.export.conftest import sane_bn
from tests.needs import require

pytestmark = pytest.mark.slow

# Networks that were hardly trained: what counts is that every stage takes them and that the codes are right.
RECIPE = """
name: {name}
compile: never
data: {{source: "tests.test_networks:few_images", root: {root}, validation: 0.2}}
model: {{name: {model}, weights: {weights}}}
quantization: {{calibration_images: 40}}
qat: {{epochs: 1, batch_size: 40, lr: 0.0001}}
export: {{verify_images: 2}}
benchmark: {{latency_rounds: 6, latency_seconds: 0.6, warm_up_seconds: 0.0, accuracy_batch: 25}}
gate: {{max_accuracy_drop: 60.0, min_int8_coverage: {coverage}}}
"""
# Name of the network -> integer and float convolutions of its file for ONNX Runtime, and the least INT8 coverage in
# TensorRT.
NETWORKS = {
    "cifar/mobilenet_v2": (52, 0, 1.0),
    "torchvision/mobilenet_v3_small": (52, 0, 1.0),
}


def few_images(root: str) -> Dataset:
    """200 training and 50 test images of CIFAR-10, every second pixel."""
    whole = sources.load("cifar10", root, False)
    images = (part[:, :, ::2, ::2].contiguous() for part in (whole.train_images[:200], whole.test_images[:50]))
    train, test = images
    return Dataset(
        train, whole.train_labels[:200], test, whole.test_labels[:50], whole.class_names, whole.preprocessing
    )


@pytest.mark.parametrize("model", NETWORKS)
def test_from_recipe_to_verdict(cifar10_root: Path, tmp_path: Path, model: str) -> None:
    name, (integer, in_float, coverage) = model.replace("/", "_"), NETWORKS[model]
    images = few_images(str(cifar10_root))
    torch.manual_seed(0)
    network = sane_bn(
        models.build(model, 10, 3), torch.from_numpy(images.preprocessing(images.train_images[:100].numpy()))
    )
    weights = tmp_path / "weights.safetensors"
    save_file(network.state_dict(), weights)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(name=name, model=model, root=cifar10_root, weights=weights, coverage=coverage))
    outcome = CliRunner().invoke(crqat, ["run", str(recipe), "--runs", str(tmp_path)], standalone_mode=False)
    # Networks at chance, which the gate does not let pass; everything else does.
    assert outcome.return_value in (1, 4), (outcome.output, outcome.exception)
    judged = json.loads((tmp_path / name / "benchmark" / "verdict.json").read_text())
    assert {rule["rule"] for rule in judged["rules"] if rule["status"] != "pass"} == {"float_accuracy"}
    results: dict[str, Any] = json.loads((tmp_path / name / "benchmark" / "results.json").read_text())
    assert results["dataset"]["n"] == 50
    for file in ("onnxruntime.onnx", "tensorrt.onnx"):
        assert results["models"][file]["verification"]["status"] == "passed"
        assert results["models"][file]["verification"]["codes"] > 10_000
    fusion = results["models"]["onnxruntime.onnx"]["fusion"]
    assert fusion["operations"]["QLinearConv"] == integer
    reasons = [entry["reason"] for entry in fusion["float"] if entry["operation"] == "Conv"]
    assert len(reasons) == in_float
    assert all("is not quantized" in reason for reason in reasons)


# Integer convolutions and linear layers, and those left in float, of networks that are not trained but for one step.
# The rest of `pipeline.commands.model_survey.NETWORKS` is too slow for each test run; docs/models.md has all of them.
STEPPED = {
    "torchvision/squeezenet1_1": (26, 0),
    "torchvision/shufflenet_v2_x1_0": (57, 0),
    "tests.test_networks:small_convnext": (9, 0),
    "tests.test_networks:small_vit": (12, 2),  # attention multiplies its values in float
    "docs.own_network:build": (5, 0),
    "docs.own_backbones:unet": (10, 1),  # one shares its scale with a transposed convolution, which has both signs
    "docs.own_backbones:yolo": (30, 0),
    "timm/mobilenetv2_100": (53, 0),
    "timm/regnetx_002": (45, 0),
    "timm/tinynet_e": (52, 0),  # squeeze-and-excitation
    "timm/mobilevit_xxs": (81, 9),  # attention
}


def small_convnext(classes: int, channels: int) -> torch.nn.Module:
    """LayerNorm, GELU, layer scales and stochastic depth, on one block each of two stages."""
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt  # type: ignore[import-untyped]

    model: torch.nn.Module = ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], 0.2, num_classes=classes)
    return model


def small_vit(classes: int, channels: int) -> torch.nn.Module:
    """Attention, a class token and dropout, in two blocks."""
    from torchvision.models.vision_transformer import VisionTransformer  # type: ignore[import-untyped]

    model: torch.nn.Module = VisionTransformer(64, 16, 2, 4, 64, 128, dropout=0.1, num_classes=classes)
    return model


@pytest.mark.parametrize("name", STEPPED)
def test_mapped_stepped_exported_and_equal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from crqat.pipeline.commands import model_survey
    from crqat.pipeline.commands import model_survey_worker as network

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    if name.startswith("timm/"):
        require("timm")
    engines = name == "docs.own_network:build"
    row = {"status": "measured", **network.measure(name, model_survey.Images(64), engines)}
    assert model_survey.unexplained(row) == []
    assert model_survey.outcome(row) == model_survey.PASSES
    assert model_survey.multiplications(row) == STEPPED[name]
    assert row["verification"]["onnxruntime"]["differing_codes"] == 0
    assert row["verification"]["onnxruntime"]["codes"] > 50_000
    assert row["step"]["unreached"] == []
    assert row["step"]["changed"] > 0.8 * row["step"]["parameters"]
    assert set(row["claims"]["onnxruntime"]) == set(row["claims"]["tensorrt"]) == {"exact"}
