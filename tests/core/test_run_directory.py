"""Run directories: complete or not there, whatever happens to the process that writes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crqat.core import run_directory
from crqat.core.errors import ToolError, UsageError


def manifest(key: str = "k") -> run_directory.Manifest:
    return run_directory.Manifest("train", key, None, {"seed": 0}, {})


def write(run: Path, content: str) -> None:
    with run_directory.write_stage(run, manifest()) as out:
        (out / "deep").mkdir()
        (out / "deep" / "file.txt").write_text(content)


def content(run: Path) -> str:
    return (run / "train" / "deep" / "file.txt").read_text()


def leftovers(run: Path) -> list[str]:
    """Everything beside the stage's link and the one directory it points at."""
    linked = (run / "train").resolve()
    return [path.name for path in run.iterdir() if path.name != "train" and path != linked]


def age(path: Path) -> None:
    old = time.time() - 3600
    os.utime(path, (old, old), follow_symlinks=False)


def test_stage_is_complete_and_verifies(tmp_path: Path) -> None:
    run = tmp_path / "new" / "run"
    written = manifest()
    with run_directory.write_stage(run, written) as out:
        (out / "a.txt").write_text("a")
        written.payload["note"] = "from the body"
        assert not (run / "train").exists()
    read = run_directory.verify_stage(run / "train")
    assert read == written
    assert read.files == {"a.txt": "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"}
    assert run_directory.manifest_hash(run / "train") == run_directory.sha256_file(run / "train" / "manifest.json")
    assert leftovers(run) == []


def test_second_version_replaces_the_first(tmp_path: Path) -> None:
    write(tmp_path, "one")
    write(tmp_path, "two")
    assert content(tmp_path) == "two"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), UsageError("x"), FileNotFoundError(2, "x")])
def test_failing_body_leaves_the_old_version_and_its_own_error(tmp_path: Path, error: BaseException) -> None:
    write(tmp_path, "one")
    with pytest.raises(type(error)) as caught, run_directory.write_stage(tmp_path, manifest()) as out:
        (out / "half.txt").write_text("half")
        raise error
    assert caught.value is error
    assert content(tmp_path) == "one"
    assert leftovers(tmp_path) == []


def test_full_disk_is_a_tool_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ToolError, match="cannot write the stage train"),
        run_directory.write_stage(tmp_path, manifest()),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_place_that_is_no_directory_is_a_tool_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ToolError, match=r"cannot write to .*choose another place with --runs"):
        write(tmp_path / "file" / "run", "one")


KILLED_WRITER = """
import sys, time
from pathlib import Path
from crqat.core import run_directory
with run_directory.write_stage(Path(sys.argv[1]), run_directory.Manifest("train", "k", None, {}, {})) as out:
    (out / "half.txt").write_text("half")
    print(out.name, flush=True)
    time.sleep(60)
"""


