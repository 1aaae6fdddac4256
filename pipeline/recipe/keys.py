"""What each key of a recipe means, from the dataclasses that check it: their docstrings, types and defaults."""

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
    """One key of a recipe.

    Attributes:
        key: Its path, such as "qat.lr".
        meaning: What it does.
        type: Of its value, in words.
        default: As JSON; None where `required`, too.
        required: Whether it has no default.
        allowed: All values, where they can be listed; else empty.
        keys: Of a section: its keys, in the order of the dataclass; else empty.
    """

    key: str
    meaning: str
    type: str
    default: Any
    required: bool
    allowed: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()


def every_key() -> dict[str, Key]:
    """All keys by their paths, each section before its own keys."""
    return {key.key: key for key in _of_class(Recipe, "")}


def explain(name: str) -> Key:
    """What a key means.

    Args:
        name: Its path, such as "qat.lr" or "gate".

    Raises:
        UsageError: There is no such key; the message names the closest one.
    """
    known = every_key()
    if name in known:
        return known[name]
    same = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]]
    near = same or difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    own = {key.rpartition(".")[2]: key for key in known}
    near = near or [own[word] for word in difflib.get_close_matches(name.rpartition(".")[2].lower(), own, n=1)]
    hint = f"did you mean {' or '.join(f'`{key}`' for key in near)}?" if near else "`crqat explain` lists all keys"
    msg = f"{name}: no key of a recipe; {hint}"
    raise UsageError(msg)


def lines(key: Key) -> Iterator[str]:
    """A key as a person reads it."""
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
        # The consistency term stands in the float training, too; its keys are explained once.
        keys = tuple(f"{path}.{own.name}" for own in fields(inner)) if inner is not None and not prefix else ()
        if inner is not None and prefix:
            meaning += f" The keys are those of the section `{name}`."
        kind, allowed = ("section", ()) if inner is not None else _type(hint)
        yield Key(path, meaning, kind, _value(item), _required(item), allowed, keys)
        if inner is not None and keys:
            yield from _of_class(inner, f"{path}.")


def _section(hint: Any) -> type[Any] | None:
    """The dataclass that a type is, or may be beside null."""
    if typing.get_origin(hint) in (Annotated, Union, types.UnionType):
        return next((kind for one in typing.get_args(hint) if (kind := _section(one)) is not None), None)
    return hint if isinstance(hint, type) and hint not in _WORDS and is_dataclass(hint) else None


def _required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _value(item: Field[Any]) -> Any:
    """The default as JSON; of a section None, since its keys have their own."""
    if item.default is not MISSING:
        return json.loads(json.dumps(item.default))
    if item.default_factory is MISSING:
        return None
    made = item.default_factory()
    return None if is_dataclass(made) else json.loads(json.dumps(made))


def _meanings(cls: type[Any]) -> dict[str, str]:
    """What the docstrings of a dataclass and of those that it extends say of each attribute."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
        for entry in re.split(r"\n(?=    \w)", f"\n{text.rstrip()}")[1:]:
            name, _, meaning = entry.strip().partition(":")
            found[name] = re.sub(r"\bNone\b", "null", " ".join(meaning.split()))
    return found


def _type(hint: Any) -> tuple[str, tuple[str, ...]]:
    """A type in words, and its values where they can be listed."""
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
