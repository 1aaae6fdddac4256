"""Arguments of the Python API are held against the types and bounds that a recipe's keys have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from crqat.core.errors import UsageError

_Config = TypeVar("_Config")


def checked(config: _Config, arguments: Mapping[str, str] | None = None) -> _Config:
    """A configuration that a user's own code filled in, held against its types and bounds as a recipe's is.

    Args:
        config: A dataclass.
        arguments: Field to what the user's argument is called where that is something else.

    Raises:
        UsageError: A value is of another type or out of bounds; the message names the argument.
    """
    try:
        return TypeAdapter(type(config)).validate_python(asdict(config))  # type: ignore[call-overload]
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        msg = f"{(arguments or {}).get(name, name)}: {first['msg']}, not {first['input']!r}"
        raise UsageError(msg) from error
