from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from crqat.core.errors import ToolError, UsageError
from crqat.runtime_eval.trt import plan_file

PLAN = b"ftrt\x00 some kernels"
ORIN = (8, 7)


def save(path: Path, **changes: Any) -> plan_file.Sidecar:
    values: dict[str, Any] = {
        "builder": "tensorrt",
        "version": "10.3.0",
        "compute_capability": "8.7",
        "precision": "int8",
        "metadata": {"crqat.target": "tensorrt"},
    }
    return plan_file.save(path, PLAN, **(values | changes))


def test_a_plan_that_fits_is_loaded_with_what_is_known_of_it(tmp_path: Path) -> None:
    path = tmp_path / "tensorrt.plan"
    written = save(path)
    assert plan_file.load(path, "tensorrt", "10.3.0", ORIN) == (PLAN, written)
    assert written.metadata == {"crqat.target": "tensorrt"}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["tensorrt.plan", "tensorrt.plan.json"]


@pytest.mark.parametrize(
    ("builder", "version", "capability", "words"),
    [
        ("tensorrt", "10.3.0.30", ORIN, "built for tensorrt version 10.3.0, not 10.3.0.30"),
        ("tensorrt_rtx", "10.3.0", ORIN, "built for builder tensorrt, not tensorrt_rtx"),
        ("tensorrt", "10.3.0", (8, 6), "built for compute capability 8.7, not 8.6"),
    ],
)
def test_a_foreign_engine_is_refused(
    tmp_path: Path, builder: str, version: str, capability: tuple[int, int], words: str
) -> None:
    save(tmp_path / "a.plan")
    with pytest.raises(ToolError, match="the engine was built for") as caught:
        plan_file.load(tmp_path / "a.plan", builder, version, capability)
    assert words in str(caught.value)


def test_a_plan_that_is_not_the_one_that_was_built_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.plan"
    save(path)
    path.write_bytes(PLAN + b"x")
    with pytest.raises(UsageError, match=r"a\.plan: altered or damaged"):
        plan_file.load(path, "tensorrt", "10.3.0", ORIN)
    path.unlink()
    with pytest.raises(UsageError, match=r"a\.plan: cannot be read"):
        plan_file.load(path, "tensorrt", "10.3.0", ORIN)


@pytest.mark.parametrize(("capability", "refused"), [((6, 2), True), ((7, 0), True), ((7, 2), False), ((11, 0), False)])
def test_int8_needs_compute_capability_7_2(tmp_path: Path, capability: tuple[int, int], refused: bool) -> None:
    text = f"{capability[0]}.{capability[1]}"
    save(tmp_path / "int8.plan", compute_capability=text)
    save(tmp_path / "half.plan", compute_capability=text, precision="float16")
    if refused:
        with pytest.raises(ToolError, match=f"INT8 needs compute capability 7.2, but this device has {text}"):
            plan_file.load(tmp_path / "int8.plan", "tensorrt", "10.3.0", capability)
    else:
        assert plan_file.load(tmp_path / "int8.plan", "tensorrt", "10.3.0", capability)[0] == PLAN
    assert plan_file.load(tmp_path / "half.plan", "tensorrt", "10.3.0", capability)[0] == PLAN


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, "missing; a plan is loaded only with its sidecar"),
        ("{", "cannot be used"),
        ("[]", "cannot be used"),
        ({"version": None}, "a value is not text"),
        ({"metadata": []}, "a value is not text"),
        ({"metadata": {"a": 1}}, "a value is not text"),
        ({"schema_version": 2}, "by another version of crqat"),
        ({"precision": "int4"}, "by another version of crqat"),
        ({"unknown": 1}, "cannot be used"),
    ],
)
def test_a_sidecar_that_cannot_be_used(tmp_path: Path, change: Any, words: str) -> None:
    path = tmp_path / "a.plan"
    save(path)
    file = plan_file.sidecar_path(path)
    if change is None:
        file.unlink()
    else:
        file.write_text(change if isinstance(change, str) else json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UsageError) as caught:
        plan_file.read(path)
    assert words in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_precision_that_does_not_exist_is_the_callers_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision int4"):
        save(tmp_path / "a.plan", precision="int4")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="cannot be written"):
        save(tmp_path / "nowhere" / "a.plan")


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.plan"
    save(path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ToolError, match="No space left on device"):
        save(path, version="11.0")
    assert plan_file.load(path, "tensorrt", "10.3.0", ORIN)[0] == PLAN
    assert len(list(tmp_path.iterdir())) == 2
