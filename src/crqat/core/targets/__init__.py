"""The runtimes that a network can be quantized for, one `Target` in one module each, and functions to find them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any

from crqat.core.errors import UsageError
from crqat.core.targets.base import (
    INT16_MAX,
    AddKernel,
    BiasType,
    Broken,
    ClipNode,
    CpuFamily,
    FloatType,
    LayerNode,
    Node,
    QuantizeNode,
    Residual,
    Target,
    activation_codes,
    is_depthwise,
    weight_codes,
)
from crqat.core.targets.constraints import Constraints
from crqat.core.targets.onnxruntime import ONNXRUNTIME
from crqat.core.targets.tensorrt import TENSORRT

__all__ = ["ALL", "INT16_MAX", "ONNXRUNTIME", "TARGETS", "TENSORRT", "AddKernel", "BiasType", "Broken", "ByTarget",
           "ClipNode", "Constraints", "CpuFamily", "FloatType", "LayerNode", "Node", "QuantizeNode", "Residual",
           "Target", "TargetName", "activation_codes", "builds_engine", "executed", "find", "get", "is_depthwise",
           "names", "union", "weight_codes"]  # fmt: skip

# Every runtime by name; a new runtime is added here.
TARGETS: dict[str, Target] = {target.name: target for target in (ONNXRUNTIME, TENSORRT)}


def get(name: str) -> Target:
    """Return the Target with a name.

    Raises:
        UsageError: No runtime has this name.
    """
    if name not in TARGETS:
        near = difflib.get_close_matches(name, TARGETS, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(TARGETS)}"
        msg = f"targets: no runtime is called {name!r}; {hint}"
        raise UsageError(msg)
    return TARGETS[name]


def names() -> tuple[str, ...]:
    """Return the names of all runtimes."""
    return tuple(TARGETS)


def executed() -> str:
    """Return the name of the runtime that an export runs to compare its integer codes with those of the simulator."""
    return next(name for name, target in TARGETS.items() if target.not_run is None)


def builds_engine(name: str) -> bool:
    """Return whether a benchmark builds an engine from a file whose target is `name`; False for "float" files."""
    return name in TARGETS and TARGETS[name].builds_engine


def find(name: str) -> Target | None:
    """Return the Target with a name; None if there is none, as for the target "float" of a float file."""
    return TARGETS.get(name)


def union(names: Iterable[str]) -> Constraints:
    """Return the constraints that one network must meet for all of these runtimes.

    Raises:
        UsageError: A runtime is unknown.
    """
    return Constraints(tuple(get(name) for name in names))


ALL = "all"


def _for_all(value: Any) -> Any:
    """Turn a recipe's list of layers into {ALL: layers}, and lists in a mapping into tuples; keep other values."""
    if type(value) is list:
        value = {ALL: value} if value else {}
    if type(value) is dict:
        return {key: tuple(item) if type(item) is list else item for key, item in value.items()}
    return value


class ByTarget:
    """Marker of an ``Annotated`` mapping from the name of a runtime, or `ALL`, to names of layers.

    A recipe may give a list of layers instead, which then applies to all runtimes.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> dict[str, Any]:
        """Return a validation schema that accepts a list, or lists by runtime. Called by pydantic."""
        del source, handler
        patterns = {"type": "tuple", "items_schema": [{"type": "str"}], "variadic_item_index": 0}
        keys = {"type": "literal", "expected": [*TARGETS, ALL]}
        return {
            "type": "function-before",
            "function": {"type": "no-info", "function": _for_all},
            "schema": {"type": "dict", "keys_schema": keys, "values_schema": patterns},
        }


class TargetName:
    """One of the names in `TARGETS`, for use in an ``Annotated`` type; checked when a recipe is validated."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> dict[str, Any]:
        """Return a validation schema that accepts the names in `TARGETS`. Called by pydantic."""
        del source, handler
        return {"type": "literal", "expected": list(TARGETS)}
