"""Converts dataclasses from and to JSON; all JSON files that stages write are written and read here.

A dataclass is the layout. The types of its fields are what the reader accepts: dataclasses, unions, `Literal`, lists,
tuples, dictionaries with text keys, numbers with bounds (`Annotated[float, Range(ge=0)]`), texts, booleans and None. A
field with a default may be missing; unknown keys are ignored, because a later version may write more. Metadata of a
field: `key` is its name in JSON if that differs from the attribute's name; a field with `OMIT` is not written while it
is None, and one with `OMIT_EMPTY` also not while it is an empty list or dictionary.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

from crqat.core import strict_json
from crqat.core.errors import ToolError, UsageError
from crqat.core.field_bounds import Range

_T = TypeVar("_T")
# Metadata of a field that is not written while it is None or, with OMIT_EMPTY, an empty list or dictionary.
OMIT: Mapping[str, object] = {"omit": (None,)}
OMIT_EMPTY: Mapping[str, object] = {"omit": (None, [], {})}
_WORDS = {bool: "true or false", int: "an integer", float: "a finite number", str: "a text", type(None): "null"}


class Mismatch(ValueError):
    """Raised if a JSON value does not match the dataclass that describes its layout."""

    def __init__(self, key: str, expected: str) -> None:
        super().__init__(f"{key or 'the file'} {expected}")
        self.expected = expected


@dataclass(frozen=True)
class Ordered:
    """Marker in the `Annotated` type of a pair of numbers: the first must not be larger than the second."""


Interval = Annotated[tuple[float, float], Ordered()]


def from_json(cls: type[_T], value: object, key: str = "") -> _T:
    """Return a JSON value converted to a dataclass.

    Args:
        cls: Dataclass that describes the layout.
        value: JSON value as `crqat.core.strict_json` reads it.
        key: Key of the value, for the message.

    Raises:
        ValueError: The value does not match; the message names the key and what was expected.
    """
    result: _T = _read(cls, value, key)
    return result


def to_json(value: Any) -> Any:
    """Return a value as JSON: dataclasses, also in lists, tuples and dictionaries, are converted; others are kept."""
    if is_dataclass(value) and not isinstance(value, type):
        return {
            _key(item): to_json(own)
            for item in fields(value)
            if (own := getattr(value, item.name)) not in item.metadata.get("omit", ())
        }
    if isinstance(value, Mapping):
        return {key: to_json(entry) for key, entry in value.items()}
    return [to_json(entry) for entry in value] if isinstance(value, list | tuple) else value


def read(cls: type[_T], path: Path, again: str) -> _T:
    """Return a JSON file's content as a dataclass; a `schema_version` field must have the current value.

    Args:
        cls: Dataclass that describes the layout.
        path: Path of the JSON file.
        again: Remedy for a damaged file or one of another version, such as "run the benchmark again".

    Raises:
        UsageError: The file is damaged or of another version; the message names the file, the key and what was
            expected.
        ToolError: The file cannot be read.
    """
    try:
        data = strict_json.read(path)
    except FileNotFoundError as error:
        msg = f"{path}: missing; {again}"
        raise UsageError(msg) from error
    except IsADirectoryError as error:
        msg = f"{path}: a directory; name the file in it"
        raise UsageError(msg) from error
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}"
        raise ToolError(msg) from error
    except ValueError as error:
        msg = f"{path}: not JSON ({error}); {again}"
        raise UsageError(msg) from error
    return checked(cls, data, str(path), again)


def checked(cls: type[_T], data: object, source: str, again: str, writer: str | None = None) -> _T:
    """Return a JSON value, which was already read from a file, as a dataclass, after the checks of `read`.

    Args:
        cls: Dataclass that describes the layout.
        data: The JSON value.
        source: File or other source of the value, for the message.
        again: Remedy for a damaged value or one of another version, as in `read`.
        writer: Version of crqat that wrote the value, if known.

    Raises:
        UsageError: The value is damaged or of another version, as in `read`.
    """
    current = next((item.default for item in fields(cls) if item.name == "schema_version"), None)  # type: ignore[arg-type]
    found = data.get("schema_version", current) if isinstance(data, dict) else current
    if type(found) is int and type(current) is int and found != current:
        written = writer or (data.get("crqat_version") if isinstance(data, dict) else None)
        by = f"crqat {written}" if isinstance(written, str) else f"a{'n older' if found < current else ' newer'} crqat"
        msg = f"{source}: written by {by} with schema version {found}, and this crqat reads {current}; {again}"
        raise UsageError(msg)
    try:
        return from_json(cls, data)
    except ValueError as error:
        msg = f"{source}: damaged: {error}; {again}"
        raise UsageError(msg) from error


def text(value: Any) -> str:
    """Return the JSON text of a dataclass, with sorted keys."""
    return json.dumps(to_json(value), indent=1, sort_keys=True, allow_nan=False)


def _key(item: Field[Any]) -> str:
    return str(item.metadata.get("key", item.name))


def _below(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _read(kind: Any, value: Any, key: str) -> Any:
    """Return a JSON value converted to the type `kind`; raise `Mismatch` if it does not fit."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or kind is object:
        return value
    if origin is Annotated:
        return _bounded(_read(arguments[0], value, key), arguments[1:], key)
    if origin is Literal:
        if not any(value == one and type(value) is type(one) for one in arguments):
            raise Mismatch(key, f"is not {' or '.join(json.dumps(one) for one in arguments)}")
        return value
    if origin in (Union, types.UnionType):
        return _one_of(arguments, value, key)
    if origin in (list, tuple, Sequence):
        return _sequence(kind, value, key)
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise Mismatch(key, "is not an object")
        return {name: _read(arguments[1], entry, _below(key, name)) for name, entry in value.items()}
    if is_dataclass(kind):
        return _object(kind, value, key)
    if kind is float and type(value) is int:  # JSON may write a float without a decimal point
        return value
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise Mismatch(key, f"is not {_WORDS[kind]}")
    return value


