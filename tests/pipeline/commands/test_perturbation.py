"""From trained runs to their accuracy under noise: tables, JSON, and the errors of one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from crqat.core.errors import UsageError
from crqat.core.results.analysis import Perturbation
from crqat.core.results.training import TrainingPayload
from crqat.core.run_directory import payload_of, read_manifest, verify_stage
from crqat.core.typed_json import read
from crqat.pipeline.cli import crqat

RECIPE = """
name: trained
compile: never
data: {source: digits, crop_padding: 0, flip: false}
model: {name: "tests.crqat_train.training.test_callbacks:network"}
float: {epochs: 3, batch_size: 100, lr: 0.1}
quantization: {weights: 4, activations: 4, calibration_images: 64}
qat: {epochs: 1, batch_size: 100}
"""


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(crqat, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A folder with a trained run beside one that was only calibrated, both under noise; what the command said."""
    folder = tmp_path_factory.mktemp("folder")
    (folder / "recipe.yaml").write_text(RECIPE)
    common = (folder / "recipe.yaml", "--runs", folder / "runs")
    assert call("train", *common, "--unchecked").exit_code == 0
    alone = ("--set", "name=calibrated", "--set", "qat.epochs=0", "--set", "consistency.teacher=none", "--unchecked")
    assert call("train", *common, *alone).exit_code == 0
    other = ("--run", folder / "runs" / "calibrated", "--draws", "3", "--images", "100")
    return folder, call("sensitivity", *common, "--perturbation", *other)


def report(folder: Path, run: str) -> Perturbation:
    return read(Perturbation, folder / "runs" / run / "perturbation" / "perturbation.json", "")


def test_every_network_of_both_runs_is_measured(measured: tuple[Path, Result]) -> None:
    folder, outcome = measured
    assert outcome.exit_code == 0
    found = report(folder, "trained")
    assert [network.network for network in found.networks] == ["float", "calibrated", "student", "teacher"]
    assert [network.network for network in report(folder, "calibrated").networks] == ["float", "calibrated"]
    assert (found.images, found.draws) == (100, 3)
    for network in found.networks:
        for levels in (network.input_noise, network.weight_noise):
            assert [len(level.accuracy) for level in levels] == [1, 3, 3, 3, 3]
        assert network.input_noise[0] == network.weight_noise[0]
    # The float networks of the two are the same, and so are their images and their noise.
    assert found.networks[0] == report(folder, "calibrated").networks[0]
    assert verify_stage(folder / "runs" / "trained" / "perturbation").payload["draws"] == 3


def test_without_noise_it_is_the_accuracy_of_the_training_and_strong_noise_costs(measured: tuple[Path, Result]) -> None:
    folder, outcome = measured
    for run in ("trained", "calibrated"):
        train = folder / "runs" / run / "train"
        payload = payload_of(TrainingPayload, train, read_manifest(train))
        recorded = {"float": payload.float_network.validation_accuracy}
        recorded |= {name: candidate.validation_accuracy for name, candidate in payload.candidates.items()}
        assert payload.validation_images == 100
        for network in report(folder, run).networks:
            # Without training the student is the calibrated network.
            name = "student" if (run, network.network) == ("calibrated", "calibrated") else network.network
            weakest, strongest = network.input_noise[0], network.input_noise[-1]
            assert weakest.accuracy == [recorded[name]]
            assert min(strongest.loss) > weakest.loss[0]
    assert outcome.stderr.count("noise: 40/40") == outcome.stderr.count("noise: 20/20") == 1


def test_the_tables_show_mean_and_spread(measured: tuple[Path, Result]) -> None:
    folder, outcome = measured
    tables = [line for line in outcome.stdout.splitlines() if line.startswith("noise on")]
    assert len(tables) == 2 and all("validation images: 100; mean ± standard deviation of 3 draws" in t for t in tables)
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in outcome.stdout.splitlines() if "│" in line
    ]
    (accuracy, of_weights) = [row for row in rows if row[:3] == ["trained", "EMA teacher", "top-1 %"]]
    level = report(folder, "trained").networks[3].input_noise[4]
    mean = sum(level.accuracy) / 3
    spread = (sum((value - mean) ** 2 for value in level.accuracy) / 2) ** 0.5
    assert accuracy[-1] == f"{100 * mean:.2f} ± {100 * spread:.2f}"
    assert (
        accuracy[3] == of_weights[3] == f"{100 * report(folder, 'trained').networks[3].input_noise[0].accuracy[0]:.2f}"
    )
    assert {row[1] for row in rows if row[0] == "calibrated"} == {"float", "calibration alone"}


def test_it_is_up_to_date_until_something_else_is_asked(measured: tuple[Path, Result]) -> None:
    common = (measured[0] / "recipe.yaml", "--runs", measured[0] / "runs", "--perturbation", "--images", "100")
    assert "perturbation is up to date" in call("sensitivity", *common, "--draws", "3").stderr
    before: dict[str, Any] = json.loads((measured[0] / "runs/trained/perturbation/manifest.json").read_text())
    assert before["inputs"]["--draws"] == "3"


def test_a_run_of_other_images_is_named(measured: tuple[Path, Result]) -> None:
    folder, outcome = measured
    assert "warning" not in outcome.output
    runs = folder / "other"
    common = (folder / "recipe.yaml", "--runs", runs, "--set", "seed=1")
    assert (
        call("train", *common, "--unchecked", "--set", "qat.epochs=0", "--set", "consistency.teacher=none").exit_code
        == 0
    )
    beside = ("--run", runs / "trained", "--draws", "3", "--images", "100")
    said = call("sensitivity", folder / "recipe.yaml", "--runs", folder / "runs", "--perturbation", *beside)
    assert f"warning: {runs / 'trained'}: has another data.source, data.validation or seed" in said.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--perturbation", "--set", "name=untrained"), r"untrained.train: no such stage yet.*crqat train RECIPE"),
        (("--perturbation", "--run", "nowhere"), r"nowhere.train: no such stage yet.*crqat train RECIPE"),
        (("--perturbation", "--average-bits", "4"), "--average-bits: .* --perturbation"),
        (("--draws", "2"), "apply only with --perturbation; add it"),
    ],
)
def test_errors_are_one_line(measured: tuple[Path, Result], options: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        call("sensitivity", measured[0] / "recipe.yaml", "--runs", measured[0] / "runs", *options)
    assert "\n" not in str(error.value) and error.value.exit_code == 2
