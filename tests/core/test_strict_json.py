"""JSON from elsewhere: a value that can be written again, or a ValueError; nothing else, whatever the bytes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crqat.core import strict_json

LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    LEAVES | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_what_json_can_hold_survives(value: Any) -> None:
    for ascii_only in (True, False):
        assert strict_json.parse(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@settings(max_examples=200, deadline=None)
@given(st.binary() | st.text(alphabet='{}[]",:0123456789eE+-.\\ud8NaInfity ').map(str.encode))
def test_anything_is_a_value_that_can_be_written_or_a_value_error(content: bytes) -> None:
    try:
        value = strict_json.parse(content)
    except ValueError:
        return
    assert strict_json.parse(json.dumps(value, ensure_ascii=False, allow_nan=False).encode()) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("NaN", "NaN is not a number in JSON"),
        ("[-Infinity]", "-Infinity is not a number"),
        ("1e999", "the number 1e999 is too large"),
        ("-1e999", "too large"),
        (str(2**63), "beyond 64 bits"),
        ("9" * 100_000, "beyond 64 bits"),
        ("[" * 1_000_000, "nested too deeply"),
        ('"\\ud800"', "surrogates not allowed"),
        ('{"a": "\\uDFFF"}', "surrogates not allowed"),
        (b"\xff", "invalid start byte"),
        ("", "Expecting value"),
        ("1 2", "Extra data"),
    ],
)
def test_what_is_refused(text: str | bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        strict_json.parse(text)
    assert len(str(caught.value)) < 200


def test_bounds_and_pairs_of_surrogates_are_read() -> None:
    assert strict_json.parse('["\\ud83d\\ude00", 9223372036854775807, -9223372036854775808, 1e308, 5e-324]') == [
        "\U0001f600",
        2**63 - 1,
        -(2**63),
        1e308,
        math.ulp(0.0),
    ]


def test_size_is_looked_at_before_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(strict_json.MAX_BYTES + 1)
    monkeypatch.setattr(strict_json, "parse", pytest.fail)
    with pytest.raises(ValueError, match="larger than 64 MiB"):
        strict_json.read(path)
    with pytest.raises(FileNotFoundError):
        strict_json.read(tmp_path / "none.json")
