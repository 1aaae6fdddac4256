"""What a recipe's function imports, found by reading the files: nothing is imported and nothing is run."""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import machinery, metadata
from pathlib import Path

from crqat.core import failures

_INSTALLED = ("site-packages", "dist-packages")


@dataclass(frozen=True)
class Imports:
    """Of a module and of all modules of the user's own that it imports, directly or not.

    Attributes:
        files: Their names, each with its file.
        packages: Top-level names of everything else that they import, but the standard library.
    """

    files: dict[str, Path]
    packages: frozenset[str]


def imports_of(module: str) -> Imports:
    """Read a module and follow its imports as far as the user's own files go."""
    files: dict[str, Path] = {}
    packages: set[str] = set()
    pending = [module]
    seen: set[str] = set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        if parent := name.rpartition(".")[0]:  # its __init__.py is run, too
            pending.append(parent)
        path = module_file(name)
        if path is not None and _is_own(path):
            files[name] = path
            pending += _imported(name, path)
        elif name.partition(".")[0] not in sys.stdlib_module_names:
            packages.add(name.partition(".")[0])
    return Imports(dict(sorted(files.items())), frozenset(packages - {name.partition(".")[0] for name in files}))


def versions(packages: frozenset[str]) -> dict[str, str]:
    """The versions of the distributions that top-level names belong to, where one is installed."""
    distributions = metadata.packages_distributions() if packages else {}
    names = {name for package in packages for name in distributions.get(package, ())}
    return {name: metadata.version(name) for name in sorted(names)}


def module_file(module: str) -> Path | None:
    """The file of a module, found without importing it; None if there is none."""
    search, spec = None, None
    # Each part by itself: by its full name a folder without __init__.py is only found below an imported one.
    for part in module.split("."):
        spec = machinery.PathFinder.find_spec(part, search)
        if spec is None:
            return None
        search = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    return Path(spec.origin) if spec and spec.origin and Path(spec.origin).is_file() else None


def _is_own(path: Path) -> bool:
    """Whether a file is the user's: Python source that is neither Python's, nor installed, nor of crqat itself."""
    foreign = [Path(sysconfig.get_path(key)) for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    inside = any(path.resolve().is_relative_to(folder.resolve()) for folder in foreign)
    installed = inside or bool(set(path.parts) & set(_INSTALLED))
    return path.suffix == ".py" and not installed and failures.own_file(path) is None


def _imported(module: str, path: Path) -> Iterator[str]:
    """Names of the modules that a file may import, wherever in it the import stands."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return  # whoever imports it says what is wrong
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above).strip(".")
            if base:
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names if module_file(f"{base}.{alias.name}"))
            else:
                yield from (alias.name for alias in node.names)  # from . import x, of a file in no package
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0].value
            if called in ("import_module", "__import__") and isinstance(name, str) and name.strip("."):
                yield f"{package}.{name.lstrip('.')}".strip(".") if name.startswith(".") else name
