"""Reads YAML for recipes: plain values, no aliases, no tags, no duplicate keys, and line numbers in errors."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from crqat.core.errors import UsageError

# Twenty times the longest recipe; YAML that takes a minute to reject is longer.
_MAX_BYTES = 1 << 16
# YAML 1.1 reads 1e-4 as text, but users mean the number.
_FLOAT = re.compile(r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)$")
_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases (they can expand without limit), dates, merge keys and duplicate keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed; write the value out", mark)
        node = super().compose_node(parent, index)
        if node is not None and node.tag not in _PLAIN:
            problem = f"the tag {node.tag} is not allowed; write a plain value"
            raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen:
                problem = f"the key `{key.value}` appears twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        integer = node.tag.endswith(":int")
        try:
            value: int | float = self.construct_yaml_int(node) if integer else self.construct_yaml_float(node)
            if math.isfinite(value):
                return value
        except (ValueError, OverflowError):
            pass
        raise yaml.constructor.ConstructorError(None, None, "not a finite number", node.start_mark)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _PLAIN]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file as dictionaries, lists, texts, numbers, booleans and None.

    Raises:
        UsageError: The file cannot be read, is too large, or is not plain YAML.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        fix = "give the recipe, a .yaml file" if path.is_dir() else "`crqat init` writes a recipe"
        msg = f"{path}: {error.strerror}; {fix}"
        raise UsageError(msg) from error
    if len(content) > _MAX_BYTES:
        msg = f"{path}: larger than 64 KiB, too large for a recipe"
        raise UsageError(msg)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        msg = f"{path}: not UTF-8 text (byte {error.start}); is it a recipe?"
        raise UsageError(msg) from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """Return the content of a YAML text; see `read_yaml`.

    Raises:
        UsageError: The text is not plain YAML; the message starts with `where` and the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of SafeLoader that takes less, not more
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f"{mark.line + 1}: "
        msg = f"{where}:{line or ' '}{error.problem or error.context}"
        raise UsageError(msg) from error
    except yaml.YAMLError as error:
        msg = f"{where}: {' '.join(str(error).split())}"
        raise UsageError(msg) from error
    except RecursionError as error:
        msg = f"{where}: nested too deeply for a recipe"
        raise UsageError(msg) from error
