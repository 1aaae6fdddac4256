from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from crqat.core.errors import ToolError, UsageError
from crqat.core.progress import quiet
from crqat.train.checkpoint import Checkpoints, State, read_tensors


def state(number: float) -> State:
    return State({"x": torch.full((3,), number)}, {"number": number})


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_last_two_are_kept_and_the_latest_is_chosen_by_number(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    kept = Checkpoints(folder, quiet)
    assert kept.latest() is None
    for number in range(1, 12):
        kept.save(state(number))
    # As names, 9 would come after 10 and 11.
    assert files(folder) == ["10.json", "10.safetensors", "11.json", "11.safetensors"]
    latest = Checkpoints(folder, quiet).latest()
    assert latest is not None and latest.values == {"number": 11}
    assert torch.equal(latest.tensors["x"], torch.full((3,), 11.0))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def other_values(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "values": {"number": 7}}))


def next_format(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))


DAMAGES: dict[str, tuple[str, Any]] = {
    "flipped": ("2.safetensors", flip),
    "truncated": ("2.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-5])),
    "missing": ("2.safetensors", lambda path: path.unlink()),
    "no json": ("2.json", lambda path: path.write_text("{")),
    "a list": ("2.json", lambda path: path.write_text("[]")),
    "other values": ("2.json", other_values),
    "newer": ("2.json", next_format),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_an_unreadable_state_is_skipped_with_a_warning(tmp_path: Path, kind: str) -> None:
    told: list[tuple[str, str]] = []
    kept = Checkpoints(tmp_path, lambda task, done, total, note="": told.append((task, note)))
    kept.save(state(1))
    kept.save(state(2))
    name, damage = DAMAGES[kind]
    damage(tmp_path / name)
    latest = kept.latest()
    assert latest is not None and latest.values == {"number": 1}
    ((task, note),) = told
    assert task == "state 2" and note.startswith("warning: cannot be read (") and "\n" not in note
    kept.save(state(3))  # a number of its own, whatever 2 was
    latest = kept.latest()
    assert latest is not None and latest.values == {"number": 3}


@pytest.mark.parametrize("cut", range(6))
def test_a_save_that_ends_anywhere_leaves_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    """Each call that changes the folder in turn fails: writing, syncing and renaming both files, syncing the folder."""
    kept = Checkpoints(tmp_path, quiet)
    kept.save(state(1))
    calls: list[str] = []

    def breaks(name: str, original: Any) -> Any:
        def broken(*args: Any) -> Any:
            calls.append(name)
            if len(calls) > cut:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args)

        return broken

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", breaks("fsync", os.fsync))
        patch.setattr(Path, "replace", breaks("replace", Path.replace))
        if cut < 5:
            with pytest.raises(
                ToolError, match=r"^cannot save .*: No space left on device; .* run the same command to resume"
            ):
                kept.save(state(2))
        else:
            kept.save(state(2))
    assert calls[:5] == ["fsync", "replace", "fsync", "replace", "fsync"][: len(calls)]
    latest = kept.latest()
    # Once both are renamed the state is there, only the folder's sync is missing.
    assert latest is not None and latest.values == {"number": 2 if cut >= 4 else 1}
    assert not [name for name in files(tmp_path) if name.startswith(".")]


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, quiet)
    (tmp_path / ".1.safetensors").write_text("half")
    (tmp_path / "1.safetensors").write_text("without its other half")
    assert kept.latest() is None
    kept.save(state(5))
    assert files(tmp_path) == ["1.json", "1.safetensors"]
    latest = kept.latest()
    assert latest is not None and latest.values == {"number": 5}


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\xff" * 8 + b"{}", None])
def test_a_file_that_holds_no_tensors_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "student.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"student\.safetensors: not a readable safetensors file"):
        read_tensors(path)
