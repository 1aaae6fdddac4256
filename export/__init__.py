"""Exports a checkpoint to ONNX files with Q/DQ nodes, one or more files for each target. Needs torch and onnx.

`crqat.export(model, out, ...)` is `crqat.export.export_model.export`: a function and a package share one name. Python
sets an imported package as an attribute of its parent and overwrites what was there. The package is therefore callable
itself, and the order of imports does not matter.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """This package as a callable, which writes a network's files."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Export a network; see `crqat.export.export_model.export`."""
        from crqat.export.export_model import export

        return export(*arguments, **options)

    @property
    def __signature__(self) -> Any:
        """Return the function's signature, for `inspect` and notebooks."""
        import inspect

        from crqat.export.export_model import export

        return inspect.signature(export)


sys.modules[__name__].__class__ = _CallablePackage
