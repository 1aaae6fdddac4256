"""Writes the text of a recipe: only the keys that are needed, or all keys with their comments."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

TEMPLATE = Path(__file__).parents[1] / "templates" / "recipe.yaml"
# Values that the template sets for its own data, which are not defaults.
_DEFAULTS = {"crop_padding": 4, "flip": True}


def _scalar(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1 << 16, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def needed(values: Mapping[str, Any], comments: Mapping[str, Sequence[str]]) -> str:
    """Return the text of a recipe that contains only the keys in `values`.

    Args:
        values: Values of the recipe: "name", and sections by name.
        comments: Comment lines of each key, such as "data.mean"; the key may be absent from `values`. The comment lines
            under the key "" come first in the text.
    """
    lines = [f"# {line}" for line in comments[""]] + ["", f"name: {_scalar(values['name'])}"]
    for section in ("data", "model", "float", "qat"):
        if section not in values:
            continue
        lines += ["", f"{section}:"]
        for key, value in values[section].items():
            said = comments.get(f"{section}.{key}", [])
            lines.append(f"  {key}: {_scalar(value)}" + (f"  # {said[0]}" if said else ""))
        left = [line for key, said in comments.items() if key.partition(".")[0] == section for line in said]
        absent = [line for line in left if not any(entry.endswith(f"# {line}") for entry in lines)]
        lines += [f"  # {line}" for line in absent]
    return "\n".join(lines) + "\n"


def filled(values: Mapping[str, Any], comments: Mapping[str, Sequence[str]]) -> str:
    """Return the text of a recipe with every key and its explanation; for the arguments, see `needed`."""
    values = {**values, "float": values.get("float", {"epochs": 0})}
    values["data"] = {**_DEFAULTS, **values["data"]}
    lines, section = [f"# {line}" for line in comments[""]], ""
    for line in TEMPLATE.read_text("utf-8").splitlines():
        found = re.match(r"( *)(\w+):( +)?", line)
        if found is None or line.startswith("#"):
            lines.append(line)
            continue
        indent, key, _ = found.groups()
        section = section if indent else key
        own = values.get(section, {}).get(key) if indent else values.get(key)
        lines += [f"{indent}# {said}" for said in comments.get(f"{section}.{key}", [])]
        if own is None or isinstance(own, dict):  # the line of a section itself stays
            lines.append(line)
            continue
        column = line.index("#") if "#" in line else 0
        text = f"{indent}{key}: {_scalar(own)}"
        lines.append(f"{text:<{max(column - 1, 0)}} {line[column:]}" if column else text)
    return "\n".join(lines) + "\n"
