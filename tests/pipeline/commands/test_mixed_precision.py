"""From a trained run to a proposal of mixed bit widths, and on with the proposed recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from matplotlib.image import imread

from crqat.core.run_directory import read_manifest, verify_stage
from crqat.pipeline.cli import crqat
from crqat.pipeline.recipe import recipe
from crqat.pipeline.recipe.yaml import read_yaml

RECIPE = """
name: small
compile: never
data: {source: digits, crop_padding: 0, flip: false}
model: {name: "tests.crqat_train.training.test_callbacks:network"}
float: {epochs: 3, batch_size: 100, lr: 0.1}
quantization: {weights: 4, activations: 4, calibration_images: 64}
qat: {epochs: 0, freeze_bn_at: 0.5}
consistency: {teacher: none}
export: {verify_images: 4}
"""


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(crqat, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A folder with a trained run and its sensitivity at 4 bits on average, and what the command said."""
    folder = tmp_path_factory.mktemp("folder")
    (folder / "recipe.yaml").write_text(RECIPE)
    common = (folder / "recipe.yaml", "--runs", folder / "runs")
    assert call("train", *common).exit_code == 0
    return folder, call("sensitivity", *common, "--average-bits", "4", "--images", "32")


def report(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "runs" / "small" / "sensitivity" / "sensitivity.json").read_text())
    return loaded


def test_the_table_shows_every_layer_and_the_sums(measured: tuple[Path, Result]) -> None:
    folder, outcome = measured
    assert outcome.exit_code == 0
    lines = outcome.stdout.splitlines()
    assert "images: 32" in lines[0]
    for row in report(folder)["layers"]:
        (line,) = [line for line in lines if f" {row['layer']} " in line]
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert cells[1] == str(row["weights"])
        assert cells[-1] == str(row["bits"])
        assert [float(cell) for cell in cells[2:-1]] == pytest.approx(list(row["divergence"].values()), rel=0.01)
    assert any(line.startswith("mean bit width of the weights: ") and "4 allowed" in line for line in lines)


def test_the_proposal_respects_the_size(measured: tuple[Path, Result]) -> None:
    found = report(measured[0])
    layers = found["layers"]
    assert [(row["layer"], row["weights"]) for row in layers] == [("conv1", 72), ("conv2", 72), ("fc", 1280)]
    mean = sum(row["weights"] * row["bits"] for row in layers) / sum(row["weights"] for row in layers)
    assert found["average_bits"] == {"asked": 4.0, "proposed": pytest.approx(mean)}
    assert mean <= 4
    assert found["divergence"]["uniform"]["bits"] == 4
    assert found["divergence"]["sum"] <= sum(row["divergence"]["4"] for row in layers)


def test_the_picture_is_one(measured: tuple[Path, Result]) -> None:
    picture = imread(measured[0] / "runs" / "small" / "sensitivity" / "sensitivity.png")
    assert picture.shape[0] > 200 and picture.shape[1] > 500
    assert picture[..., :3].std() > 0.05


def test_the_recipe_says_what_differs_and_trains_and_exports(measured: tuple[Path, Result]) -> None:
    folder, _ = measured
    path = folder / "runs" / "small" / "sensitivity" / "recipe.yaml"
    written = read_yaml(path)
    assert isinstance(written, dict)
    bits = {row["layer"]: row["bits"] for row in report(folder)["layers"]}
    overrides = {layer: {"weights": width, "activations": width} for layer, width in bits.items()}
    usual = recipe.load(folder / "recipe.yaml")
    assert written["quantization"] == {"weights": 4, "activations": 4, "overrides": overrides, "calibration_images": 64}
    assert written["qat"] == {"epochs": 0, "freeze_bn_at": 0.5}
    assert written["data"] == {"source": "digits", "crop_padding": 0, "flip": False}
    weights = str(folder / "runs" / "small" / "train" / "float.safetensors")
    assert written["model"] == {"name": usual.model.name, "weights": weights}
    assert "float" not in written and "gate" not in written
    options = ("--runs", folder / "runs", "--set", "qat.epochs=1")
    assert call("train", path, *options).exit_code == 0
    assert call("export", path, *options).exit_code == 0
    run = folder / "runs" / "small-mixed"
    layout = json.loads((run / "train" / "layout.json").read_text())
    trained = {row["edge"].split(".")[1].split("/")[0]: row["bits"] for row in layout if row["kind"] == "weight"}
    assert trained == {layer: 7 if (layer, width) == ("conv1", 8) else width for layer, width in bits.items()}
    for entry in verify_stage(run / "export").payload["models"][2:]:
        assert (entry["verification"]["status"], entry["verification"]["differing_codes"]) == ("passed", 0)


def test_it_is_a_stage_behind_train(measured: tuple[Path, Result]) -> None:
    folder, _ = measured
    common = (folder / "recipe.yaml", "--runs", folder / "runs", "--images", "32")
    before = (folder / "runs" / "small" / "sensitivity").readlink()
    again = call("sensitivity", *common, "--average-bits", "4")
    assert "sensitivity is up to date" in again.stderr
    assert (folder / "runs" / "small" / "sensitivity").readlink() == before
    assert read_manifest(folder / "runs" / "small" / "sensitivity").payload["average_bits"]["asked"] == 4
    wrong = CliRunner().invoke(crqat, ["sensitivity", *map(str, common), "--set", "seed=3"])
    assert "run `crqat train RECIPE` first" in str(wrong.exception)
