"""The published ResNet-20: the proposed bit widths keep to the size, and their recipe is verified like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from crqat.core.run_directory import verify_stage
from crqat.pipeline.cli import crqat

pytestmark = pytest.mark.slow

RECIPE = Path(__file__).parent.parent / "recipes" / "cifar10_resnet20_w4a4.yaml"


@pytest.fixture(scope="module")
def run(cifar10_root: Path, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of all runs, with the proposal at 4 bits on average and its train and export stages."""
    runs = tmp_path_factory.mktemp("runs")
    values = {
        "data.root": cifar10_root,
        "data.download": "false",
        "data.validation": 0.01,
        "model.weights": shared_data / "weights" / "resnet20-12fca82f.th",
        "quantization.calibration_images": 64,
        "qat.epochs": 0,
        "export.verify_images": 4,
        "compile": "never",
    }
    options = [argument for key, value in values.items() for argument in ("--set", f"{key}={value}")]
    proposed = runs / "cifar10_resnet20_w4a4" / "sensitivity" / "recipe.yaml"
    for arguments in (
        ["train", RECIPE, *options],
        ["sensitivity", RECIPE, *options, "--average-bits", "4", "--images", "24"],
        ["train", proposed],
        ["export", proposed],
    ):
        command = [*map(str, arguments), "--runs", str(runs)]
        outcome = CliRunner().invoke(crqat, command, catch_exceptions=False)
        assert outcome.exit_code in (0, None), outcome.output
    return runs


def test_the_proposal_keeps_to_the_size_and_is_closer_to_float_than_one_width(run: Path) -> None:
    report = json.loads((run / "cifar10_resnet20_w4a4" / "sensitivity" / "sensitivity.json").read_text())
    layers = report["layers"]
    assert len(layers) == 20 and sum(row["weights"] for row in layers) == 268_336
    mean = sum(row["weights"] * row["bits"] for row in layers) / 268_336
    assert mean == pytest.approx(report["average_bits"]["proposed"])
    assert 3.9 < mean <= 4.0
    # Measured on 128 images: 0.023 against 0.410.
    divergence = report["divergence"]
    assert divergence["together"] < 0.5 * divergence["uniform"]["together"]


def test_the_proposed_recipe_trains_and_exports(run: Path) -> None:
    mixed = run / "cifar10_resnet20_w4a4-mixed"
    layout = json.loads((mixed / "train" / "layout.json").read_text())
    assert len({row["bits"] for row in layout if row["kind"] == "weight"}) >= 3
    entries = [entry for entry in verify_stage(mixed / "export").payload["models"] if "verification" in entry]
    assert [entry["target"] for entry in entries] == ["onnxruntime", "tensorrt"]
    for entry in entries:
        assert (entry["verification"]["status"], entry["verification"]["differing_codes"]) == ("passed", 0)
        assert {claim["claim"] for claim in entry["claims"].values()} == {"exact"}
