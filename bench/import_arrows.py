"""Reports the size of packages and the imports between them: files, lines, arrows, and counts that should stay small.

An arrow goes from a file to a file that it imports, whether at the top or inside a function.

    python -m bench.import_arrows [--root .]
"""

from __future__ import annotations

import argparse
import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("core", "train", "export", "runtime_eval", "pipeline")
FOLDERS = {"tests": Path("tests"), "bench": Path("bench")}
RUNTIMES = {"onnxruntime", "tensorrt"}


@dataclass(frozen=True)
class Arrow:
    """One import of a module of crqat by another.

    Attributes:
        source: The importing module without "crqat.": "export.qdq.write".
        target: The imported module without "crqat.".
        lazy: Whether the import is inside a function.
    """

    source: str
    target: str
    lazy: bool


def modules(root: Path) -> dict[str, Path]:
    """Return the file of each module of crqat, by the module's name without "crqat."; crqat itself is under ""."""
    src = root / "src" / "crqat"
    found = {"": src / "__init__.py", "__main__": src / "__main__.py"}
    for package in PACKAGES:
        for path in sorted((src / package).rglob("*.py")):
            parts = path.relative_to(src).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows(root: Path) -> list[Arrow]:
    """Return every import of one module of crqat by another."""
    found = modules(root)
    return [arrow for name, path in found.items() for arrow in _of_file(name, path, found)]


def imported(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Yield the dotted name of each absolute import of a file, and whether the import is inside a function."""
    lazy = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield from ((f"{node.module}.{alias.name}", id(node) in lazy) for alias in node.names)


def _of_file(source: str, path: Path, found: dict[str, Path]) -> Iterator[Arrow]:
    for name, lazy in imported(ast.parse(path.read_text())):
        if name.split(".")[0] != "crqat":
            continue
        target = name.removeprefix("crqat").removeprefix(".")
        while target not in found:  # the last part is a name in the module, not a module
            target = target.rpartition(".")[0]
        if target != source:
            yield Arrow(source, target, lazy)


def package_of(module: str) -> str:
    """Return the package of a module; "crqat" for the API."""
    first = module.split(".")[0]
    return first if first in PACKAGES else "crqat"


def names_of_runtimes(tree: ast.AST) -> tuple[int, int]:
    """Return how many strings in a file are the name of a runtime, and how many comparisons contain such a string."""
    strings = sum(isinstance(node, ast.Constant) and node.value in RUNTIMES for node in ast.walk(tree))
    compared = sum(
        isinstance(node, ast.Compare)
        and any(isinstance(part, ast.Constant) and part.value in RUNTIMES for part in ast.walk(node))
        for node in ast.walk(tree)
    )
    return strings, compared


def main() -> None:
    """Print the sizes of the packages and the imports between them as tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path())
    root = parser.parse_args().root
    files: Counter[str] = Counter()
    lines: Counter[str] = Counter()
    strings = compared = loose = 0
    for name, path in modules(root).items():
        text = path.read_text()
        files[package_of(name)] += 1
        lines[package_of(name)] += text.count("\n")
        loose += text.count("dict[str, Any]")
        own, in_comparisons = names_of_runtimes(ast.parse(text))
        strings, compared = strings + own, compared + in_comparisons
    for name, folder in FOLDERS.items():
        for path in (root / folder).rglob("*.py"):
            files[name] += 1
            lines[name] += path.read_text().count("\n")
    pairs = {(arrow.source, arrow.target) for arrow in arrows(root)}
    between = Counter((package_of(a), package_of(b)) for a, b in pairs)
    for package in files:
        inside = between[package, package]
        print(f"{package:<14}{files[package]:>5} files{lines[package]:>8} lines{inside:>6} arrows inside")
    for (source, target), number in sorted(between.items()):
        if source != target:
            print(f"{source} -> {target}: {number}")
    print(f"names of runtimes: {strings}, in comparisons: {compared}; dict[str, Any]: {loose}")


if __name__ == "__main__":
    main()
