"""The command on the digits: what it shows is what its formula makes of the constants that it wrote."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from crqat.pipeline.cli import crqat
from crqat.pipeline.commands.scale import formula, show
from crqat.train.scaling.model import Constants, Link, predict
from tests.needs import require

ROOT = Path(__file__).parents[3]
DIGITS = str(ROOT / "recipes" / "digits.yaml")
DOCS = "".join((ROOT / "docs" / page).read_text() for page in ("distributed.md", "scaling.md"))
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", DOCS, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Output and JSON of one real measurement with two processes and a second machine."""
    cores = len(os.sched_getaffinity(0))
    require("second core")
    out = tmp_path_factory.mktemp("scale") / "scale.json"
    # Of so many threads two processes fill this machine, or three an odd one; the last number is of several machines.
    arguments = ["scale", DIGITS, "--processes", "1", "--processes", "2", "--processes", "32", "--out", str(out)]
    link = ["--bandwidth", "1e8", "--latency", "1e-3"]
    result = CliRunner(env={"OMP_NUM_THREADS": str(cores // 2)}).invoke(
        crqat, [*arguments, *link], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result.stdout, json.loads(out.read_text())


@pytest.mark.slow
def test_predictions_are_the_formula_of_the_constants(measured: tuple[str, dict[str, Any]]) -> None:
    written = measured[1]["constants"]
    local = Link(*(written["local"][name]["value"] for name in ("latency", "bandwidth")))
    constants = Constants(
        **{name: written[name] for name in ("batch", "gradient_bytes", "image_bytes", "holds")},
        **{name: written[name]["value"] for name in ("step_seconds", "image_seconds", "data_rate")},
        local=local,
        between=Link(1e-3, 1e8),
    )
    assert (constants.batch, constants.image_bytes) == (64, 64)
    rows = measured[1]["predictions"]
    assert [row["processes"] for row in rows] == [1, 2, 32]
    for row in rows:
        assert row == pytest.approx(predict(constants, row["processes"]))
        compute = constants.step_seconds + constants.image_seconds * math.ceil(64 / row["processes"])
        assert row["step_seconds"] >= row["compute_seconds"] == pytest.approx(compute)


@pytest.mark.slow
def test_every_constant_has_its_spread_and_n(measured: tuple[str, dict[str, Any]]) -> None:
    constants = measured[1]["constants"]
    numbers = [constants[name] for name in ("step_seconds", "image_seconds", "data_rate")]
    for number in [*numbers, constants["local"]["latency"], constants["local"]["bandwidth"]]:
        assert number["n"] == 7
        assert len(number["quartiles"]) == 2
        assert number["value"] >= 0
    assert len(measured[1]["measured"]["compute"]) == 3
    sizes = [point["bytes"] for point in measured[1]["measured"]["all_reduce"]]
    assert constants["gradient_bytes"] in sizes
    assert "not measured" in constants["between"]["source"]


@pytest.mark.slow
def test_the_check_is_a_measurement_beside_its_prediction(measured: tuple[str, dict[str, Any]]) -> None:
    output, result = measured
    check = result["check"]
    assert (check["status"], check["processes"], result["backend"]) == ("measured", 2, "gloo")
    assert check["predicted_seconds"] == pytest.approx(result["predictions"][1]["step_seconds"])
    ratio = check["measured_seconds"]["median"] / check["predicted_seconds"]
    assert check["measured_to_predicted"] == pytest.approx(ratio)
    assert f"measured / predicted {ratio:.2f}" in output


@pytest.mark.slow
def test_the_table_shows_the_predictions_as_such(measured: tuple[str, dict[str, Any]]) -> None:
    output, result = measured
    assert "predicted from constants measured on this machine" in output
    assert "predicted s / step" in output
    for row in result["predictions"]:
        assert re.search(rf"│ {row['processes']} +│ .*{row['step_seconds']:.4g} .*{row['limit']}", output)
    for line in formula(result["constants"]):
        assert line in output
    assert f"{result['constants']['gradient_bytes']} B" in output


@pytest.mark.slow
def test_a_row_without_its_constant_shows_no_number(
    measured: tuple[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"processes": 64, "machines": 32, "not_predicted": "the link between machines was not given"}
    constants = {**measured[1]["constants"], "between": None}
    check = {"status": "not run: this machine holds 1 process"}
    show({**measured[1], "predictions": [row], "constants": constants, "check": check})
    output = capsys.readouterr().out
    assert "not predicted" in output
    assert "the link between machines was not given" in output
    assert "measured and predicted: not run: this machine holds 1 process" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bandwidth", "1e9"], "give both"),
        (["--latency", "1e-3"], "give both"),
        (["--bandwidth", "nan", "--latency", "0"], "bytes per second above 0"),
        (["--bandwidth", "0", "--latency", "0"], "bytes per second above 0"),
        (["--bandwidth", "1e9", "--latency", "-1"], "seconds from 0"),
        (["--set", "qat.epochs=0"], "qat.epochs: 0 trains nothing"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_measured(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(crqat, ["scale", DIGITS, *arguments])
    assert message in str(result.exception)


def test_the_pages_have_their_scripts_and_manifests() -> None:
    kinds = [kind for kind, _ in BLOCKS]
    assert kinds.count("yaml") >= 2
    assert kinds.count("sh") >= 4
    assert all(kind in ("sh", "yaml", "text") for kind in kinds)


@pytest.mark.parametrize("text", [text for kind, text in BLOCKS if kind == "sh"])
def test_shell_on_the_pages_parses(text: str) -> None:
    result = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("text", [text for kind, text in BLOCKS if kind == "yaml"])
def test_manifests_on_the_pages_are_of_kinds_that_run_torch(text: str) -> None:
    for document in yaml.safe_load_all(text):
        assert (document["apiVersion"], document["kind"]) in {
            ("trainer.kubeflow.org/v1alpha1", "TrainJob"),
            ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime"),
            ("kubeflow.org/v1", "PyTorchJob"),
        }
        assert ("torchrun" in yaml.safe_dump(document)) == (document["kind"] != "TrainingRuntime")
