"""Hashes of data on disk, and what is remembered of them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from crqat.core import run_directory
from crqat.pipeline.stages.disk import MEMORY, disk_state


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read for their hash."""
    paths: list[Path] = []
    original = run_directory.sha256_file

    def counting(path: Path) -> str:
        paths.append(path)
        return original(path)

    monkeypatch.setattr(run_directory, "sha256_file", counting)
    return paths


def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are too young to be remembered for two seconds."""
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 10**10)


def test_an_unchanged_folder_is_not_read_twice(
    tmp_path: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, runs = tmp_path / "data", tmp_path / "runs"
    (root / "a").mkdir(parents=True)
    for name in ("a/1", "a/2", "b"):
        (root / name).write_text(name)
    first = disk_state(root, runs)
    assert disk_state(root, runs) == first
    assert len(read) == 6, "files this young may change again within the clock's tick"
    later(monkeypatch)
    assert disk_state(root, runs) == disk_state(root, runs) == first
    assert len(read) == 9
    os.utime(root / "b", ns=(5, 5))
    assert disk_state(root, runs) == first
    assert read[9:] == [root / "b"]
    status = (root / "a/1").stat()
    (root / "a/1").write_text("A/1")
    os.utime(root / "a/1", ns=(status.st_atime_ns, status.st_mtime_ns))
    changed = disk_state(root, runs)
    assert changed != first
    assert not changed.holds(first)
    (root / "c").touch()
    assert disk_state(root, runs).holds(changed)
    assert str(first).startswith("3 files, 7 bytes, ")


@pytest.mark.parametrize("damage", ["", "[]", '{"1": 5, "2": [1, 2, 3, null]}', "[" * 100_000])
def test_damaged_memory_is_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    later(monkeypatch)
    root, runs = tmp_path / "data", tmp_path / "runs"
    root.mkdir()
    (root / "1").write_text("x")
    first = disk_state(root, runs)
    (memory,) = (runs / MEMORY).iterdir()
    memory.write_text(damage)
    assert disk_state(root, runs) == first


def test_links_are_followed_once_and_the_runs_left_out(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder in (root / "runs", root / ".git", root / "__pycache__", elsewhere):
        folder.mkdir(parents=True)
        (folder / "file").write_text("x")
    (root / "linked").symlink_to(elsewhere)
    (root / "round").symlink_to(root)
    (root / "broken").symlink_to(root / "none")
    assert list(disk_state(root, root / "runs").files) == ["linked/file"]


def test_one_file_and_nothing(tmp_path: Path) -> None:
    (tmp_path / "set.npz").write_text("x")
    assert list(disk_state(tmp_path / "set.npz", tmp_path / "runs").files) == ["set.npz"]
    assert str(disk_state(tmp_path / "none", tmp_path / "runs")) == "nothing there"
