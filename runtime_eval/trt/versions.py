"""Table of the features of TensorRT versions, and detection of the installed version."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

from crqat.core.errors import ToolError, UsageError
from crqat.runtime_eval.machine import host

TENSORRT, RTX = "tensorrt", "tensorrt_rtx"
INSTALL_HINTS = {
    RTX: "pip install crqat-edge[tensorrt-cpu]",
    TENSORRT: "pip install tensorrt; a Jetson uses JetPack's",
}
# TensorRT's module comes in packages of several names, one for each major version of CUDA.
_RTX_DISTRIBUTIONS = ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12")


@dataclass(frozen=True)
class Capability:
    """Features of one range of TensorRT versions.

    Attributes:
        module: Name of the Python module.
        since: First version of the range, which ends where the module's next range begins.
        typing: "weak": layers run in types that builder flags allow. "flag": the same, but a network can also be
            created strongly typed and then runs in the file's own types. "strong": always strongly typed.
        explicit_batch: Whether the ONNX parser only accepts a network that was created with EXPLICIT_BATCH.
        precision_flags: Builder flags that a weakly typed network needs; strong typing forbids them.
        profiles: Whether optimization profiles bound a dynamic batch.
        timing_cache: Whether measured kernel times can be kept between builds.
        compute_capabilities: GPUs that an engine can be built for on another machine; empty if it is always built for
            this machine's GPU.
    """

    module: str
    since: tuple[int, int]
    typing: Literal["weak", "flag", "strong"]
    explicit_batch: bool
    precision_flags: tuple[str, ...]
    profiles: bool = True
    timing_cache: bool = True
    compute_capabilities: tuple[str, ...] = ()


# JetPack 5.1 has 8.5, 6.0 has 8.6, 6.1 and 6.2 have 10.3, 7 has 10.13 and later.
TABLE = (
    Capability(TENSORRT, (8, 5), "weak", True, ("FP16", "INT8")),
    Capability(TENSORRT, (10, 0), "flag", False, ("FP16", "INT8")),
    Capability(TENSORRT, (11, 0), "strong", False, ()),
    Capability(
        RTX,
        (1, 0),
        "strong",
        explicit_batch=False,
        precision_flags=(),
        timing_cache=False,
        compute_capabilities=("SM75", "SM80", "SM86", "SM89", "SM120", "SM121"),
    ),
)
# GPUs of Jetsons and data centres, which the builder for machines without a GPU does not support.
_MISSING_TARGETS = {"SM72": "Jetson Xavier", "SM87": "Jetson Orin", "SM90": "Hopper", "SM110": "Jetson Thor"}


def capability(module: str, version: str) -> Capability:
    """Return the features of a builder at a version, from the row of `TABLE` for its range.

    Raises:
        ToolError: The version is older than every row.
    """
    numbers = tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:2])
    rows = [row for row in TABLE if row.module == module and row.since <= numbers]
    if not rows:
        msg = f"{module} {version} is older than crqat supports; install {module} 8.5 or newer"
        raise ToolError(msg)
    return max(rows, key=lambda row: row.since)


def check_targets(module: str, wanted: tuple[str, ...]) -> None:
    """Check that a builder supports the GPUs that an engine should be built for; an empty list is always valid.

    Raises:
        UsageError: A GPU is not supported; the message lists the supported ones and the fix.
    """
    row = max((row for row in TABLE if row.module == module), key=lambda row: row.since)
    for name in wanted:
        if name in row.compute_capabilities:
            continue
        if not row.compute_capabilities:
            msg = f"compute capability {name}: {module} builds for the GPU of this machine alone; leave the option out"
        elif name in _MISSING_TARGETS:
            msg = (
                f"compute capability {name} ({_MISSING_TARGETS[name]}): {module} does not build for it, and engines "
                f"for other GPUs do not show which layers are INT8 on it; build with tensorrt on the device itself"
            )
        else:
            msg = f"compute capability {name}: {module} supports only {', '.join(row.compute_capabilities)}"
        raise UsageError(msg)


def installed(module: str) -> str | None:
    """Return the version of an installed builder without importing it; None if it is not installed."""
    spec = importlib.util.find_spec(module)
    # A package of type stubs has no file of its own.
    if spec is None or spec.origin is None:
        return None
    for name in _RTX_DISTRIBUTIONS if module == RTX else (module,):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return str(getattr(importlib.import_module(module), "__version__", "unknown"))


def choose() -> str | None:
    """Return the builder for this machine: tensorrt if there is a GPU, else tensorrt_rtx; None without either."""
    if host.cuda_device() and installed(TENSORRT):
        return TENSORRT
    return RTX if installed(RTX) else None


def load(module: str) -> Any:
    """Import the Python module of a builder and return it.

    Raises:
        ToolError: The module is not installed, or its libraries cannot be loaded.
    """
    try:
        loaded = importlib.import_module(module)
    except Exception as error:  # its libraries fail in many ways
        msg = f"{module} cannot be imported: {' '.join(str(error).split())}; {INSTALL_HINTS[module]}"
        raise ToolError(msg) from error
    if not hasattr(loaded, "__version__"):
        msg = f"{module} is not installed, only type stubs of it; {INSTALL_HINTS[module]}"
        raise ToolError(msg)
    return loaded


def network_flags(trt: Any, row: Capability) -> tuple[int, list[str]]:
    """Return the network flags that a builder needs, as the bit mask for `create_network` and as names.

    Raises:
        ToolError: The module lacks a flag that its version should have.
    """
    wanted = ["EXPLICIT_BATCH"] if row.explicit_batch else []
    wanted += [] if row.typing == "weak" else ["STRONGLY_TYPED"]
    # Version 10 still has EXPLICIT_BATCH and ignores it.
    members = trt.NetworkDefinitionCreationFlag.__members__
    missing = [name for name in wanted if name not in members]
    if missing:
        msg = f"{row.module} {trt.__version__} has no network flag {missing[0]}; install it again"
        raise ToolError(msg)
    return sum(1 << int(members[name]) for name in wanted), wanted
