"""ONNX Runtime's runner gives back what it holds."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.runtime_eval.conftest import PREPROCESSING, Digits, onnx_bytes

WARM_UP, CYCLES = 50, 200
ROOT = Path(__file__).parents[3]


# In a process of its own: what lies beside it in this one's memory would hide a leak.
SCRIPT = """
import ctypes, gc, os, sys
from pathlib import Path
import numpy as np
from crqat.runtime_eval.runners.onnxruntime import OnnxRuntimeRunner

path, images, warm_up, cycles = Path(sys.argv[1]), np.load(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def cycle():
    with OnnxRuntimeRunner(path, "CPUExecutionProvider", 1) as runner:
        runner.infer(images)

for _ in range(warm_up):
    cycle()
before = resident()
for _ in range(cycles):
    cycle()
after = resident()
kept = [OnnxRuntimeRunner(path, "CPUExecutionProvider", 1) for _ in range(cycles)]
print(before, after, resident())
"""


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
    path, images = tmp_path / "m.onnx", tmp_path / "images.npy"
    path.write_bytes(onnx_bytes(layers, "onnxruntime", bits))
    np.save(images, PREPROCESSING(digits.images[:8]))
    command = [sys.executable, "-c", SCRIPT, str(path), str(images), str(WARM_UP), str(CYCLES)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, cwd=ROOT)
    before, after, left_open = map(int, ended.stdout.split())
    growth, leak = after / before - 1, left_open / before - 1
    print(f"{before / 2**20:.1f} MiB, {100 * growth:+.2f} %; {100 * leak:+.1f} % if {CYCLES} stay open")
    assert growth < 0.05
    assert leak > 0.1  # the measure would have seen it
