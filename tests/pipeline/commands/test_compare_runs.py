"""Runs side by side: differences by hand, and none where the images are others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from crqat.core.errors import UsageError
from crqat.core.results import answers as packed
from crqat.core.results.benchmark import BenchmarkPayload, Results
from crqat.core.results.export import ExportedModel, ExportPayload, LayerSummary
from crqat.core.results.verification import FloatNode, Fusion
from crqat.core.run_directory import Manifest, manifest_hash, write_stage
from crqat.core.typed_json import from_json, to_json
from crqat.pipeline.cli import crqat
from crqat.pipeline.commands.compare_runs import compare
from crqat.runtime_eval.measure.accuracy import tango
from tests.pipeline.conftest import measured

LABELS = np.array([0, 1] * 300)


def run(folder: Path, wrong: int, labels: np.ndarray[tuple[int], np.dtype[np.int64]] = LABELS) -> Path:
    """A finished run whose file for ONNX Runtime answers the first images wrongly."""
    fusion = Fusion({}, {}, [FloatNode("b", "Conv", "no")], False)
    models = [ExportedModel("float.onnx", "float"), ExportedModel("onnxruntime.onnx", "onnxruntime", fusion=fusion)]
    widths = (("a", 60, 8), ("b", 30, 8), ("c", 10, None))
    layers = [LayerSummary(name, "Conv", macs, 9, bits, 8, None, None) for name, macs, bits in widths]
    export = ExportPayload(folder.name, models, "images.npy", "labels.npy", ["x", "y"], layers=layers)
    with write_stage(folder, Manifest("export", "k", None, {}, {}, to_json(export))) as out:
        np.save(out / "images.npy", np.zeros((len(labels), 1, 2, 2), np.uint8))
        np.save(out / "labels.npy", labels)
    results = measured(0.2, (0.1, 0.3))
    for model in results["models"].values():
        answers = labels.copy()
        if model["target"] != "float":
            answers[:wrong] = 1 - answers[:wrong]
        model["answers"] = packed.pack(answers)
    payload = BenchmarkPayload(from_json(Results, results).device, [])
    with write_stage(
        folder, Manifest("benchmark", "k", manifest_hash(folder / "export"), {}, {}, to_json(payload))
    ) as out:
        (out / "results.json").write_text(json.dumps(results))
    return folder


def test_differences_are_paired_by_image(tmp_path: Path) -> None:
    first, second = run(tmp_path / "first", 10), run(tmp_path / "second", 4)
    rows = {(row.file, row.run): row for row in compare([first, second]).rows}
    assert list(rows)[:4] == [
        ("float.onnx", "first"), ("float.onnx", "second"), ("onnxruntime.onnx", "first"), ("onnxruntime.onnx", "second")
    ]  # fmt: skip
    own = rows["onnxruntime.onnx", "second"]
    assert own.difference_points == pytest.approx(1.0)  # 6 of 600
    assert own.difference_interval_points == pytest.approx([100 * bound for bound in tango(6, 0, 600)])
    assert rows["onnxruntime.onnx", "first"].difference_points is None
    assert rows["float.onnx", "second"].difference_points == 0.0
    assert own.int8_share == pytest.approx(0.6)  # b stays float in the file, c is float in the network
    assert (own.p50_ms, own.size_bytes, own.n) == (1.0, 1024, 600)


def test_runs_on_other_images_are_not_paired(tmp_path: Path) -> None:
    first, second = run(tmp_path / "a" / "run", 10), run(tmp_path / "b" / "run", 4, 1 - LABELS)
    rows = compare([first, second]).rows
    assert {row.unpaired for row in rows if row.run == str(second)} == {"other test images"}
    assert {row.run for row in rows} == {str(first), str(second)}


def test_table_json_and_picture(tmp_path: Path) -> None:
    first, second, picture = run(tmp_path / "first", 10), run(tmp_path / "second", 4), tmp_path / "runs.png"
    result = CliRunner().invoke(crqat, ["compare", str(first), str(second), "--picture", str(picture)])
    assert result.exit_code == 0, result.output
    assert "+1.00 [" in result.output
    assert picture.stat().st_size > 5000
    result = CliRunner().invoke(crqat, ["compare", str(first), str(second), "--json"])
    rows = json.loads(result.stdout)["comparison"]["rows"]
    assert [row["run"] for row in rows] == ["first", "second"] * 3


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    first = run(tmp_path / "first", 10)
    results = first / "benchmark" / "results.json"
    for arguments, message in (
        ([str(first), str(results)], "not a run directory, but"),
        ([str(results), "--picture", "x.png"], "--picture: draws runs"),
        ([str(first), "--picture", str(tmp_path / "x.txt")], "name it .png, .svg or .pdf"),
        ([str(first), "--picture", str(tmp_path / "nowhere" / "x.png")], "make it first"),
        ([str(first), str(tmp_path / "other")], "other: no such file or directory"),
        ([str(first / "benchmark")], f"the directory of a single stage; give the directory of the run, {first}"),
    ):
        result = CliRunner().invoke(crqat, ["compare", *arguments])
        assert isinstance(result.exception, UsageError)
        assert message in str(result.exception)
    with pytest.raises(UsageError):
        compare([tmp_path])