def test_killed_writer_leaves_the_old_version_and_is_swept_only_when_dead(tmp_path: Path) -> None:
    write(tmp_path, "one")
    command = [sys.executable, "-c", KILLED_WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        age(tmp_path / name)
        write(tmp_path, "two")
        assert leftovers(tmp_path) == [name], "a live writer's directory must stay"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert content(tmp_path) == "two"
    assert (tmp_path / name / "half.txt").exists()
    (tmp_path / ".train-x.link").symlink_to(name)
    age(tmp_path / name)
    age(tmp_path / ".train-x.link")
    (tmp_path / ".export-other").mkdir()
    age(tmp_path / ".export-other")
    write(tmp_path, "three")
    assert content(tmp_path) == "three"
    assert leftovers(tmp_path) == [".export-other"]


def test_stages_whose_names_begin_alike_leave_each_other_alone(tmp_path: Path) -> None:
    stages = ("benchmark", "benchmark@orin", "benchmark@orin-2", "benchmark@orin_2222")
    for turn in ("one", "two"):
        for stage in stages:
            with run_directory.write_stage(tmp_path, run_directory.Manifest(stage, "k", None, {}, {})) as out:
                (out / "file.txt").write_text(f"{turn} {stage}")
            age((tmp_path / stage).resolve())
    for stage in stages:
        assert (tmp_path / stage / "file.txt").read_text() == f"two {stage}"
        assert run_directory.verify_stage(tmp_path / stage).stage == stage
    assert len(list(tmp_path.iterdir())) == 2 * len(stages)
    with pytest.raises(UsageError, match=r"crqat benchmark RECIPE --on ssh://HOST\)"):
        run_directory.read_manifest(tmp_path / "benchmark@none")


def test_fresh_directory_of_nobody_is_left_alone(tmp_path: Path) -> None:
    """Its writer may not have come to lock it yet."""
    (tmp_path / ".train-fresh").mkdir()
    write(tmp_path, "one")
    assert leftovers(tmp_path) == [".train-fresh"]


def test_run_that_was_copied_without_links_can_be_written_again(tmp_path: Path) -> None:
    (tmp_path / "train" / "deep").mkdir(parents=True)
    (tmp_path / "train" / "deep" / "file.txt").write_text("copied")
    write(tmp_path, "one")
    assert (tmp_path / "train").is_symlink()
    assert content(tmp_path) == "one"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "file.txt: missing"),
        (lambda path: path.write_text("onf"), "file.txt: altered or damaged"),
        (lambda path: path.write_text("on"), "file.txt: altered or damaged"),
    ],
)
def test_damage_names_the_file(tmp_path: Path, damage: object, message: str) -> None:
    write(tmp_path, "one")
    damage(tmp_path / "train" / "deep" / "file.txt")  # type: ignore[operator]
    with pytest.raises(UsageError, match=message):
        run_directory.verify_stage(tmp_path / "train")


def test_missing_stage_and_missing_manifest_differ(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such stage yet"):
        run_directory.read_manifest(tmp_path / "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(UsageError, match=r"manifest\.json: missing; .*--force"):
        run_directory.read_manifest(tmp_path / "train")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "{}", '{"schema_version": 1}', "[" * 100_000, '{"schema_version": 1, "other": 1}', "\x00"],
)
def test_damaged_manifest_is_a_usage_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UsageError, match=r"manifest\.json: damaged"):
        run_directory.read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema version 2"),
        ({"files": ["a"]}, "damaged"),
        ({"payload": None}, "damaged"),
        ({"files": {"../../etc/passwd": "0"}}, "outside its directory"),
        ({"files": {"/etc/passwd": "0"}}, "outside its directory"),
    ],
)
def test_manifest_of_another_kind_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write(tmp_path, "one")
    path = tmp_path / "train" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UsageError, match=message):
        run_directory.verify_stage(tmp_path / "train")


def test_hash_json_knows_no_order() -> None:
    assert run_directory.hash_json({"a": 1, "b": [1, 2]}) == run_directory.hash_json({"b": [1, 2], "a": 1})
    assert run_directory.hash_json({"b": [1, 2]}) != run_directory.hash_json({"b": [2, 1]})


def test_git_revision(tmp_path: Path) -> None:
    assert run_directory.git_revision(tmp_path) == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "f").write_text("1")
    for command in (["init", "-q"], ["add", "f"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    clean = run_directory.git_revision(tmp_path)
    assert len(clean) == 40
    (tmp_path / "f").write_text("2")
    assert run_directory.git_revision(tmp_path) == f"{clean}-dirty"


WORDS = st.text(max_size=8)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | WORDS
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner)
)
KEYS = ("stage", "key", "parent", "config", "environment", "payload", "files", "schema_version", "other")


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.sampled_from(KEYS), ANYTHING | st.dictionaries(st.text(max_size=8), st.text(max_size=8)))
    | ANYTHING
    | st.binary(max_size=50)
)
def test_any_manifest_is_one_or_one_line(changes: Any) -> None:
    whole: dict[str, Any] = {
        "stage": "train",
        "key": "k",
        "parent": None,
        "config": {},
        "environment": {},
        "schema_version": 1,
    }
    with tempfile.TemporaryDirectory() as folder:
        content = json.dumps({**whole, **changes} if isinstance(changes, dict) else None).encode()
        Path(folder, "manifest.json").write_bytes(changes if isinstance(changes, bytes) else content)
        try:
            read = run_directory.verify_stage(Path(folder))
        except UsageError as error:
            assert str(error).isprintable()
            return
    assert isinstance(read.stage, str) and not read.files
