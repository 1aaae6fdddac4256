"""The networks' table: it agrees with the command's list, and no row has a gap without a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from artifacts.errors import UsageError
from pipeline import networks
from pipeline.cli import crqat

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "models.md"
ROWS: dict[str, dict[str, Any]] = json.loads(PAGE.with_suffix(".json").read_text())["rows"]


def test_the_page_has_the_commands_networks_and_is_written_from_the_rows() -> None:
    assert set(ROWS) == set(networks.NETWORKS)
    assert PAGE.read_text() == networks.document(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_no_row_has_an_unexplained_gap(name: str) -> None:
    row = ROWS[name]
    assert networks.unexplained(row) == []
    if row["status"] == "measured":
        assert row["verification"]["onnxruntime"]["codes"] > 50_000
        assert row["claims"]["onnxruntime"]["exact"] == row["mapped"]["quantizers"]
        assert row["engine"]["status"] == "built"
        assert row["step"]["changed"] > 0.6 * row["step"]["parameters"]


def test_gaps_are_found() -> None:
    row = next(row for row in ROWS.values() if row["status"] == "measured")
    runtime = {**row["verification"]["onnxruntime"], "status": "failed: runtime: 1 codes"}
    mystery = {"node": "n", "operation": "Conv", "reason": networks.UNEXPLAINED}
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
        assert len(networks.unexplained({**row, **change})) == 1, change
    assert networks.unexplained({"status": "refused: model.name: a sentence of some length"}) == []


def test_a_network_that_is_refused_or_never_ends_has_a_row_that_says_so(tmp_path: Path) -> None:
    refused = networks.measure("torchvision/resnet19", networks.Images(32))
    assert refused["status"].startswith('refused: model.name: "torchvision/resnet19" is no ')
    stopped = networks.measure("torchvision/resnet18", networks.Images(32), limit=0.05)
    assert stopped["status"] == "failed: not finished after 0.05 s"
    page = networks.document({"torchvision/resnet19": refused})
    assert "did you mean" in page and page.count("\n| torchvision/") == 1


def test_rows_of_other_networks_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {**next(iter(ROWS.values())), "total_seconds": 1.0}
    monkeypatch.setattr(networks, "measure", lambda name, images: {**row, "images": str(images)})
    out = tmp_path / "folder" / "models.md"
    for name in ("torchvision/resnet18", "timm/resnet18"):
        outcome = CliRunner().invoke(crqat, ["models", name, "--size", "64", "--out", str(out)], standalone_mode=False)
        assert outcome.exception is None, outcome.exception
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert list(rows) == ["torchvision/resnet18", "timm/resnet18"]
    assert "normal noise, 64 px" in out.read_text()
    out.with_suffix(".json").write_text("{}")
    with pytest.raises(UsageError, match="not written by this version"):
        networks.run(["timm/resnet18"], None, 64, out)
    with pytest.raises(UsageError, match="holds no cifar-10-batches-py"):
        networks.run([], tmp_path, 64, out)
