"""Metadata stored next to a TensorRT plan: TensorRT version, device and SHA-256.

A plan only works with the version that built it and the kind of device that it was built for; TensorRT reports a
mismatch only as a line in a log. Loading a plan runs code in it, so a plan whose hash differs from the recorded one is
not loaded.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from crqat.core import strict_json
from crqat.core.errors import ToolError, UsageError
from crqat.core.run_directory import replace_file

SCHEMA_VERSION = 1
PRECISIONS = ("int8", "float16", "float32")
# First device in TensorRT's support matrix with INT8 tensor cores (Xavier).
INT8_CAPABILITY = (7, 2)


@dataclass(frozen=True)
class Sidecar:
    """Metadata of a TensorRT plan (a serialized engine), stored in a file next to it.

    Attributes:
        plan_sha256: SHA-256 of the plan.
        builder: Module that built the plan: "tensorrt" or "tensorrt_rtx".
        version: That module's `__version__`.
        compute_capability: Compute capability of the device that the plan was built for, such as "8.7".
        precision: Precision that the ONNX file asks for: "int8", "float16" or "float32".
        metadata: Metadata of the ONNX file, strings by name; the plan itself does not store them.
        schema_version: Version of the sidecar's layout.
    """

    plan_sha256: str
    builder: str
    version: str
    compute_capability: str
    precision: str
    metadata: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


def sidecar_path(plan: Path) -> Path:
    """Return the path of a plan file's sidecar."""
    return plan.with_name(f"{plan.name}.json")


def save(
    path: Path,
    plan: bytes,
    *,
    builder: str,
    version: str,
    compute_capability: str,
    precision: str,
    metadata: dict[str, str],
) -> Sidecar:
    """Write a plan and its sidecar, each atomically; between the two writes a reader sees a hash that does not match.

    Args:
        path: File of the plan.
        plan: Bytes of the plan.
        builder: Module that built the plan, as in `Sidecar`.
        version: Version of the builder.
        compute_capability: Compute capability of the device that the plan is for.
        precision: One of `PRECISIONS`.
        metadata: Metadata of the ONNX file.

    Raises:
        ToolError: The files cannot be written.
    """
    if precision not in PRECISIONS:
        msg = f"precision {precision}, not one of {', '.join(PRECISIONS)}"
        raise ValueError(msg)
    sidecar = Sidecar(hashlib.sha256(plan).hexdigest(), builder, version, compute_capability, precision, metadata)
    try:
        replace_file(path, plan)
        replace_file(sidecar_path(path), json.dumps(asdict(sidecar), indent=1, sort_keys=True).encode())
    except OSError as error:
        msg = f"{path}: cannot be written: {error.strerror}"
        raise ToolError(msg) from error
    return sidecar


def read(plan: Path) -> Sidecar:
    """Return the sidecar of a plan file.

    Raises:
        UsageError: The sidecar is missing or damaged.
    """
    path = sidecar_path(plan)
    try:
        data: Any = strict_json.read(path)
        sidecar = Sidecar(**data)
    except FileNotFoundError as error:
        msg = f"{path}: missing; a plan is loaded only with its sidecar, build it again"
        raise UsageError(msg) from error
    except (OSError, ValueError, TypeError) as error:
        msg = f"{path}: cannot be used ({error}); build the engine again"
        raise UsageError(msg) from error
    texts = (sidecar.plan_sha256, sidecar.builder, sidecar.version, sidecar.compute_capability, sidecar.precision)
    pairs = sidecar.metadata.items() if isinstance(sidecar.metadata, dict) else [(None, None)]
    if not all(isinstance(text, str) for text in (*texts, *(text for pair in pairs for text in pair))):
        msg = f"{path}: damaged (a value is not text); build the engine again"
        raise UsageError(msg)
    if sidecar.schema_version != SCHEMA_VERSION or sidecar.precision not in PRECISIONS:
        msg = (
            f"{path}: written by another version of crqat (schema version {sidecar.schema_version}); build the engine "
            "again"
        )
        raise UsageError(msg)
    return sidecar


def require_int8(capability: tuple[int, int]) -> None:
    """Check that a device computes INT8.

    Raises:
        ToolError: The device's compute capability is below 7.2.
    """
    if capability < INT8_CAPABILITY:
        msg = f"INT8 needs compute capability 7.2, but this device has {_text(capability)}; use the float16 file here"
        raise ToolError(msg)


def load(plan: Path, builder: str, version: str, capability: tuple[int, int]) -> tuple[bytes, Sidecar]:
    """Return the bytes of a plan and its sidecar, after checking that the plan is intact and fits this machine.

    Args:
        plan: File of the plan.
        builder: Module that will run the plan: "tensorrt" or "tensorrt_rtx".
        version: That module's `__version__`.
        capability: Compute capability of the device, major and minor.

    Raises:
        UsageError: The plan or its sidecar is missing or damaged.
        ToolError: The plan is for another TensorRT or device, or this device has no INT8.
    """
    sidecar = read(plan)
    if sidecar.precision == "int8":
        require_int8(capability)
    for what, built, here in (
        ("builder", sidecar.builder, builder),
        (f"{builder} version", sidecar.version, version),
        ("compute capability", sidecar.compute_capability, _text(capability)),
    ):
        if built != here:
            msg = f"{plan}: the engine was built for {what} {built}, not {here}; build it on this machine"
            raise ToolError(msg)
    try:
        content = plan.read_bytes()
    except OSError as error:
        msg = f"{plan}: cannot be read: {error.strerror}; build the engine again"
        raise UsageError(msg) from error
    if hashlib.sha256(content).hexdigest() != sidecar.plan_sha256:
        msg = f"{plan}: altered or damaged: its SHA-256 is not that in its sidecar; build the engine again"
        raise UsageError(msg)
    return content, sidecar


def _text(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
