"""What tests need that a machine may lack: one way to skip, which fails where CRQAT_EXPECT names the tool.

CRQAT_EXPECT is a comma-separated list of names from `TOOLS`, as `.ci/run` sets it for what it has installed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

PREFIX = "needs "
SHARED = Path(os.environ.get("CRQAT_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data")).resolve()


def _package(name: str) -> Callable[[], bool]:
    return lambda: importlib.util.find_spec(name) is not None


def _stubs() -> bool:
    try:
        return bool(importlib.metadata.version("tensorrt-stubs"))
    except importlib.metadata.PackageNotFoundError:
        return False


def _cuda_python() -> bool:
    return importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None


def _rtx() -> bool:
    from crqat.runtime_eval.trt.versions import installed

    return installed("tensorrt_rtx") is not None


def _programs(*names: str) -> Callable[[], bool]:
    # Debian keeps sshd where only root looks.
    return lambda: all(shutil.which(name) or Path("/usr/sbin", name).is_file() for name in names)


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


# Whether each is here, and how to get it.
TOOLS: dict[str, tuple[Callable[[], bool], str]] = {
    "chromium": (_programs("chromium", "chromedriver"), "Debian: chromium, chromium-driver"),
    "qemu": (_programs("qemu-x86_64"), "Debian: qemu-user"),
    "arm": (
        _programs("qemu-aarch64", "apt-get", "dpkg"),
        "Debian: qemu-user; arm64 packages and wheels by apt and pip",
    ),
    "sshd": (_programs("ssh", "sshd"), "Debian: openssh-client, openssh-server"),
    "compiler": (lambda: any(map(shutil.which, ("g++", "clang++", "c++"))), "Debian: g++"),
    "selenium": (_package("selenium"), "pip install -e .[dev]"),
    "openvino": (_package("openvino"), "pip install -e .[dev]"),
    "datasets": (_package("datasets"), "pip install -e .[dev]"),
    "webdataset": (_package("webdataset"), "pip install -e .[dev]"),
    "lightning": (_package("lightning"), "pip install -e .[dev]"),
    "tensorboard": (_package("tensorboard"), "pip install -e .[dev]"),
    "timm": (_package("timm"), "pip install -e .[dev]"),
    "brevitas": (_package("brevitas"), "pip install -e .[dev]"),
    "torchao": (_package("torchao"), "pip install -e .[dev]"),
    "tensorrt_rtx": (_rtx, "pip install -e .[dev]"),
    "tensorrt-stubs": (_stubs, "pip install --no-deps tensorrt-stubs"),
    "cuda-python": (_cuda_python, "pip install cuda-python"),
    "python3.8": (lambda: False, "an interpreter that is too old for a board"),
    "python3.10": (lambda: False, "an interpreter for a board, with numpy and onnxruntime from pip"),
    "tmpfs": (lambda: False, "the right to mount one"),
    "second core": (lambda: len(os.sched_getaffinity(0)) > 1, "two cores"),
    "shared": (SHARED.is_dir, f"real data and weights in {SHARED}, or where CRQAT_SHARED_DATA says"),
    "cuda": (_cuda, "an NVIDIA GPU"),
}


def expected() -> set[str]:
    """The tools that a test may not miss.

    Raises:
        ValueError: CRQAT_EXPECT names one that no test needs.
    """
    names = set(filter(None, os.environ.get("CRQAT_EXPECT", "").split(",")))
    if unknown := names - TOOLS.keys():
        msg = f"CRQAT_EXPECT: unknown: {', '.join(sorted(unknown))}; known: {', '.join(TOOLS)}"
        raise ValueError(msg)
    return names


def missing(name: str, why: str = "") -> NoReturn:
    """End a test that cannot run: a failure if the tool is expected, else a skip.

    Args:
        name: A key of `TOOLS`.
        why: What was tried, if more is known than that it is not here.
    """
    reason = f"{PREFIX}{name}: {why or TOOLS[name][1]}"
    if name in expected():
        pytest.fail(f"{reason}; CRQAT_EXPECT says that it is here", pytrace=False)
    pytest.skip(reason, allow_module_level=True)


def require(*names: str) -> None:
    """End a test, a fixture or a module's import unless all of these tools are here."""
    for name in names:
        if not TOOLS[name][0]():
            missing(name)


def needs(*names: str) -> pytest.MarkDecorator:
    """Mark a test that needs these tools."""
    unknown = set(names) - TOOLS.keys()
    assert not unknown, unknown
    return pytest.mark.needs(*names)


def arm_python(cpu: str) -> Path:
    """An emulated ARM CPU's Python with numpy and ONNX Runtime; a test that cannot have it ends.

    Args:
        cpu: A key of `bench.emulated_arm.CPUS`.
    """
    from bench import emulated_arm
    from bench.onnxruntime_process import NotRun

    try:
        return emulated_arm.python(cpu)
    except NotRun as reason:
        missing("arm", str(reason).removeprefix("not run: "))


def not_run(reasons: list[str]) -> list[str]:
    """One line for each tool that skipped tests, with how many; CUDA's in the words of a result.

    Args:
        reasons: Of all skipped tests, as pytest reports them.
    """
    counts: dict[str, int] = {}
    for reason in reasons:
        text = reason.removeprefix("Skipped: ")
        key = text.removeprefix(PREFIX).partition(": ")[0] if text.startswith(PREFIX) else text
        counts[key] = counts.get(key, 0) + 1
    if not TOOLS["cuda"][0]():
        counts.setdefault("cuda", 0)
    lines = []
    for name, count in sorted(counts.items()):
        tests = f"{count} test{'' if count == 1 else 's'}"
        if name == "cuda":
            lines.append(f"not run: no CUDA device ({tests}; latency of CUDA targets and training on a GPU)")
        else:
            lines.append(f"not run: {name} ({tests}{'; ' + TOOLS[name][1] if name in TOOLS else ''})")
    return lines
