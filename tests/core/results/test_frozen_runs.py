"""Each file that an earlier version left behind reads as its dataclass, and says the same when it is written again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from crqat.core import strict_json
from crqat.core.errors import UsageError
from crqat.core.results.benchmark import BenchmarkPayload, Results, read_results
from crqat.core.results.engine import Engines
from crqat.core.results.export import ExportPayload
from crqat.core.results.training import Epoch, TrainingPayload
from crqat.core.run_directory import Manifest, payload_of, read_manifest
from crqat.core.typed_json import from_json, to_json

RUNS = sorted((Path(__file__).parents[2] / "frozen").glob("v*/frozen"))


def holds(written: Any, read: Any) -> bool:
    """Whether everything that was read is in what is written as it was; null and empty values may be left out."""
    if isinstance(read, dict):
        return all(holds(written.get(key), value) for key, value in read.items() if value not in (None, [], {}))
    if isinstance(read, list):
        return len(written) == len(read) and all(map(holds, written, read))
    return bool(written == read)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.parent.name)
@pytest.mark.parametrize(("file", "layout"), [("results.json", Results), ("engine.json", Engines)])
def test_a_file_of_a_benchmark(run: Path, file: str, layout: type) -> None:
    data = strict_json.read(run / "benchmark" / file)
    read: object = from_json(layout, data)
    assert holds(to_json(read), data)
    assert from_json(layout, to_json(read)) == read


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.parent.name)
@pytest.mark.parametrize(
    ("stage", "layout"),
    [("train", TrainingPayload), ("export", ExportPayload), ("benchmark", BenchmarkPayload)],
)
def test_a_payload(run: Path, stage: str, layout: type) -> None:
    manifest = read_manifest(run / stage)
    payload: object = payload_of(layout, run / stage, manifest)
    assert holds(to_json(payload), manifest.payload)
    assert from_json(layout, to_json(payload)) == payload


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.parent.name)
def test_a_history(run: Path) -> None:
    epochs = [from_json(Epoch, json.loads(line)) for line in (run / "train/history.jsonl").read_text().splitlines()]
    assert {epoch.phase for epoch in epochs} <= {"float", "qat"} and epochs[-1].validation is not None


def test_a_damaged_payload_names_the_manifest_the_key_and_the_stage_to_run() -> None:
    run = RUNS[-1]
    manifest = read_manifest(run / "train")
    manifest.payload["candidates"]["student"]["validation_accuracy"] = "1"
    with pytest.raises(
        UsageError,
        match=r"train/manifest\.json: the payload: damaged: candidates\.student\.validation_accuracy is not a finite "
        r"number; run the stage again with --force \(crqat train RECIPE\)",
    ):
        payload_of(TrainingPayload, run / "train", manifest)


def test_a_payload_of_another_version_names_the_crqat_that_wrote_it() -> None:
    environment = {"versions": {"crqat-edge": "9.8.7"}}
    manifest = Manifest("export", "key", None, {}, environment, {"schema_version": 2})
    with pytest.raises(UsageError, match=r"written by crqat 9\.8\.7 with schema version 2, and this crqat reads 1"):
        payload_of(ExportPayload, Path("run/export"), manifest)


def test_results_of_no_version_that_this_crqat_knows(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text('{"schema_version": 7, "crqat_version": "2.0"}')
    with pytest.raises(UsageError, match=r"results\.json: written by crqat 2\.0 with schema version 7.*crqat ben"):
        read_results(path)
