"""What the versions of TensorRT have in common and what they have not, in one table; and which of them is installed."""

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
    TENSORRT: "pip install tensorrt; on a Jetson it is JetPack's",
}
# Its module comes in packages of several names, one for each major version of CUDA.
_RTX_DISTRIBUTIONS = ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12")


@dataclass(frozen=True)
class Capability:
    """What one range of versions has.

    Attributes:
        module: Its Python module.
        since: First version of the range; it ends where the next one of the same module begins.
        typing: "weak": layers run in a type that builder flags allow. "flag": that too, but a network can be created
            strongly typed, and then runs in the file's own types. "strong": always strongly typed.
        explicit_batch: The ONNX parser only takes a network that was created with EXPLICIT_BATCH.
        precision_flags: Builder flags that a weakly typed network needs; strong typing forbids them.
        profiles: A dynamic batch is bounded by optimization profiles.
        timing_cache: Measured kernel times can be kept from one build to the next.
        compute_capabilities: GPUs that an engine can be built for from another machine; empty where it is always for
            the GPU in this one.
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
# Of Jetsons and data centres, which the builder for machines without a GPU does not have.
_MISSING_TARGETS = {"SM72": "Jetson Xavier", "SM87": "Jetson Orin", "SM90": "Hopper", "SM110": "Jetson Thor"}


def capability(module: str, version: str) -> Capability:
    """The row of the table that a version falls under.

    Raises:
        ToolError: It is older than all of them.
    """
    numbers = tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:2])
    rows = [row for row in TABLE if row.module == module and row.since <= numbers]
    if not rows:
        msg = f"{module} {version} is older than what crqat can drive; install {module} 8.5 or newer"
        raise ToolError(msg)
    return max(rows, key=lambda row: row.since)


def check_targets(module: str, wanted: tuple[str, ...]) -> None:
    """Check that a builder has the GPUs that an engine is to be for; none are always right.

    Raises:
        UsageError: It has not; the message says which it has and what to do.
    """
    row = max((row for row in TABLE if row.module == module), key=lambda row: row.since)
    for name in wanted:
        if name in row.compute_capabilities:
            continue
        if not row.compute_capabilities:
            msg = f"compute capability {name}: {module} builds for the GPU of this machine alone; leave it out"
        elif name in _MISSING_TARGETS:
            msg = (
                f"compute capability {name} ({_MISSING_TARGETS[name]}): {module} does not build for it, and what it "
                f"builds for others says nothing of it; build with tensorrt on the device itself"
            )
        else:
            msg = f"compute capability {name}: {module} has {', '.join(row.compute_capabilities)}"
        raise UsageError(msg)


def installed(module: str) -> str | None:
    """The version of a builder that is installed, without importing it; None if it is not."""
    spec = importlib.util.find_spec(module)
    # Type stubs make a package without a file of its own.
    if spec is None or spec.origin is None:
        return None
    for name in _RTX_DISTRIBUTIONS if module == RTX else (module,):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return str(getattr(importlib.import_module(module), "__version__", "unknown"))


def choose() -> str | None:
    """The builder to take here: tensorrt where there is a GPU, which it needs; else tensorrt_rtx; None without both."""
    if host.cuda_device() and installed(TENSORRT):
        return TENSORRT
    return RTX if installed(RTX) else None


def load(module: str) -> Any:
    """Import a builder's module.

    Raises:
        ToolError: It is not installed, or its libraries cannot be loaded.
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
    """The flags of `create_network` and their names. Their numbers differ: bit 0 means another flag in 11 than in 10.

    Raises:
        ToolError: The module lacks a flag that its version is known to have.
    """
    wanted = ["EXPLICIT_BATCH"] if row.explicit_batch else []
    wanted += [] if row.typing == "weak" else ["STRONGLY_TYPED"]
    # 10 still has EXPLICIT_BATCH and ignores it.
    members = trt.NetworkDefinitionCreationFlag.__members__
    missing = [name for name in wanted if name not in members]
    if missing:
        msg = f"{row.module} {trt.__version__} has no network flag {missing[0]}, which its version is known to have"
        raise ToolError(msg)
    return sum(1 << int(members[name]) for name in wanted), wanted
