"""Validation of configuration classes: strict keys, bounds, paths. It also works on boards, which have no pydantic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crqat.core.errors import UsageError

# Unknown keys are errors when a recipe is validated.
STRICT = {"extra": "forbid"}


@dataclass(frozen=True)
class Range:
    """Bounds of a number x, for use in an ``Annotated`` type: ge <= x, gt < x, x <= le, x < lt; None sets no bound."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def holds(self, value: float) -> bool:
        """Return whether `value` is within the bounds."""
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __str__(self) -> str:
        """Return the bounds in words."""
        words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
        bounds = {name: bound for name, bound in asdict(self).items() if bound is not None}
        return " and ".join(f"{words[name]} {b if isinstance(b, int) else f'{b:g}'}" for name, b in bounds.items())

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> dict[str, Any]:
        """Return the number's validation schema with the bounds added. Called by pydantic."""
        return {**handler(source), **{name: bound for name, bound in asdict(self).items() if bound is not None}}


@dataclass(frozen=True)
class OneOf:
    """One of several names, or the user's own "package.module:name", for use in an ``Annotated`` str."""

    names: tuple[str, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> dict[str, Any]:
        """Return a validation schema that accepts `names` and every text with a colon. Called by pydantic."""

        def own(value: Any, check: Callable[[Any], Any]) -> Any:
            return value if isinstance(value, str) and ":" in value else check(value)

        known = {"type": "literal", "expected": list(self.names)}
        return {"type": "function-wrap", "function": {"type": "no-info", "function": own}, "schema": known}


def user_path(text: str, key: str) -> Path:
    """Return a path from a recipe, with "~" and "~name" expanded as in a shell.

    Args:
        text: Path as written in the recipe.
        key: Key of the path in the recipe, for the message.

    Raises:
        UsageError: The home directory does not exist.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        msg = f"{key}: {text}: there is no home directory for its `~`; write the path out"
        raise UsageError(msg) from error
