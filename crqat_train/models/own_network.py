"""Calls a user's own function or class that makes the network, and reports what is wrong with it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from crqat.core.errors import UsageError
from crqat.train.own_code import call_function, import_function

# Parameter names that users give the two numbers; the product's own name comes first.
CLASSES_NAMES = ("classes", "num_classes", "n_classes", "nb_classes")
CHANNELS_NAMES = ("channels", "in_channels", "in_chans", "num_channels", "input_channels")


def check_callable(name: str) -> None:
    """Check that `build` can call the function or class in `model.name`, without calling it; other names pass.

    Raises:
        UsageError: The function cannot be imported, or has a required parameter that is neither classes nor channels.
    """
    if ":" in name:
        network_arguments(import_function(name, "model.name"), name, 1, 1)


def network_arguments(function: Callable[..., Any], name: str, classes: int, channels: int) -> dict[str, int]:
    """Return the arguments for a user's function or class, under the names that it uses for them.

    Args:
        function: The user's function or class.
        name: The name in the recipe; used in messages.
        classes: Number of logits.
        channels: Number of image channels.

    Raises:
        UsageError: The function has a required parameter that is neither the number of classes nor of channels.
    """
    short = name.partition(":")[2]
    if isinstance(function, nn.Module):
        msg = (
            f"model.name: {name} is a network, not a function or class that makes one; name its class, or `def "
            f"build(): return {short}`"
        )
        raise UsageError(msg)
    signature = inspect.signature(function)
    named = [parameter.name for parameter in signature.parameters.values() if _by_name(parameter)]
    every = any(parameter.kind == parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    arguments: dict[str, int] = {}
    for names, value in ((CLASSES_NAMES, classes), (CHANNELS_NAMES, channels)):
        taken = next((own for own in names if own in named), None)
        if taken is not None:
            arguments[taken] = value
    if every and not arguments:
        arguments = {CLASSES_NAMES[0]: classes, CHANNELS_NAMES[0]: channels}
    try:
        signature.bind(**arguments)
    except TypeError as error:
        msg = (
            f"model.name: {name} must be callable as {short}(classes=, channels=), {short}(num_classes=) or {short}() "
            f"({error}); give its other parameters defaults, or name a function of yours that calls it"
        )
        raise UsageError(msg) from error
    return arguments


def _by_name(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)


def build_own(name: str, classes: int, channels: int) -> nn.Module:
    """Return the network that a user's function or class makes."""
    function = import_function(name, "model.name")
    arguments = network_arguments(function, name, classes, channels)
    model = call_function(function, name, "model.name", arguments)
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        msg = f"model.name: {name} must return a torch.nn.Module, got {kind}"
        raise UsageError(msg)
    return model
