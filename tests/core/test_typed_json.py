from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from crqat.core.errors import ToolError, UsageError
from crqat.core.field_bounds import Range
from crqat.core.typed_json import OMIT, OMIT_EMPTY, Interval, checked, from_json, read, text, to_json


@dataclass(frozen=True)
class Timed:
    """One of two alternatives."""

    status: Literal["measured"]
    ms: Annotated[float, Range(gt=0)]


@dataclass(frozen=True)
class Untimed:
    """The other."""

    status: str


@dataclass(frozen=True)
class Row:
    """A layout with every kind of field."""

    name: str
    count: Annotated[int, Range(ge=1)]
    time: Timed | Untimed | None
    in_float: list[str] = field(metadata={"key": "float"})
    bounds: Interval | None = None
    batch: tuple[int, int, int] = (1, 1, 1)
    unstable: Literal[False] | str = False
    shares: dict[str, float] = field(default_factory=dict, metadata=OMIT_EMPTY)
    note: str | None = field(default=None, metadata=OMIT)
    checks: dict[str, Untimed | str] = field(default_factory=dict)
    schema_version: int = 3

    def __post_init__(self) -> None:
        """Fields that are compared."""
        if self.note == self.name:
            msg = "is its own note"
            raise ValueError(msg)


ROW: dict[str, Any] = {
    "name": "a",
    "count": 2,
    "time": {"status": "measured", "ms": 0.1},
    "float": ["fc"],
    "bounds": [0, 0.5],
    "batch": [1, 8, 64],
    "unstable": "hot",
    "shares": {"x": 0.25},
    "note": "n",
    "checks": {"torch": {"status": "passed"}, "runtime": "not run"},
    "schema_version": 3,
}


def test_what_is_written_is_what_was_read() -> None:
    row = from_json(Row, ROW)
    assert row.time == Timed("measured", 0.1) and row.in_float == ["fc"] and row.bounds == (0, 0.5)
    assert row.checks == {"torch": Untimed("passed"), "runtime": "not run"}
    assert to_json(row) == ROW
    assert from_json(Row, json.loads(text(row))) == row
    assert text(row).index('"batch"') < text(row).index('"bounds"')


def test_what_has_a_default_may_be_missing_and_what_is_unknown_is_passed_over() -> None:
    short = {key: ROW[key] for key in ("name", "count", "float")} | {"time": {"status": "not run: x"}, "later": 1}
    row = from_json(Row, short)
    assert (row.time, row.bounds, row.unstable, row.note) == (Untimed("not run: x"), None, False, None)
    written = to_json(row)
    assert not {"note", "shares", "later"} & written.keys()
    assert written["bounds"] is None and written["checks"] == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": 3}, "name is not a text"),
        ({"count": True}, "count is not an integer"),
        ({"count": 0}, "count is not at least 1"),
        ({"time": []}, "time is not an object"),
        ({"time": {"status": "measured"}}, "time.ms is missing"),
        ({"time": {"status": "measured", "ms": 0}}, "time.ms is not above 0"),
        ({"time": {"status": "measured", "ms": float("inf")}}, "time.ms is not a finite number"),
        ({"float": "fc"}, "float is not a list"),
        ({"float": ["fc", 1]}, r"float\[1\] is not a text"),
        ({"bounds": [1, 0]}, "bounds is not an interval"),
        ({"bounds": [1]}, "bounds is not a list of 2"),
        ({"batch": [1, 2]}, "batch is not a list of 3"),
        ({"unstable": True}, "unstable is not false or a text"),
        ({"shares": {"x": "1"}}, "shares.x is not a finite number"),
        ({"checks": {"torch": 3}}, "checks.torch is not an object or a text"),
        ({"note": "a"}, "the file is its own note"),
    ],
)
def test_anything_else_is_refused_by_its_key(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        from_json(Row, {**ROW, **change})
    with pytest.raises(UsageError, match=f"^results.json: damaged: {words}.*; run it again$"):
        checked(Row, {**ROW, **change}, "results.json", "run it again")


@pytest.mark.parametrize(
    ("version", "writer", "words"),
    [
        (2, None, "written by an older crqat with schema version 2, and this crqat reads 3; run it again"),
        (4, None, "written by a newer crqat with schema version 4"),
        (2, "0.0.9", "written by crqat 0.0.9 with schema version 2"),
    ],
)
def test_another_schema_version_names_who_wrote_it_and_what_to_run(
    version: int, writer: str | None, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        checked(Row, {"schema_version": version, "anything": "else"}, "x.json", "run it again", writer)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "row.json"
    with pytest.raises(UsageError, match=r"row\.json: missing; run it"):
        read(Row, path, "run it")
    path.write_text("{")
    with pytest.raises(UsageError, match=r"row\.json: not JSON"):
        read(Row, path, "run it")
    path.write_text(json.dumps(ROW))
    assert read(Row, path, "run it") == from_json(Row, ROW)
    with pytest.raises(UsageError, match="a directory; name the file in it"):
        read(Row, tmp_path, "run it")
    with pytest.raises(ToolError, match="cannot be read"):
        read(Row, path / "below", "run it")
