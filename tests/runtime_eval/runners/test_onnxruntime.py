"""ONNX Runtime's runner gives back what it holds."""

from __future__ import annotations

import ctypes
import gc
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from runtime_eval.runners.onnxruntime import OnnxRuntimeRunner
from tests.runtime_eval.conftest import PREPROCESSING, Digits, onnx_bytes

WARM_UP, CYCLES = 50, 200


def resident() -> int:
    """Bytes of this process that lie in memory, after the allocator gave back what it can."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc: resident memory is not known")
@pytest.mark.parametrize("bits", [None, 4], ids=["float", "int8"])
def test_200_cycles_of_open_infer_close_keep_resident_memory(tmp_path: Path, digits: Digits, bits: int | None) -> None:
    rng = np.random.default_rng(0)
    # So large that sessions that stay open are seen.
    sizes = [64, 2048, 10]
    layers = [
        (rng.standard_normal((rows, columns)).astype(np.float32), np.zeros(columns, np.float32))
        for rows, columns in pairwise(sizes)
    ]
    path, images = tmp_path / "m.onnx", PREPROCESSING(digits.images[:8])
    path.write_bytes(onnx_bytes(layers, "onnxruntime", bits))

    def cycle() -> None:
        with OnnxRuntimeRunner(path, "CPUExecutionProvider", 1) as runner:
            runner.infer(images)

    for _ in range(WARM_UP):
        cycle()
    before = resident()
    for _ in range(CYCLES):
        cycle()
    growth = resident() / before - 1
    kept = [OnnxRuntimeRunner(path, "CPUExecutionProvider", 1) for _ in range(CYCLES)]
    leak = resident() / before - 1
    print(f"{before / 2**20:.1f} MiB, {100 * growth:+.2f} %; {100 * leak:+.1f} % if {len(kept)} stay open")
    assert growth < 0.05
    assert leak > 0.1  # the measure would have seen it
