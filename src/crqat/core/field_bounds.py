"""What the stages' configuration classes share: strictness, bounds, paths. A board, which has no pydantic, reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from crqat.core.errors import UsageError

_Config = TypeVar("_Config")
# Where a recipe is validated, unknown keys are errors.
STRICT = {"extra": "forbid"}


@dataclass(frozen=True)
class Range:
    """Bounds of a number, for use in an ``Annotated`` type."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def holds(self, value: float) -> bool:
        """Whether a number is within the bounds."""
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __str__(self) -> str:
        """The bounds in words."""
        words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
        return " and ".join(f"{words[name]} {bound:g}" for name, bound in asdict(self).items() if bound is not None)

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> dict[str, Any]:
        """Add the bounds to the number's own schema; pydantic calls this."""
        return {**handler(source), **{name: bound for name, bound in asdict(self).items() if bound is not None}}


def checked(config: _Config, arguments: Mapping[str, str] | None = None) -> _Config:
    """A configuration that a user's own code filled in, held against its types and bounds as a recipe's is.

    Args:
        config: A dataclass.
        arguments: Field to what the user's argument is called where that is something else.

    Raises:
        UsageError: A value is of another type or out of bounds; the message names the argument.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(type(config)).validate_python(asdict(config))  # type: ignore[call-overload]
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        msg = f"{(arguments or {}).get(name, name)}: {first['msg']}, not {first['input']!r}"
        raise UsageError(msg) from error


def user_path(text: str, key: str) -> Path:
    """A path that a recipe names, with "~" and "~name" as a shell takes them.

    Args:
        text: As in the recipe.
        key: Under which it stands there, for the message.

    Raises:
        UsageError: There is no such home directory.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        msg = f"{key}: {text}: there is no home directory for its `~`; write the path out"
        raise UsageError(msg) from error
