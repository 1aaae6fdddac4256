"""An exception that nobody expected: whose it is, and where its traceback goes if places are full."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from crqat.core import failures, strict_json
from crqat.core.errors import CrqatError, InternalError, Told, ToolError, UsageError


def raised(function: Callable[[], object]) -> CrqatError:
    with pytest.raises(CrqatError) as caught, failures.explained("train"):
        function()
    return caught.value


def test_the_innermost_line_outside_of_libraries_tells_whose_error_it_is() -> None:
    own = raised(lambda: strict_json.read(3))  # type: ignore[arg-type]
    assert type(own) is InternalError and " at crqat/core/strict_json.py:" in str(own) and own.exit_code == 3
    user = raised(lambda: json.loads("{"))
    assert type(user) is UsageError and f" at {__file__}:" in str(user)


def test_what_has_been_told_passes() -> None:
    for error in (UsageError("told"), Told(143), BrokenPipeError(), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, failures.explained("train"):
            raise error
        assert caught.value is error


def test_a_cause_of_the_machine_is_found_below_a_librarys_words() -> None:
    def wrapped() -> None:
        try:
            raise OSError(28, "No space left on device", "cache/a.so")
        except OSError as error:
            msg = "something else"
            raise ValueError(msg) from error

    error = raised(wrapped)
    assert type(error) is ToolError and str(error).startswith("train: cache/a.so: No space left on device")
    assert (
        type(failures.explain(RuntimeError("I/O error: No space left on device (os error 28)"), "train")) is ToolError
    )


def test_the_traceback_goes_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = tmp_path / "full"
    monkeypatch.setattr(tempfile, "tempdir", str(full))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    error = ValueError("a \udcff name")
    assert f"traceback in {tmp_path / 'traceback.txt'}" in str(failures.explain(error, "train", tmp_path))
    assert (tmp_path / "traceback.txt").read_text("utf-8").endswith("ValueError: a \\udcff name\n")
    (tmp_path / "run" / "traceback.txt").mkdir(parents=True)
    assert "/cache/crqat/crqat-traceback-" in str(failures.explain(error, "train", tmp_path / "run"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "traceback.txt"))
    assert "the traceback could not be written (" in str(failures.explain(error, "train", tmp_path / "run"))
    full.mkdir()
    assert f"traceback in {full}/crqat-traceback-" in str(failures.explain(error, "train", tmp_path / "run"))


def test_a_signal_without_a_name_has_its_number() -> None:
    assert [failures.signal_name(number) for number in (9, 35)] == ["SIGKILL", "signal 35"]
