from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from crqat.core.errors import ToolError, UsageError
from crqat.core.results.study import StudyResults, StudyRow
from crqat.core.run_directory import sha256_file
from crqat.core.typed_json import read, text
from crqat.pipeline.cli import crqat
from crqat.pipeline.study import report, runner, study
from crqat.pipeline.study.worker import packed
from crqat.train.data import sources

RECIPE = """
name: tiny
compile: never
data: {source: digits, crop_padding: 0, flip: false, labeled: 200}
model: {name: "tiny_network:network"}
float: {epochs: 2, batch_size: 20, lr: 0.1}
quantization: {calibration_images: 20}
qat: {epochs: 6, batch_size: 20, lr: 0.01}
"""


NETWORK = """
from torch import nn


def network(classes: int, channels: int) -> nn.Module:
    first, second = nn.Conv2d(channels, 8, 3), nn.Conv2d(8, 8, 3, 2)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(32, classes))
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe, and beside it the module of its network, which all processes find."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "tiny_network.py").write_text(NETWORK)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "recipe.yaml"


def planned(path: Path, seeds: tuple[int, ...] = (0,), **changes: Any) -> list[study.Job]:
    made = study.load(path, (), path.parent / "out.md", path.parent / "runs")
    given: dict[str, Any] = {"methods": ("cr-unlabeled",), "labels": [200], "bits": [None], "equal": "steps", **changes}
    return made.plan(given["methods"], seeds, given["labels"], given["bits"], given["equal"])


def found(out: Path) -> dict[str, StudyRow]:
    """The rows by method."""
    return {row.method: row for row in read(StudyResults, out.with_suffix(".json"), "").rows}


def test_a_training_has_a_key_of_all_that_it_depends_on(path: Path) -> None:
    jobs = planned(path, (0, 1))
    assert [(job.training, job.seed) for job in jobs] == [
        ("float", 0), ("cr-unlabeled", 0), ("float", 1), ("cr-unlabeled", 1),
    ]  # fmt: skip
    assert jobs[1].start == jobs[0].name
    assert [job.key for job in jobs] == [job.key for job in planned(path, (0, 1))]
    others = [*planned(path, labels=[100]), *planned(path, bits=[4])]
    assert len({job.key for job in (*jobs, *others)}) == 8
    path.write_text(RECIPE.replace("epochs: 2", "epochs: 3"))  # of the float network, which the other starts from
    assert not {job.key for job in jobs} & {job.key for job in planned(path, (0, 1))}


def test_the_published_rows_are_current() -> None:
    """Keys of a recipe that were added since have their defaults in these trainings."""
    root = Path(__file__).parents[3]
    published = root / "docs" / "study" / "resnet20_w4a4.json"
    made = study.load(root / "recipes" / "study_resnet20_w4a4.yaml", (), published.with_suffix(".md"), Path("runs"))
    current = {(job.training, job.seed): job.key for job in made.plan((), (0, 1, 2), [4000], [None], "steps")}
    assert {row.key for row in made.rows} == {current[row.training, row.seed] for row in made.rows}


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("tracker: tensorboard\n", True),
        ("gate: {min_accuracy: 0.5}\n", True),
        ("ptq: {adaround: false}\n", True),
        ("ptq: {adaround: true}\n", False),
    ],
)
def test_a_key_is_of_what_a_training_computes(path: Path, text: str, same: bool) -> None:
    before = [job.key for job in planned(path)]
    path.write_text(RECIPE + text)
    assert ([job.key for job in planned(path)] == before) is same


def test_a_setting_that_came_later_counts_where_it_is_not_default(path: Path) -> None:
    before = planned(path)[0].key
    path.write_text(RECIPE.replace("labeled: 200", "labeled: 200, judging: null"))
    assert planned(path)[0].key == before
    path.write_text(RECIPE.replace("labeled: 200", "labeled: 200, judging: 0.1"))
    assert planned(path)[0].key != before


def test_with_all_labels_the_labeled_images_are_the_unlabeled_ones_too(path: Path) -> None:
    _, job = planned(path, labels=[None])
    assert "data.unlabeled=digits" in job.overrides
    assert not any("data.unlabeled=" in text for text in planned(path)[1].overrides)


def test_equal_time_changes_the_steps_by_the_times_of_equal_steps(path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"^--equal time: needs the times of cr-unlabeled; run the same study with --equal"
    ):
        planned(path, equal="time")
    made = study.load(path, (), path.with_name("out.md"), path.parent / "runs")
    for job in planned(path, methods=("qat", "cr-unlabeled")):
        found = {name: {"validation": 0.5, "correct": ""} for name in ("float", "student", "teacher")}
        made.add(
            job, {"seconds": {"float": 5.0, "qat": 10.0, "cr-unlabeled": 30.0}[job.training], "n": 0, "networks": found}
        )
    path.with_name("out.json").write_text(text(StudyResults({}, "", {}, made.rows)))
    _, job = planned(path, equal="time")
    assert "qat.epochs=2" in job.overrides  # a third of six


def test_a_result_from_another_float_network_is_computed_again(path: Path) -> None:
    made = study.load(path, (), path.with_name("out.md"), path.parent / "runs")
    start, job = planned(path)
    networks = {name: {"validation": 0.5, "correct": ""} for name in ("float", "student", "teacher")}
    weights = made.weights(start.name)
    weights.parent.mkdir()
    for content in (b"one machine's", b"another's"):
        weights.write_bytes(content)
        assert not made.done(job)
        made.add(job, {"seconds": 1.0, "n": 0, "networks": networks})
        assert made.done(job) and [row.method for row in made.rows] == ["cr-unlabeled"]
    weights.unlink()  # a study without the weights takes its results as they are
    assert made.done(job)


def test_a_study_without_its_float_network_trains_that_and_what_descends_from_it_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = study.load(path, (), path.with_name("out.md"), path.parent / "runs")
    trained: list[str] = []
    content = b"one machine's"

    class Ended(subprocess.CompletedProcess[bytes]):
        def poll(self) -> int:
            return 0

    def start(made: study.Study, job: study.Job) -> Any:
        trained.append(job.training)
        file = made.runs / job.name / "train" / "float.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        one = {"validation": 0.5, "correct": packed(torch.ones(8) > 0)}
        networks = dict.fromkeys(("float", "student", "teacher"), one)
        (made.runs / f"{job.name}.result").write_text(json.dumps({"seconds": 1.0, "n": 8, "networks": networks}))
        return Ended([], 0)

    def run(*methods: str) -> list[str]:
        trained.clear()
        assert runner.run(made, planned(path, methods=methods), 1) == []
        return trained

    monkeypatch.setattr(runner, "_start", start)
    weights = made.weights(planned(path)[0].name)
    assert run("qat", "cr-unlabeled") == ["float", "qat", "cr-unlabeled"]
    assert run("qat", "cr-unlabeled") == []
    weights.unlink()
    assert run("qat", "cr-unlabeled", "pi") == ["float", "pi"]  # the same weights again
    assert f"runs again, because others start from its weights, and {weights} is missing" in capsys.readouterr().err
    weights.unlink()
    content = b"another's"
    assert run("qat", "cr-unlabeled", "pi", "cr") == ["float", "cr", "qat", "pi", "cr-unlabeled"]
    assert all(row.lineage == [sha256_file(weights)[:16]] for row in made.rows)
    weights.write_bytes(b"damaged")
    assert run("qat") == ["float", "qat"]
    assert f"because its result descends from other weights than {weights} has" in capsys.readouterr().err
    # A float network in the middle of a lineage is like one at its beginning.
    assert run("float-strong+qat") == ["float-strong", "float-strong+qat"]
    made.weights(planned(path, methods=("float-strong",))[1].name).write_bytes(b"damaged")
    assert run("float-strong+qat", "qat") == ["float-strong", "float-strong+qat"]


def test_no_place_for_the_float_networks_is_said_before_anything_is_trained(path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--out: .*/out has no suffix; name a Markdown file, such as .*/out\.md$"):
        study.load(path, (), path.with_name("out"), path.parent / "runs")
    made = study.load(path, (), path.with_name("taken.md"), path.parent / "runs")
    path.with_name("taken").write_text("a file")
    with pytest.raises(ToolError, match=r"taken: the folder for the float networks cannot be made: File exists"):
        runner.run(made, planned(path), 1)
    assert not made.runs.exists()


def test_a_file_of_something_else_is_not_written_over(path: Path) -> None:
    path.with_name("out.json").write_text("[]")
    with pytest.raises(UsageError, match=r"out\.json: damaged: .*; name another --out"):
        planned(path)


def test_a_killed_study_goes_on_and_what_it_has_is_not_trained_again(path: Path) -> None:
    out, runs = path.with_name("out.md"), path.parent / "runs"
    arguments = ["study", str(path), "--methods", "qat-strong,cr-unlabeled", "--out", str(out), "--runs", str(runs)]
    with (path.parent / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "crqat", *arguments, "--jobs", "1"], stderr=log)
    until = time.monotonic() + 120
    while not out.with_suffix(".json").is_file() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    while b"cr-unlabeled, seed 0, 200 labels: starts" not in (path.parent / "log").read_bytes():
        time.sleep(0.05)  # one more has begun
        assert process.poll() is None and time.monotonic() < until
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {method: row.key for method, row in found(out).items()}
    assert kept.keys() == {"float", "ptq", "qat-strong"}
    result = CliRunner().invoke(crqat, arguments, standalone_mode=False)
    assert result.exception is None, result.output
    assert "study: 2 of 3 training runs are already finished" in result.output
    assert "training runs: 2/3  cr-unlabeled, seed 0, 200 labels: " in result.output
    rows = found(out)
    assert rows.keys() == kept.keys() | {"cr-unlabeled"}
    assert {method: rows[method].key for method in kept} == kept
    labels = sources.load("digits", None, False).test_labels
    assert all(row.n == len(labels) for row in rows.values())
    # They have learned: far above chance, which the packed answers of another order would not be.
    assert report.top1(rows["float"]) > 0.3
    assert "cr-unlabeled minus" in out.read_text() and out.with_suffix(".png").is_file()
    # The float network lies next to the results: what starts from it later needs no other.
    (weights,) = out.with_suffix("").iterdir()
    assert all(row.lineage == [sha256_file(weights)[:16]] for row in rows.values())
