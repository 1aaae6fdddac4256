"""Checkpoint in, ONNX files with Q/DQ nodes out, one or more for each target. Needs torch and onnx.

`crqat.export(model, out, ...)` is `crqat.export.export_model.export`: a function and a package share one name. Python
makes a package that is imported the attribute of its parent, whoever set that before, so the package itself can be
called, and the order of imports does not matter.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """The package, which writes a network's files when it is called."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """See `crqat.export.export_model.export`."""
        from crqat.export.export_model import export

        return export(*arguments, **options)

    @property
    def __signature__(self) -> Any:
        """The function's, for `inspect` and notebooks."""
        import inspect

        from crqat.export.export_model import export

        return inspect.signature(export)


sys.modules[__name__].__class__ = _CallablePackage
