"""The networks' table: it agrees with the command's list, and no row has a gap without a reason."""

from __future__ import annotations

import json
import sys
from collections import Counter
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


def test_nearly_all_networks_pass_and_none_ends_in_a_traceback() -> None:
    classes = Counter(map(model_survey.outcome, ROWS.values()))
    assert len(ROWS) >= 60
    assert classes[model_survey.PASSES] + classes[model_survey.NOT_PROVABLE] >= 55
    assert not {"traceback", "time limit", "not run", "failed", "float without a reason"} & set(classes)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row["status"] == "measured"])
def test_no_row_has_an_unexplained_gap(name: str) -> None:
    row = ROWS[name]
    assert row["verification"]["onnxruntime"]["codes"] > 20_000
    assert row["claims"]["onnxruntime"]["exact"] == row["mapped"]["quantizers"]
    # A step moves few of what starts at 0 or behind a layer scale of 1e-5; "unreached" says what gets no gradient.
    assert row["step"]["changed"] > 0.3 * row["step"]["parameters"]
    if model_survey.outcome(row) == model_survey.PASSES:
        assert model_survey.unexplained(row) == []


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row["status"] != "measured"])
def test_each_refusal_is_one_line_that_says_why(name: str) -> None:
    status = str(ROWS[name]["status"])
    assert status.startswith("refused: ") and "\n" not in status and len(status) > 40


def test_a_row_has_its_class_and_its_share() -> None:
    row = next(row for row in ROWS.values() if model_survey.outcome(row) == model_survey.PASSES)
    float_half = {"all": 10, "float": {"conv": 5}}
    fused = {**row["fusion"], "float": [{"node": "conv", "operation": "Conv", "reason": "behind a sigmoid"}]}
    half = {**row, "macs": float_half, "fusion": fused}
    assert model_survey.int8_share(half) == 0.5
    assert model_survey.outcome(half) == model_survey.PASSES
    assert "50.00 % of 0 M MACs" in model_survey.cells("a", half)
    fused["float"][0]["reason"] = UNEXPLAINED
    assert model_survey.outcome(half) == "float without a reason"
    proof = {**row["verification"], "tensorrt": {"status": "not run: logits: nothing is left"}}
    assert model_survey.outcome({**row, "verification": proof}) == model_survey.NOT_PROVABLE
    proof["tensorrt"] = {"status": "not run: the simulator does not know Loop"}
    assert model_survey.outcome({**row, "verification": proof}) == "inconclusive"
    for status, kind in (
        ("refused: model.name: a sentence", "refused"),
        ("failed: not finished after 3 s", "time limit"),
        ("failed: its process was ended by SIGSEGV", "failed"),
        ("failed: internal error in a: KeyError; traceback in /tmp/a.txt", "traceback"),
        ("not run: it needs timm", "not run"),
    ):
        assert model_survey.outcome({"status": status}) == kind


def test_gaps_are_found() -> None:
    row = next(row for row in ROWS.values() if model_survey.outcome(row) == model_survey.PASSES)
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
    assert refused["status"].startswith('refused: model.name: "torchvision/resnet19" is not a known ')
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

    def measure(name: str, _: model_survey.Images, limit: float, engines: bool) -> dict[str, Any]:
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
    assert isinstance(refused, UsageError) and "or replace it with --force" in str(refused)
    assert measured == [] and page.read_text() == "mine"
    assert models("--out", "docs/models.md", "--force").return_value == 0
    assert page.read_text().startswith("# Networks")
    assert models("--out", "docs/models.md").return_value == 0, "its own it goes on with"
    row |= {"status": "failed: killed"}
    assert models().return_value == 1


def test_rows_of_other_networks_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {**next(iter(ROWS.values())), "total_seconds": 1.0}
    asked: list[tuple[str, float, bool]] = []

    def measure(name: str, images: model_survey.Images, limit: float, engines: bool) -> dict[str, Any]:
        asked.append((name, limit, engines))
        return {**row, "images": str(images)}

    monkeypatch.setattr(model_survey, "measure", measure)
    out = tmp_path / "folder" / "models.md"
    for name in ("torchvision/resnet18", "timm/resnet18"):
        outcome = CliRunner().invoke(crqat, ["models", name, "--size", "64", "--out", str(out)], standalone_mode=False)
        assert outcome.exception is None, outcome.exception
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert list(rows) == ["torchvision/resnet18", "timm/resnet18"]
    assert "normal noise, 64 px" in out.read_text()
    del asked[:]
    for size in ("64", "96"):
        arguments = ["models", "timm/resnet18", "--resume", "--no-engines", "--limit", "9", "--size", size]
        assert CliRunner().invoke(crqat, [*arguments, "--out", str(out)], standalone_mode=False).exception is None
    assert asked == [("timm/resnet18", 9.0, False)], "only the images that it has no row of"
    out.with_suffix(".json").write_text("{}")
    with pytest.raises(UsageError, match="not written by this version"):
        model_survey.run(["timm/resnet18"], None, 64, out)
    with pytest.raises(UsageError, match="holds no cifar-10-batches-py"):
        model_survey.run([], tmp_path, 64, out)
