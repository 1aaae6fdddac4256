"""Chooses the device and the compiler of a training run, and makes the run reproducible."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import numpy as np
import torch
from torch import nn

from crqat.core.errors import ToolError
from crqat.train import compilers


def choose_device(name: str) -> torch.device:
    """Return the torch device for a recipe's `device`.

    Raises:
        ToolError: The device is not available.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        msg = "device: cuda is asked for and torch sees no CUDA device; set `device: auto`, or see crqat doctor"
        raise ToolError(msg)
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def compiler(device: torch.device) -> str:
    """Return how steps are compiled on a device, e.g. "torch.compile (g++)"; "" if torch.compile finds no compiler."""
    if device.type == "cuda":
        return "torch.compile (triton)" if find_spec("triton") and compilers.triton() else ""
    name = compilers.cpp()
    return f"torch.compile ({name})" if name else ""


def channels_last(model: nn.Module) -> nn.Module:
    """Convert a network's four-dimensional tensors to channels last, the fastest layout for convolutions."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
    return model


@contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Within the context, torch is seeded and uses deterministic kernels; previous settings are restored at the end.

    On a CPU, the same seed gives the same bits.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - a user's own modules may draw from it
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
