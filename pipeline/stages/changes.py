"""Describes in a few words what has changed since a stage was made."""

from __future__ import annotations

import json
from typing import Any

from crqat.pipeline.stages import disk

# Prefixes of the names of inputs; all others are settings of the stage.
VERSION, FILE, DATA = "version ", "file ", "data "


def of_inputs(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Return a short text for each input of a stage that changed since the stage was made.

    Args:
        before: Versions and hashes by name, as recorded when the stage was made.
        now: The current versions and hashes by name.
    """
    changes = []
    for name in sorted(before | now, key=lambda name: (not name.startswith(VERSION), name)):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name.startswith((FILE, DATA)):
            what = name.partition(" ")[2]
            if new is None or new == disk.ABSENT:
                changes.append(f"{what} is gone")
            elif old is None or old == disk.ABSENT:
                changes.append(f"{what} is new")
            else:
                counts = [value.partition(" files")[0] for value in (old, new)]
                several = name.startswith(DATA) and counts[0] != counts[1]
                changes.append(f"{what} changed" + (f" ({counts[0]} -> {counts[1]} files)" if several else ""))
        else:
            absent = "not installed" if name.startswith(VERSION) else "none"
            changes.append(f"{name.removeprefix(VERSION)} {old or absent} -> {new or absent}")
    return changes


def of_recipe(name: str, old: Any, new: Any) -> list[str]:
    """Return a short text for each difference between two values, `old` and `new`, of the recipe's key `name`.

    If the values are sections, there is one text for each differing key in them.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        return [text for key in new for text in of_recipe(f"{name}.{key}", old.get(key), new[key])]
    return [] if old == new else [f"{name} {_shown(old)} -> {_shown(new)}"]


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
