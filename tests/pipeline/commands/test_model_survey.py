"""The networks' table: it agrees with the command's list, and no row has a gap without a reason."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from crqat.core.errors import UsageError
from crqat.export.verification import UNEXPLAINED
from crqat.pipeline.cli import crqat
from crqat.pipeline.commands import model_survey

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "models.md"
ROWS: dict[str, dict[str, Any]] = json.loads(PAGE.with_suffix(".json").read_text())["rows"]


def test_the_page_has_the_commands_networks_and_is_written_from_the_rows() -> None:
    assert set(ROWS) == set(model_survey.NETWORKS)
    assert PAGE.read_text() == model_survey.document(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_no_row_has_an_unexplained_gap(name: str) -> None:
    row = ROWS[name]
    assert model_survey.unexplained(row) == []
    if row["status"] == "measured":
        assert row["verification"]["onnxruntime"]["codes"] > 50_000
        assert row["claims"]["onnxruntime"]["exact"] == row["mapped"]["quantizers"]
        assert row["engine"]["status"] == "built"
        assert row["step"]["changed"] > 0.6 * row["step"]["parameters"]


def test_gaps_are_found() -> None:
    row = next(row for row in ROWS.values() if row["status"] == "measured")
    runtime = {**row["verification"]["onnxruntime"], "status": "failed: runtime: 1 codes"}
    mystery = {"node": "n", "operation": "Conv", "reason": UNEXPLAINED}
    layer = {
        "node": "n",
        "macs": 1,
        "reason": "multiplies Half by Half",
        "why": "multiplies Half, though both operands",
    }
    for change in (
        {"verification": {**row["verification"], "onnxruntime": runtime}},
        {"fusion": {**row["fusion"], "float": [mystery]}},
        {"engine": {**row["engine"], "uncovered": [layer]}},
        {"engine": {**row["engine"], "status": "failed: parser"}},
        {"step": {**row["step"], "unreached": ["conv.weight"]}},
        {"findings": {"tensorrt": ["a rule"]}},
        {"status": "failed: not finished after 1 s"},
    ):
        assert len(model_survey.unexplained({**row, **change})) == 1, change
    assert model_survey.unexplained({"status": "refused: model.name: a sentence of some length"}) == []


def test_a_network_that_is_refused_or_never_ends_has_a_row_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if sys.version_info >= (3, 11):  # where Python can be asked to leave the current folder out
        Path("onnx.py").write_text("raise RuntimeError('a file of the user takes the place of a library')")
    refused = model_survey.measure("torchvision/resnet19", model_survey.Images(32))
    assert refused["status"].startswith('refused: model.name: "torchvision/resnet19" is no ')
    stopped = model_survey.measure("torchvision/resnet18", model_survey.Images(32), limit=0.05)
    assert stopped["status"] == "failed: not finished after 0.05 s"
    page = model_survey.document({"torchvision/resnet19": refused})
    assert "did you mean" in page and page.count("\n| torchvision/") == 1


def test_the_exit_code_tells_a_failure_from_an_error() -> None:
    row = next(row for row in ROWS.values() if row["status"] == "measured")

    def proof(status: str) -> dict[str, Any]:
        return {**row, "verification": {**row["verification"], "onnxruntime": {"status": status}}}

    assert model_survey.exit_code([row]) == 0
    refused, lacking = {"status": "refused: model.name: unknown"}, {"status": "not run: it needs timm"}
    assert model_survey.exit_code([row, refused]) == 2
    assert model_survey.exit_code([row, refused, lacking]) == 3
    assert model_survey.exit_code([row, proof("not run: an operation")]) == 4
    for failed in (
        {"status": "failed: its process was ended by SIGSEGV"},
        proof("failed: runtime: 3 codes"),
        {**row, "engine": {**row["engine"], "status": "failed: parse"}},
        {**row, "findings": {"tensorrt": ["a rule"]}},
        {**row, "step": {**row["step"], "unreached": ["conv.weight"]}},
    ):
        assert model_survey.exit_code([lacking, failed, refused]) == 1


def test_models_overwrites_nothing_that_it_has_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {**next(iter(ROWS.values())), "total_seconds": 1.0}
    measured: list[str] = []

    def measure(name: str, _: model_survey.Images) -> dict[str, Any]:
        measured.append(name)
        return {**row, "images": "noise"}

    monkeypatch.setattr(model_survey, "measure", measure)
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "docs" / "models.md"
    page.parent.mkdir()
    page.write_text("mine")

    def models(*options: str) -> Any:
        arguments = ["models", "timm/resnet18", *options]
        return CliRunner().invoke(crqat, arguments, standalone_mode=False)

    assert models().return_value == 0
    assert page.read_text() == "mine" and [path.name for path in page.parent.iterdir()] == ["models.md"]
    del measured[:]
    refused = models("--out", "docs/models.md").exception
    assert isinstance(refused, UsageError) and "or replace it by --force" in str(refused)
    assert measured == [] and page.read_text() == "mine"
    assert models("--out", "docs/models.md", "--force").return_value == 0
    assert page.read_text().startswith("# Networks")
    assert models("--out", "docs/models.md").return_value == 0, "its own it goes on with"
    row |= {"status": "failed: killed"}
    assert models().return_value == 1


def test_rows_of_other_networks_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {**next(iter(ROWS.values())), "total_seconds": 1.0}
    monkeypatch.setattr(model_survey, "measure", lambda name, images: {**row, "images": str(images)})
    out = tmp_path / "folder" / "models.md"
    for name in ("torchvision/resnet18", "timm/resnet18"):
        outcome = CliRunner().invoke(crqat, ["models", name, "--size", "64", "--out", str(out)], standalone_mode=False)
        assert outcome.exception is None, outcome.exception
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert list(rows) == ["torchvision/resnet18", "timm/resnet18"]
    assert "normal noise, 64 px" in out.read_text()
    out.with_suffix(".json").write_text("{}")
    with pytest.raises(UsageError, match="not written by this version"):
        model_survey.run(["timm/resnet18"], None, 64, out)
    with pytest.raises(UsageError, match="holds no cifar-10-batches-py"):
        model_survey.run([], tmp_path, 64, out)
