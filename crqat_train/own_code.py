"""Imports and calls the user's own functions and classes that a recipe names as "package.module:name"."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crqat.core.errors import CrqatError, UsageError


def import_function(name: str, key: str) -> Callable[..., Any]:
    """Return the function that a recipe names as "package.module:function".

    Args:
        name: The name in the recipe; the module may also lie in the current folder.
        key: The recipe's key, for messages.

    Raises:
        UsageError: The function cannot be imported or is not a function.
    """
    module_name, _, function_name = name.partition(":")
    # A console script does not search the current folder as `python -m` does. The folder comes last, so that no file in
    # it shadows an installed package.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the module is the user's: whatever it raises is why
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        msg = f"{key}: cannot import {module_name!r} ({reason}); install it or run in the folder it is in"
        raise UsageError(msg) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        msg = f"{key}: module {module_name!r} ({module.__file__}) has no function or class {function_name!r}"
        raise UsageError(msg)
    return function  # type: ignore[no-any-return]


def call_function(function: Callable[..., Any], name: str, key: str, arguments: dict[str, Any]) -> Any:
    """Call a function that a recipe names and return its result; its errors become a UsageError.

    Raises:
        UsageError: The parameters do not fit, or the function raises; the message has the file and line of the error.
    """
    try:
        inspect.signature(function).bind(**arguments)
    except (TypeError, ValueError) as error:
        call = ", ".join(f"{argument}=" for argument in arguments)
        msg = f"{key}: {name} must be callable as {name.partition(':')[2]}({call}) ({error})"
        raise UsageError(msg) from error
    try:
        return function(**arguments)
    except (CrqatError, MemoryError):
        raise
    except Exception as error:  # the function is the user's
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
        own = inspect.getsourcefile(inspect.unwrap(function)) if callable(function) else None
        frame = next((frame for frame in reversed(frames) if frame.filename == own), frames[-1] if frames else None)
        where = f", {frame.filename}:{frame.lineno}" if frame else ""
        msg = f"{key}: {name} raised {type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"
        raise UsageError(msg) from error
