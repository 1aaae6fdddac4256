"""Finds what a recipe's function imports by reading the source files, without importing or running anything."""

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
    """Imports of a module and of all the user's own modules that it imports, directly or indirectly.

    Attributes:
        files: Maps the name of each of these modules to its file.
        packages: Top-level names of all other imports, except the standard library.
    """

    files: dict[str, Path]
    packages: frozenset[str]


def imports_of(module: str) -> Imports:
    """Return the user's own modules and the packages that a module imports, directly or through the user's modules."""
    files: dict[str, Path] = {}
    packages: set[str] = set()
    pending = [module]
    seen: set[str] = set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        if parent := name.rpartition(".")[0]:  # its __init__.py runs too
            pending.append(parent)
        path = module_file(name)
        if path is not None and _is_own(path):
            files[name] = path
            pending += _imported(name, path)
        elif name.partition(".")[0] not in sys.stdlib_module_names:
            packages.add(name.partition(".")[0])
    return Imports(dict(sorted(files.items())), frozenset(packages - {name.partition(".")[0] for name in files}))


def versions(packages: frozenset[str]) -> dict[str, str]:
    """Return the version of each installed distribution that provides one of the packages (import names)."""
    distributions = metadata.packages_distributions() if packages else {}
    names = {name for package in packages for name in distributions.get(package, ())}
    return {name: metadata.version(name) for name in sorted(names)}


def module_file(module: str) -> Path | None:
    """Return the path of a module's source file without importing the module; None if it has none."""
    search, spec = None, None
    # Search each part separately: by its full name, a folder without __init__.py is only found below an imported one.
    for part in module.split("."):
        spec = machinery.PathFinder.find_spec(part, search)
        if spec is None:
            return None
        search = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    return Path(spec.origin) if spec and spec.origin and Path(spec.origin).is_file() else None


def _is_own(path: Path) -> bool:
    """Return whether a file is the user's own Python source, not that of Python, a package or crqat."""
    foreign = [Path(sysconfig.get_path(key)) for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    inside = any(path.resolve().is_relative_to(folder.resolve()) for folder in foreign)
    installed = inside or bool(set(path.parts) & set(_INSTALLED))
    return path.suffix == ".py" and not installed and failures.own_file(path) is None


def _imported(module: str, path: Path) -> Iterator[str]:
    """Yield the names of all modules that a source file imports, also inside functions."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return  # the import itself will report the error
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
