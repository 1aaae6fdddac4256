"""Reads what the `export` stage left, before anything of it is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from crqat.core.errors import UsageError
from crqat.core.results.export import ExportPayload
from crqat.core.run_directory import Manifest, payload_of
from crqat.runtime_eval.runners import onnx_header

FLOAT = "float"


def read_payload(
    export_dir: Path, manifest: Manifest
) -> tuple[ExportPayload, npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return an export's payload, images uint8 [N, C, H, W] (memory-mapped) and labels int64 [N]."""
    if manifest.stage != "export":
        msg = f"{export_dir}: not an export but the stage {manifest.stage}; give the run's `export` directory"
        raise UsageError(msg)
    payload = payload_of(ExportPayload, export_dir, manifest)
    entries = payload.models
    names = [payload.images, payload.labels, *(entry.file for entry in entries)]
    names += [entry.expected_codes for entry in entries if entry.expected_codes is not None]
    targets = [entry.target for entry in entries]
    for name in names:
        if name not in manifest.files:  # its hash was not checked
            msg = f"{export_dir}: the manifest names {name} as a model or data, but has no SHA-256 of it; export again"
            raise UsageError(msg)
    if targets.count(FLOAT) != 1:
        msg = f"{export_dir}: has {targets.count(FLOAT)} float models, not exactly one to compare with; export again"
        raise UsageError(msg)
    for entry in entries:
        _refuse_external_data(export_dir / entry.file)
    images, labels = (_read_array(export_dir / name) for name in names[:2])
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) == 0:
        msg = f"{export_dir / names[0]}: {images.dtype} {list(images.shape)}, expected uint8 [N, C, H, W]; export again"
        raise UsageError(msg)
    if labels.dtype != np.int64 or labels.shape != (len(images),):
        shape = list(labels.shape)
        msg = f"{export_dir / names[1]}: {labels.dtype} {shape}, expected int64 [{len(images)}]; export again"
        raise UsageError(msg)
    return payload, images, labels


def _refuse_external_data(path: Path) -> None:
    try:
        tensor = onnx_header.external_tensor(path)
    except UsageError:
        return  # no runtime will load the file; the reason becomes this model's result
    if tensor is not None:
        msg = f"{path}: the tensor {tensor} is stored in another file; external data is refused, export again"
        raise UsageError(msg)


def _read_array(path: Path) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        msg = f"{path}: not a .npy array ({error}); export again"
        raise UsageError(msg) from error
    return array
