"""Explains the keys of a recipe from the docstrings, types and defaults of the dataclasses that check it."""

from __future__ import annotations

import difflib
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, Union

from crqat.core import targets as runtimes
from crqat.core.errors import UsageError
from crqat.core.field_bounds import OneOf, Range
from crqat.pipeline.recipe.recipe import Recipe

_WORDS = {bool: "true or false", int: "integer", float: "number", str: "text", type(None): "null"}


@dataclass(frozen=True)
class Key:
    """Description of one key of a recipe.

    Attributes:
        key: Path of the key, such as "qat.lr".
        meaning: What the key does.
        type: Type of the value, in words.
        default: Default as JSON; None if the key is required.
        required: Whether the key has no default.
        allowed: All allowed values if they can be listed; else empty.
        keys: Keys of a section in the order of the dataclass; else empty.
    """

    key: str
    meaning: str
    type: str
    default: Any
    required: bool
    allowed: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()


def every_key() -> dict[str, Key]:
    """Return all keys by their paths, each section before its own keys."""
    return {key.key: key for key in _of_class(Recipe, "")}


def explain(name: str) -> Key:
    """Return the description of a key.

    Args:
        name: Path of the key, such as "qat.lr" or "gate".

    Raises:
        UsageError: The key does not exist; the message names the closest one.
    """
    known = every_key()
    if name in known:
        return known[name]
    same = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]]
    near = same or difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    own = {key.rpartition(".")[2]: key for key in known}
    near = near or [own[word] for word in difflib.get_close_matches(name.rpartition(".")[2].lower(), own, n=1)]
    hint = f"did you mean {' or '.join(f'`{key}`' for key in near)}?" if near else "`crqat explain` lists all keys"
    msg = f"{name}: not a key of a recipe; {hint}"
    raise UsageError(msg)


def lines(key: Key) -> Iterator[str]:
    """Yield the lines of text that describe a key and, if it is a section, the keys in it."""
    yield f"{key.key}: {key.meaning}"
    if key.keys:
        yield ""
        known = every_key()
        width = max(map(len, key.keys))
        for name in key.keys:
            first = re.split(r"(?<=[.;:]) ", known[name].meaning, maxsplit=1)[0].rstrip(":;")
            yield f"  {name:<{width}}  {_default(known[name])}  {first}"
        return
    yield f"  type: {key.type}"
    if key.allowed:
        yield f"  allowed: {', '.join(key.allowed)}"
    yield f"  default: {_default(key)}"


def _default(key: Key) -> str:
    return "(no default)" if key.required else json.dumps(key.default)


def _of_class(cls: type[Any], prefix: str) -> Iterator[Key]:
    hints, meanings = typing.get_type_hints(cls, include_extras=True), _meanings(cls)
    before = ""
    for item in fields(cls):
        name = "float" if item.name == "float_training" else item.name
        path, hint, meaning = f"{prefix}{name}", hints[item.name], meanings[item.name]
        meaning = f"As `{before}`: {meanings[before]}" if meaning == "Likewise." else meaning
        before = item.name
        inner = _section(hint)
        # Float training has a consistency section too; its keys are explained only once.
        keys = tuple(f"{path}.{own.name}" for own in fields(inner)) if inner is not None and not prefix else ()
        if inner is not None and prefix:
            meaning += f" The keys are those of the section `{name}`."
        kind, allowed = ("section", ()) if inner is not None else _type(hint)
        yield Key(path, meaning, kind, _value(item), _required(item), allowed, keys)
        if inner is not None and keys:
            yield from _of_class(inner, f"{path}.")


def _section(hint: Any) -> type[Any] | None:
    """Return the dataclass of a section's type, which may also allow null; None for other types."""
    if typing.get_origin(hint) in (Annotated, Union, types.UnionType):
        return next((kind for one in typing.get_args(hint) if (kind := _section(one)) is not None), None)
    return hint if isinstance(hint, type) and hint not in _WORDS and is_dataclass(hint) else None


def _required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _value(item: Field[Any]) -> Any:
    """Return a field's default as JSON; None for a section, whose keys have their own defaults."""
    if item.default is not MISSING:
        return json.loads(json.dumps(item.default))
    if item.default_factory is MISSING:
        return None
    made = item.default_factory()
    return None if is_dataclass(made) else json.loads(json.dumps(made))


def _meanings(cls: type[Any]) -> dict[str, str]:
    """Return the docstring entry of each attribute of a dataclass and of its base classes."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
        for entry in re.split(r"\n(?=    \w)", f"\n{text.rstrip()}")[1:]:
            name, _, meaning = entry.strip().partition(":")
            found[name] = re.sub(r"\bNone\b", "null", " ".join(meaning.split()))
    return found


def _type(hint: Any) -> tuple[str, tuple[str, ...]]:
    """Return a type in words, and its values if they can be listed."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _annotated(arguments)
    if origin is Literal:
        return _type(type(arguments[0]))[0], tuple(str(value) for value in arguments)
    if origin in (Union, types.UnionType):
        parts = [_type(one) for one in arguments]
        listed = tuple(value for _, values in parts for value in values)
        return "; or ".join(words for words, _ in parts), listed
    if origin in (tuple, list, Sequence):
        words, allowed = _type(arguments[0])
        return f"list of: {words}", allowed
    if origin is dict:
        return "section of layer names" if is_dataclass(arguments[1]) else "list, or a section of lists", ()
    return _WORDS[hint], ()


def _annotated(arguments: tuple[Any, ...]) -> tuple[str, tuple[str, ...]]:
    words, allowed = _type(arguments[0])
    for bound in arguments[1:]:
        if isinstance(bound, Range):
            words += f", {bound}"
        elif isinstance(bound, OneOf):
            allowed = (*bound.names, "package.module:name")
        elif isinstance(bound, runtimes.TargetName):
            allowed = tuple(runtimes.TARGETS)
    return words, allowed
