"""Validates arguments of the Python API against the types and bounds of the recipe's keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from crqat.core.errors import UsageError

_Config = TypeVar("_Config")


def checked(config: _Config, arguments: Mapping[str, str] | None = None) -> _Config:
    """Validate a configuration built by user code against the types and bounds that recipes have.

    Args:
        config: A dataclass instance.
        arguments: Maps a field to the name of the user's argument where the two differ.

    Returns:
        The validated configuration, with values converted to the types of its fields.

    Raises:
        UsageError: A value has another type or is out of bounds; the message names the argument.
    """
    try:
        return TypeAdapter(type(config)).validate_python(asdict(config))  # type: ignore[call-overload]
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        msg = f"{(arguments or {}).get(name, name)}: {first['msg']}, not {first['input']!r}"
        raise UsageError(msg) from error