def _sequence(kind: Any, value: Any, key: str) -> Any:
    arguments = typing.get_args(kind)
    if not isinstance(value, list | tuple):
        raise Mismatch(key, "is not a list")
    if typing.get_origin(kind) is tuple and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise Mismatch(key, f"is not a list of {len(arguments)}")
        return tuple(
            _read(one, entry, f"{key}[{i}]") for i, (one, entry) in enumerate(zip(arguments, value, strict=True))
        )
    entries = [_read(arguments[0], entry, f"{key}[{i}]") for i, entry in enumerate(value)]
    return tuple(entries) if typing.get_origin(kind) is tuple else entries


def _bounded(value: Any, bounds: tuple[Any, ...], key: str) -> Any:
    for bound in bounds:
        if isinstance(bound, Ordered) and value[0] > value[1]:
            raise Mismatch(key, "is not an interval [low, high]")
        if isinstance(bound, Range) and not bound.holds(len(value) if isinstance(value, list) else value):
            raise Mismatch(key, f"is not {bound}" if not isinstance(value, list) else f"has not {bound} entries")
    return value


def _one_of(kinds: tuple[Any, ...], value: Any, key: str) -> Any:
    """Convert a value to the dataclass whose `Literal` fields match it, or else to the first type that fits."""
    if value is None and type(None) in kinds:
        return None
    others = [kind for kind in kinds if kind is not type(None)]
    objects = [kind for kind in others if is_dataclass(kind)]
    if len(others) == 1:
        return _read(others[0], value, key)
    if objects and isinstance(value, dict):
        return _read(next((kind for kind in objects if _is_marked(kind, value)), objects[-1]), value, key)
    reasons = []
    for kind in others:
        try:
            return _read(kind, value, key)
        except Mismatch as error:  # noqa: PERF203 - of a few alternatives
            reasons.append(error.expected.removeprefix("is not "))
    raise Mismatch(key, f"is not {' or '.join(dict.fromkeys(reasons))}")


def _is_marked(kind: Any, value: dict[str, object]) -> bool:
    marks = {item: hint for item, hint in _hints(kind).items() if typing.get_origin(hint) is Literal}
    return all(value.get(name) in typing.get_args(hint) for name, hint in marks.items())


def _object(kind: Any, value: Any, key: str) -> Any:
    if not isinstance(value, dict):
        raise Mismatch(key, "is not an object")
    hints, given = _hints(kind), {}
    for item in fields(kind):
        name = _key(item)
        if name in value:
            given[item.name] = _read(hints[item.name], value[name], _below(key, name))
        elif item.default is MISSING and item.default_factory is MISSING:
            raise Mismatch(_below(key, name), "is missing")
    try:
        return kind(**given)
    except Mismatch:
        raise
    except ValueError as error:  # raised by a `__post_init__`, which compares fields
        raise Mismatch(key, str(error)) from error
