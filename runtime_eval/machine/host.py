"""Describes this machine as far as latencies depend on it, without data that identify it, such as its name."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

import numpy as np

from crqat.core.results.device import Device

# Instruction sets for INT8 kernels. Without VNNI or asimddp an INT8 product takes several instructions.
FLAGS = ("avx2", "avx512_vnni", "avx_vnni", "asimddp")
# Device files of NVIDIA's drivers, on discrete cards and on Tegra.
CUDA_DEVICES = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvgpu/igpu0")


def _read(root: Path, path: str) -> str | None:
    try:
        return (root / path).read_text(errors="replace").strip("\0\n ")
    except OSError:
        return None


def _cpuinfo(root: Path) -> dict[str, str]:
    """Return the entries of the first processor in /proc/cpuinfo."""
    lines = (_read(root, "proc/cpuinfo") or "").split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def cuda_device() -> bool:
    """Return whether a CUDA device is visible on this machine."""
    return any(Path(path).exists() for path in CUDA_DEVICES)


def onnxruntime_version() -> str | None:
    """Return the version of ONNX Runtime; None if it cannot be imported, as on a board with TensorRT alone."""
    try:
        import onnxruntime
    except ImportError:
        return None
    return str(onnxruntime.__version__)


def load_average() -> float | None:
    """Return the load average over one minute; None if the system does not report it."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def describe(root: Path = Path("/")) -> Device:
    """Return the description of this machine; readings during a measurement, such as load averages, are not set.

    Args:
        root: Folder with the system's `proc` and `sys`.
    """
    cpu = _cpuinfo(root)
    flags = (cpu.get("flags") or cpu.get("Features") or "").split()  # x86 and ARM
    frequency = _read(root, "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")
    megahertz = float(frequency) / 1e3 if frequency else float(cpu["cpu MHz"]) if "cpu MHz" in cpu else None
    memory = _read(root, "proc/meminfo")
    board = _read(root, "proc/device-tree/model")
    return Device(
        # ARM's cpuinfo has no model name; there, the board's name identifies the kind of machine.
        cpu=cpu.get("model name") or board or platform.processor() or platform.machine(),
        architecture=platform.machine(),
        cores=os.cpu_count(),
        usable_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        flags={flag: flag in flags for flag in FLAGS},
        governor=_read(root, "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        frequency_mhz=megahertz,
        memory_bytes=int(memory.split()[1]) * 1024 if memory else None,
        cuda_device=cuda_device(),
        os=platform.platform(),
        python=platform.python_version(),
        numpy=np.__version__,
        onnxruntime=onnxruntime_version(),
    )


def die_first() -> None:
    """Make the system choose this process, rather than another, if it must kill one because memory is full."""
    # Only Linux supports this, and a container may forbid it.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
