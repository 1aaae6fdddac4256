"""What the stages' configuration classes share: strictness and bounds. pydantic reads both and is not imported here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

# Where a recipe is validated, unknown keys are errors.
STRICT = {"extra": "forbid"}


@dataclass(frozen=True)
class Range:
    """Bounds of a number, for use in an ``Annotated`` type."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> dict[str, Any]:
        """Add the bounds to the number's own schema; pydantic calls this."""
        return {**handler(source), **{name: bound for name, bound in asdict(self).items() if bound is not None}}
