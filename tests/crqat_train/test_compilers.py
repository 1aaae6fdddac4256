"""The compiler of torch.compile: one that cannot build is none, for the training as for `crqat doctor`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from crqat.pipeline.commands import doctor
from crqat.train import compilers, device

# Stands for a compiler: makes the file behind -o, which is the last argument.
BUILDS = 'for last; do :; done; echo library > "$last"'
# As where Python's headers are missing: it is there, and says its version.
NO_HEADERS = '[ "$1" = --version ] && echo "g++ 12.2.0" && exit 0\necho "Python.h: No such file" >&2\nexit 1'


def make_compiler(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only one in which programs are looked for."""
    for key in ("CXX", "CC"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/nowhere")
    return tmp_path


@pytest.mark.skipif(sys.platform == "darwin", reason="torch.compile takes clang++ there")
def test_doctor_and_training_take_the_compiler_of_torch_if_it_builds(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> str | None:
        told = next(item for item in doctor.examine() if item.what == "C++ compiler").found
        assert device.compiler(torch.device("cpu")) == (f"torch.compile ({told})" if told else "")
        return told

    assert found() is None
    make_compiler(folder / "clang++", BUILDS)
    assert found() is None, "torch.compile does not look for it"
    make_compiler(folder / "g++", NO_HEADERS)
    assert found() is None
    make_compiler(folder / "g++", BUILDS)
    assert found() == "g++"
    monkeypatch.setenv("CXX", "clang++ -O2")
    assert found() == "clang++ -O2"
    monkeypatch.setenv("CXX", "none")
    assert found() is None, "torch.compile takes that one, and no other beside it"


def test_on_cuda_triton_needs_a_c_compiler_that_builds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "find_spec", lambda _: object())
    assert device.compiler(torch.device("cuda")) == ""
    make_compiler(folder / "gcc", NO_HEADERS)
    assert device.compiler(torch.device("cuda")) == ""
    make_compiler(folder / "gcc", BUILDS)
    assert device.compiler(torch.device("cuda")) == "torch.compile (triton)"
    monkeypatch.setattr(device, "find_spec", lambda _: None)
    assert device.compiler(torch.device("cuda")) == ""


def test_the_probe_is_refused_without_a_place_for_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_compiler(folder / "g++", BUILDS)
    monkeypatch.setattr("tempfile.tempdir", str(folder / "none"))
    assert compilers.cpp() is None
