"""Finds the compilers that torch.compile needs, and checks that they can build.

Does not import torch, because `crqat doctor` uses this module where torch is broken.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

# torch.compile's CPU code needs a compiler with its standard library and OpenMP, Python's headers and a linker.
_CPP = "#include <Python.h>\n#include <omp.h>\n#include <vector>\nint crqat() { return omp_get_max_threads(); }\n"
# Triton builds its launchers with a C compiler and Python's headers.
_C = "#include <Python.h>\nint crqat(void) { return 0; }\n"
_SECONDS = 60
REMEDY, REMEDY_C = (
    f"install {name} and Python's headers, or set {key}" for name, key in (("g++", "CXX"), ("gcc", "CC"))
)


def cpp() -> str | None:
    """Return the C++ compiler that torch.compile uses on CPUs: $CXX, otherwise g++ (clang++ on macOS).

    None if it cannot build a small library.
    """
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    return name if _builds(name, "probe.cpp", _CPP, "-std=c++20", *openmp) else None


def triton() -> str | None:
    """Return the C compiler that Triton uses: $CC, otherwise clang or gcc; None if it cannot build a small library."""
    named = os.environ.get("CC")
    names = [named] if named else [name for name in ("clang", "gcc") if shutil.which(name)]
    return next((name for name in names if _builds(name, "probe.c", _C)), None)


def _builds(compiler: str, file: str, text: str, *options: str) -> bool:
    """Whether the compiler can build a library from a source file."""
    try:
        command = shlex.split(compiler)
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, file), Path(folder, "probe.so")
            source.write_text(text)
            headers = {sysconfig.get_path(name) for name in ("include", "platinclude")}
            command += [*(f"-I{path}" for path in sorted(headers)), *options]
            command += ["-shared", "-fPIC", str(source), "-o", str(library)]
            result = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS, check=False
            )
            return result.returncode == 0 and library.is_file()
    except (OSError, ValueError, subprocess.TimeoutExpired):  # also where no temporary file can be made
        return False
