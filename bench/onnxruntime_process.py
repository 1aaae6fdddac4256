"""Runs an ONNX file with ONNX Runtime in a separate process, on this CPU or on an emulated one.

U8S8 kernels are exact on CPUs with VNNI and saturate on others. On any machine, qemu's user mode emulates a CPU without
VNNI.
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
    """The file could not be run; the message has the reason, in the form of a table cell."""


def missing(cpu: str | None) -> str | None:
    """Return why a CPU cannot be emulated here; None if it can."""
    return "no qemu-x86_64" if cpu is not None and shutil.which("qemu-x86_64") is None else None


def outputs(
    model: Path,
    names: Sequence[str],
    images: npt.NDArray[Any],
    folder: Path,
    cpu: str | None = None,
    python: Path | None = None,
) -> list[npt.NDArray[Any]]:
    """Return a file's outputs, in the order of `names`.

    Args:
        model: An ONNX file with one input, "input".
        names: Names of the outputs.
        images: The input images.
        folder: For scratch files.
        cpu: x86 CPU model of qemu; None for this machine's CPU.
        python: Python of another CPU, such as `bench.emulated_arm.python`; None for this Python.

    Raises:
        NotRun: There is no emulator, or ONNX Runtime does not run the file or exceeds the time limit.
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
