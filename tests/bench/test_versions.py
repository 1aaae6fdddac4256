"""`make test-versions`: its rows, what is told of one, and that document, file and pyproject.toml agree."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import versions
from crqat.train.data.dataset import validate

LOWEST = versions.bounds((versions.ROOT / "pyproject.toml").read_text())
TOLD: list[dict[str, Any]] = json.loads(versions.JSON.read_text())["rows"]
BY_NAME = {row["name"]: row for row in TOLD if row["python"].startswith("3.11.")}


def test_the_document_has_the_table_of_the_file() -> None:
    text = versions.DOC.read_text()
    assert text == versions.with_table(text, versions.table(TOLD))
    assert {row.name for row in versions.rows(LOWEST)} <= set(BY_NAME)
    assert set(BY_NAME) <= {row.name for row in versions.rows(LOWEST)}


def test_the_lower_bounds_are_those_that_were_run_and_every_row_ended_as_expected() -> None:
    assert BY_NAME["oldest of everything"]["pins"] == LOWEST
    for package, name in (("torch", "oldest PyTorch"), ("nncf", "oldest NNCF"), ("onnxruntime", "oldest ONNX Runtime")):
        for row in (BY_NAME[name], BY_NAME["oldest of everything"]):
            assert row["pins"][package] == LOWEST[package]
            assert f"{row['versions'][package]}.".startswith(f"{LOWEST[package]}.")
    expected = {row.name: row.expected for row in versions.rows(LOWEST)}
    for row in TOLD:
        if row["status"] == versions.NOT_AVAILABLE:
            assert row["error"] and not row["recipes"]
            continue
        assert row["status"] == expected[row["name"]] == versions.status(row["recipes"])
        for result in row["recipes"].values():
            assert [result["exit_codes"][stage] for stage in versions.STAGES[:-1]] == [0, 0, 0]
            # The one thing that an old ONNX Runtime leaves open.
            assert result["gate"] == "PASS" or "truncates where it quantizes float16" in result["error"]


def test_each_library_is_varied_alone() -> None:
    rows = {row.name: row for row in versions.rows(LOWEST)}
    assert not rows["newest"].pins
    assert rows["oldest NNCF"].pins == {"nncf": LOWEST["nncf"]}
    assert rows["oldest ONNX Runtime"].pins == {"onnxruntime": LOWEST["onnxruntime"]}
    assert set(rows["oldest PyTorch"].pins) == {"torch", "torchvision"}
    assert rows["oldest of everything"].pins == LOWEST


def test_a_dependency_without_a_lower_bound_is_refused() -> None:
    text = 'dependencies = [\n    "click>=8.1",\n    "numpy>=1.26,<3",\n    "torch",\n]\n'
    with pytest.raises(ValueError, match=r"torch has no lower bound; write NAME>=VERSION"):
        versions.bounds(text)
    assert versions.bounds(text.replace('    "torch",\n', "")) == {"click": "8.1", "numpy": "1.26"}


def a_python(folder: Path, body: str) -> Path:
    """A program in place of an environment's Python, which sees `-m crqat STAGE RECIPE --runs RUNS`."""
    script = folder / "python"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    return script


def test_stages_end_at_the_first_that_fails(tmp_path: Path) -> None:
    python = a_python(
        tmp_path, '[ "$3" = export ] && { echo a warning >&2; echo crqat: error: no kernel >&2; exit 3; }; exit 0'
    )
    told = versions.stages(python, tmp_path / "recipe.yaml", tmp_path)
    assert told["exit_codes"] == {"train": 0, "export": 3}
    assert (told["gate"], told["error"]) == (None, "export: crqat: error: no kernel")
    row = {"name": "oldest", "python": "3.11.7", "status": versions.FAILED, "versions": {"torch": "2.9.0"}}
    row |= {"recipes": {"digits": told}, "error": told["error"]}
    assert versions.table([row])[-1].startswith("| oldest | 3.11 | 2.9.0 | - |")
    assert versions.table([row])[-1].endswith("| export ends with 3 | - | export: crqat: error: no kernel |")


@pytest.mark.parametrize(
    ("verdict", "code", "status"),
    [("PASS", 0, versions.PASSED), ("FAIL", 1, versions.FAILED), ("INCONCLUSIVE", 4, versions.INCONCLUSIVE)],
)
def test_a_gate_that_fails_tells_its_first_rule(tmp_path: Path, verdict: str, code: int, status: str) -> None:
    python = a_python(
        tmp_path, f'[ "$3" = gate ] || exit 0; echo "fail    float.onnx  codes: 3"; echo "gate: {verdict}"; exit {code}'
    )
    told = versions.stages(python, tmp_path / "recipe.yaml", tmp_path)
    assert told["gate"] == verdict and list(told["exit_codes"]) == list(versions.STAGES)
    assert told["error"] == ("gate: fail float.onnx codes: 3" if code else None)


def test_a_row_that_pip_does_not_find_is_not_available(tmp_path: Path) -> None:
    place = tmp_path / "torch-newest" / "bin"
    place.mkdir(parents=True)
    (place.parent / "pyvenv.cfg").touch()
    a_python(place, 'echo "ERROR: No matching distribution found for nncf==0.1" >&2; exit 1')
    told = versions.run(versions.Row("old", {"nncf": "0.1"}), LOWEST, tmp_path)
    assert told["status"] == versions.NOT_AVAILABLE and "nncf==0.1" in told["error"]
    assert versions.table([told])[-1].count(versions.NOT_AVAILABLE) == len(versions.RECIPES)
    a_python(place, 'echo "ERROR: Exception:" >&2; echo "OSError: no space left" >&2; exit 2')
    told = versions.run(versions.Row("old", {}), LOWEST, tmp_path)
    assert (told["status"], told["error"]) == (versions.FAILED, "OSError: no space left")


def test_one_environment_is_there_at_a_time(tmp_path: Path) -> None:
    for name in ("torch-2.9", "torch-newest"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "python").symlink_to(sys.executable)
        (tmp_path / name / "pyvenv.cfg").touch()
    (tmp_path / "torch-sources").mkdir()  # not an environment
    assert versions.environment(versions.Row("newest", {}), tmp_path) == tmp_path / "torch-newest" / "bin" / "python"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["torch-newest", "torch-sources"]


def test_a_row_is_written_in_place_of_its_earlier_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "JSON", tmp_path / "versions.json")
    monkeypatch.setattr(versions, "DOC", tmp_path / "versions.md")
    versions.DOC.write_text("before\n\n| old |\n| --- |\n\nafter\n")
    base: dict[str, Any] = {"status": versions.NOT_AVAILABLE, "versions": {}, "recipes": {}, "error": "none"}
    for name, python in (("b", "3.11.7"), ("a", "3.11.7"), ("b", "3.10.1"), ("b", "3.11.9")):
        versions.write(base | {"name": name, "python": python}, ["a", "b"])
    rows = [(row["name"], row["python"]) for row in json.loads(versions.JSON.read_text())["rows"]]
    assert rows == [("a", "3.11.7"), ("b", "3.10.1"), ("b", "3.11.9")]
    text = versions.DOC.read_text()
    assert text.startswith("before\n\n| row | Python |") and text.endswith("| none |\n\nafter\n") and "old" not in text


def test_the_residual_network_has_images() -> None:
    dataset = versions.enlarged_digits()
    validate(dataset, "enlarged digits")
    assert dataset.train_images.shape == (400, 3, 32, 32) and dataset.test_images.shape == (397, 3, 32, 32)
