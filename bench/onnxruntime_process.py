"""A file's outputs as ONNX Runtime computes them in a process of its own, on this CPU or on an emulated one.

U8S8 kernels are exact on CPUs with VNNI and saturate without: qemu's user mode gives a CPU without it on any machine.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# A CPU model of qemu with AVX2 and without VNNI.
WITHOUT_VNNI = "Haswell"
TIME_LIMIT_SECONDS = 900.0
_RUN = """
import json, sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
numpy.savez(sys.argv[3], *session.run(json.loads(sys.argv[4]), {"input": numpy.load(sys.argv[2])}))
"""


class NotRun(Exception):
    """There are no outputs; the message says why, as a table shows it."""


def missing(cpu: str | None) -> str | None:
    """Why a CPU cannot be had here, None if it can."""
    return "no qemu-x86_64" if cpu is not None and shutil.which("qemu-x86_64") is None else None


def outputs(
    model: Path,
    names: Sequence[str],
    images: npt.NDArray[Any],
    folder: Path,
    cpu: str | None = None,
    python: Path | None = None,
) -> list[npt.NDArray[Any]]:
    """A file's outputs, in the order of their names.

    Args:
        model: An ONNX file with one input, "input".
        names: Of its outputs.
        images: The input.
        folder: For scratch files.
        cpu: An x86 CPU model of qemu, None for this machine's.
        python: Of another CPU, such as `bench.emulated_arm.python`; None for this one.

    Raises:
        NotRun: There is no emulator, or ONNX Runtime does not run the file, or not in time.
    """
    lacking = missing(cpu)
    if lacking is not None:
        msg = f"not run: {lacking}"
        raise NotRun(msg)
    given, made = folder / "images.npy", folder / "outputs.npz"
    np.save(given, images)
    emulator = [] if cpu is None else ["qemu-x86_64", "-cpu", cpu]
    command = [
        *emulator,
        str(python or sys.executable),
        "-c",
        _RUN,
        str(model),
        str(given),
        str(made),
        json.dumps(list(names)),
    ]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIME_LIMIT_SECONDS)
    except subprocess.TimeoutExpired as error:
        msg = f"not run: not finished after {TIME_LIMIT_SECONDS:g} s"
        raise NotRun(msg) from error
    if result.returncode:
        words = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        msg = f"not comparable: {words[-1] if words else f'its process ended with {result.returncode}'}"[:300]
        raise NotRun(msg)
    with np.load(made) as arrays:
        return [arrays[f"arr_{index}"] for index in range(len(names))]
