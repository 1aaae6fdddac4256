"""The `doctor` command: reports what works on this machine, and what a missing part prevents."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import click

from crqat.pipeline import console
from crqat.runtime_eval.machine import host
from crqat.train import compilers

MISSING = 3
# One multiply-accumulate instruction for INT8, on x86 and on ARM.
_DOT_PRODUCT = ("avx512_vnni", "avx_vnni", "asimddp", "i8mm")

# The version combinations that ran from recipe to verdict; `make test-versions` writes the file.
VERSIONS = Path(__file__).with_name("versions.json")


@dataclass(frozen=True)
class Finding:
    """One row of the table of `crqat doctor`: a library, tool or device that crqat uses.

    Attributes:
        what: Name of the library, tool or device, here called the part.
        found: Version or description of the part on this machine; None if it is missing.
        purpose: What the part is for.
        remedy: What to do if the part is missing.
        needed: Whether `crqat run`, from recipe to verdict, does not work without the part.
    """

    what: str
    found: str | None
    purpose: str
    remedy: str
    needed: bool = False


def show() -> int:
    """Print what was found and whether `crqat run` works; return the exit code: 0, or 3 if it does not work."""
    findings = examine()
    columns = ("what", "found", "what it is for", "what to do")
    rows = [(item.what, item.found or "MISSING", item.purpose, "" if item.found else item.remedy) for item in findings]
    console.show_table("crqat doctor", columns, rows)
    missing = [item.what for item in findings if item.needed and item.found is None]
    console.give(works=not missing, missing=missing, findings=findings)
    if missing:
        click.echo(f"crqat run does not work here; missing: {', '.join(missing)}")
        return MISSING
    click.echo("crqat run works here")
    return 0


def examine() -> list[Finding]:
    """Return a finding for each library, tool and device; libraries are imported, as an installed one may be broken."""
    reinstall = "pip install crqat-edge in this environment again"
    torch, nncf, onnx, runtime, sklearn = (
        _import(name) for name in ("torch", "nncf", "onnx", "onnxruntime", "sklearn.datasets")
    )
    return [
        Finding("PyTorch", _version(torch), _tested("training", "torch"), reinstall, needed=True),
        Finding("NNCF", _version(nncf), _tested("where quantizers sit", "nncf"), reinstall, needed=True),
        Finding("ONNX", _version(onnx), _tested("export", "onnx"), reinstall, needed=True),
        Finding(
            "ONNX Runtime",
            _providers(runtime),
            _tested("verification and benchmark", "onnxruntime"),
            reinstall,
            needed=True,
        ),
        Finding("OpenVINO", _released("openvino"), "benchmark.openvino", "pip install crqat-edge[openvino]"),
        Finding("scikit-learn", "importable" if sklearn else None, "the embedded data set `digits`", reinstall),
        Finding("datasets", _released("datasets"), "data.source: huggingface", "pip install crqat-edge[huggingface]"),
        Finding("TensorBoard", _released("tensorboard"), "tracker: tensorboard", "pip install crqat-edge[tensorboard]"),
        Finding("C++ compiler", compilers.cpp(), "torch.compile; eager otherwise", compilers.REMEDY),
        Finding("C compiler", compilers.triton(), "torch.compile on CUDA; eager otherwise", compilers.REMEDY_C),
        Finding("INT8 dot product", _dot_product(), "speed of INT8 on this CPU", "measure on the target instead"),
        Finding("CUDA device", _cuda(torch), "faster training; TensorRT", "train on the CPU; measure on the target"),
        Finding(
            "TensorRT",
            _released("tensorrt"),
            "engines for the CUDA device here",
            "pip install tensorrt, on a machine with a CUDA device; a Jetson uses JetPack's",
        ),
        Finding(
            "TensorRT for RTX",
            _released("tensorrt_rtx"),
            _tested("checking that TensorRT builds INT8, without a CUDA device", "tensorrt-rtx-cu13"),
            "pip install crqat-edge[tensorrt-cpu]",
        ),
        Finding(
            "PyCUDA",
            "importable" if _import("pycuda.driver") else None,
            "running TensorRT engines",
            "pip install pycuda, with CUDA's nvcc on PATH",
        ),
        Finding(
            "CUDA Python",
            _version(_import("cuda.bindings")),
            "TensorRT engines as CUDA graphs",
            "pip install cuda-python",
        ),
    ]


def tested(package: str) -> list[str]:
    """Return the versions of a package, oldest first, with which two test networks ran up to the gate without failures.

    "(inconclusive)" follows a version with which a rule of the gate could not be measured; docs/versions.md says which.
    """
    rows = [row for row in json.loads(VERSIONS.read_text())["rows"] if package in row["versions"]]
    passed = {row["versions"][package] for row in rows if row["status"] == "passed"}
    found = passed | {row["versions"][package] for row in rows if row["status"] == "inconclusive"}
    ordered = sorted(found, key=lambda version: [int(part) for part in version.split(".")])
    return [version if version in passed else f"{version} (inconclusive)" for version in ordered]


def _import(name: str) -> ModuleType | None:
    """Import a module quietly; return None if the import fails for any reason."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        nowhere = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except Exception:  # a broken installation may raise anything and counts as missing
        return None
    finally:
        logging.disable(previous)


def _tested(purpose: str, package: str) -> str:
    versions = tested(package)
    return f"{purpose}; tested: {', '.join(versions)}" if versions else purpose


def _version(module: ModuleType | None) -> str | None:
    return None if module is None else str(getattr(module, "__version__", "importable"))


def _released(name: str) -> str | None:
    """Return a package's version; None if only an empty directory, left by type stubs, has the package's name."""
    version = getattr(_import(name), "__version__", None)
    return None if version is None else str(version)


def _providers(runtime: ModuleType | None) -> str | None:
    return None if runtime is None else f"{_version(runtime)}: {', '.join(runtime.get_available_providers())}"


def _dot_product() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    words = {word for line in lines if line.startswith(("flags", "Features")) for word in line.split()}
    return ", ".join(flag for flag in _DOT_PRODUCT if flag in words) or None


def _cuda(torch: ModuleType | None) -> str | None:
    """Return the CUDA device's name, a note that PyTorch cannot use it (TensorRT may), or None without a device."""
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return "a device file, but PyTorch does not use it" if host.cuda_device() else None
