"""Only a runtime's own file and its runner compare runtimes' names; everything else asks a Target what it needs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from crqat.core.targets import TARGETS

ROOT = Path(__file__).parents[1]
PACKAGES = ("src/crqat/core", "crqat_train", "export", "runtime_eval", "pipeline")
# A runtime's rules, and what loads it.
OWN = ("src/crqat/core/targets/", "runtime_eval/runners/")
# Not runtimes: the Python package that builds an engine, tensorrt or tensorrt_rtx, and versions of installed packages.
OTHERS = ("tensorrt_api.TENSORRT", "device['onnxruntime']")
LOOK_UPS = ("get", "pop", "setdefault", "startswith", "endswith", "count", "index", "__eq__", "__contains__")


def files() -> list[Path]:
    found = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return [path for path in found if not str(path.relative_to(ROOT)).startswith(OWN)]


def names(node: ast.expr | None, constants: frozenset[str] = frozenset()) -> bool:
    """Whether an expression is a runtime's name, a constant that holds one, or a collection with one in it."""
    if node is None or ast.unparse(node) in OTHERS:
        return False
    if isinstance(node, ast.Constant):
        return node.value in TARGETS
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        return any(names(element, constants) for element in node.elts)
    if isinstance(node, ast.Attribute) and node.attr == "name":  # TENSORRT.name
        return ast.unparse(node.value).split(".")[-1] in {name.upper() for name in TARGETS}
    return (isinstance(node, ast.Name) and node.id in constants) or (
        isinstance(node, ast.Attribute) and node.attr in constants
    )


def constants(trees: list[ast.Module]) -> frozenset[str]:
    """What a module calls a runtime's name, such as `RUNTIME = "onnxruntime"`."""
    found = set()
    for assigned in (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Assign)):
        for target in assigned.targets:
            pairs = [(target, assigned.value)]
            if isinstance(target, ast.Tuple) and isinstance(assigned.value, ast.Tuple):
                pairs = list(zip(target.elts, assigned.value.elts, strict=True))
            found |= {left.id for left, right in pairs if isinstance(left, ast.Name) and names(right)}
    return frozenset(found)


def comparisons(tree: ast.Module, known: frozenset[str] = frozenset()) -> Iterator[str]:
    """Every comparison, match and look-up by a runtime's name in a module."""
    for node in ast.walk(tree):
        compared: list[ast.expr | None] = []
        if isinstance(node, ast.Compare):
            compared = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            compared = [node.value]
        elif isinstance(node, ast.Subscript) and ast.unparse(node) not in OTHERS:
            of_a_type = isinstance(node.value, ast.Name) and node.value.id == "Literal"
            compared = [] if of_a_type else [node.slice]
        elif isinstance(node, ast.Dict):
            compared = list(node.keys)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOOK_UPS:
            compared = [*node.args]
        if any(names(expression, known) for expression in compared):
            yield f"{getattr(node, 'lineno', 0)}: {ast.unparse(node)}"


def test_nobody_compares_the_names_of_runtimes() -> None:
    trees = {path: ast.parse(path.read_text()) for path in files()}
    known = constants(list(trees.values()))
    found = [f"{path.relative_to(ROOT)}:{text}" for path, tree in trees.items() for text in comparisons(tree, known)]
    # What is installed here (device.py), and how each builder is installed (tensorrt_api.py), by package.
    allowed = ("runtime_eval/machine/host.py", "runtime_eval/trt/versions.py")
    assert [text for text in found if not text.startswith(allowed)] == []


@pytest.mark.parametrize(
    "code",
    [
        "if target == 'tensorrt': pass",
        "x = 1 if 'onnxruntime' in targets else 2",
        "x = target in ('float', 'tensorrt')",
        "match target:\n    case 'tensorrt': pass",
        "x = files['onnxruntime']",
        "x = files.get('onnxruntime')",
        "x = {'tensorrt': 127}[target]",
        "RUNTIME = 'onnxruntime'\nif client.RUNTIME != target: pass",
        "FLOAT, OURS = 'float', 'tensorrt'\nif target in (FLOAT, OURS): pass",
        "x = files[TENSORRT.name]",
    ],
)
def test_each_way_to_compare_them_is_seen(code: str) -> None:
    tree = ast.parse(code)
    assert list(comparisons(tree, constants([tree])))
