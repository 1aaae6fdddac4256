from __future__ import annotations

import platform
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crqat.core.errors import ToolError
from crqat.core.progress import quiet
from crqat.core.results.benchmark import CountedCodes
from crqat.core.targets import ONNXRUNTIME
from crqat.runtime_eval.benchmark import benchmark as typed_benchmark
from crqat.runtime_eval.measure.codes import MAX_BYTES, check_codes, read
from tests.runtime_eval.conftest import QUICK, Digits, WriteExport, expected_codes, onnx_bytes

# A test knows which of the parts that may be None are there.
benchmark: Callable[..., Any] = typed_benchmark


def test_the_benchmark_counts_the_codes(write_export: WriteExport) -> None:
    models = benchmark(write_export(), QUICK, quiet).models
    family = ONNXRUNTIME.cpu(platform.machine())
    assert family is not None
    counted = CountedCodes("passed", images=2, codes=128, differing=0, tensors=1, left_out=0, family=family.name)
    assert models["onnxruntime.onnx"].codes_on_this_cpu == counted
    assert models["float.onnx"].codes_on_this_cpu is None


def test_a_wrong_expectation_is_noticed(write_export: WriteExport, digits: Digits) -> None:
    export = write_export({"onnxruntime.codes.npz": expected_codes(digits.images[:2], wrong=3)})
    model = benchmark(export, QUICK, quiet).models["onnxruntime.onnx"]
    assert model.codes_on_this_cpu.differing == 3
    assert model.codes_on_this_cpu.status == "failed: 3 of 128 codes differ, first in x0_codes"
    assert model.status == "measured"


@pytest.fixture
def files(digits: Digits, tmp_path: Path) -> tuple[Path, Path]:
    """A model and the codes that it computes on every CPU."""
    model, codes = tmp_path / "model.onnx", tmp_path / "codes.npz"
    model.write_bytes(onnx_bytes(digits.layers, "onnxruntime", 3))
    codes.write_bytes(expected_codes(digits.images[:2]))
    return model, codes


@pytest.mark.parametrize(
    ("machine", "family"), [("x86_64", "x86"), ("AMD64", "x86"), ("aarch64", "arm"), ("arm64", "arm")]
)
def test_the_codes_of_this_cpus_family_count(
    machine: str, family: str, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = dict(np.load(files[1]))
    arrays["changes"][0, :5] = 1  # on ARM five codes are to be others, and this CPU computes none of them
    np.savez(files[1], **arrays)
    monkeypatch.setattr("platform.machine", lambda: machine)
    counted = check_codes(*files, threads=1)
    assert (counted.family, counted.codes) == (family, 128)
    assert counted.differing == (0 if family == "x86" else 5)


def test_a_cpu_whose_codes_are_not_known_is_not_judged(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    counted = check_codes(*files, threads=1)
    assert counted.status == "not run: expected codes are known for x86 and arm CPUs, not for riscv64; export again"
    assert (counted.codes, counted.family) == (0, None)


def test_an_expectation_of_an_earlier_version_holds_for_x86_alone(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(files[1], **{key: value for key, value in np.load(files[1]).items() if key not in {"families", "changes"}})
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert check_codes(*files, threads=1).status == "passed"
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    status = check_codes(*files, threads=1).status
    assert status == "not run: expected codes are known for x86 CPUs, not for aarch64; export again"


@pytest.mark.parametrize(
    ("model", "codes", "message"),
    [
        (None, b"PK no zip file", "codes.npz: not a file of expected codes"),
        (b"no model", None, "ONNX Runtime does not run the file with its codes as outputs"),
    ],
)
def test_what_is_no_model_or_no_expectation_is_one_error(
    model: bytes | None, codes: bytes | None, message: str, digits: Digits, tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").write_bytes(model or onnx_bytes(digits.layers, "onnxruntime", 3))
    (tmp_path / "codes.npz").write_bytes(codes or expected_codes(digits.images[:2]))
    with pytest.raises(ToolError, match=message):
        check_codes(tmp_path / "model.onnx", tmp_path / "codes.npz", threads=1)


@pytest.mark.parametrize("key", ["images", "codes", "outputs", "names", "families", "changes"])
def test_a_member_that_is_no_array_is_refused(key: str, digits: Digits, tmp_path: Path) -> None:
    whole, damaged = tmp_path / "whole.npz", tmp_path / "codes.npz"
    whole.write_bytes(expected_codes(digits.images[:2]))
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(damaged, "w") as target:
        for name in source.namelist():
            target.writestr(name, b"no array" if name == f"{key}.npy" else source.read(name))
    assert f"{key}.npy" in zipfile.ZipFile(whole).namelist()
    with pytest.raises(ToolError, match=r"codes\.npz: not a file .* \(ValueError: a member is not an array\)"):
        read(damaged)


def test_an_expectation_of_another_size_or_type_is_refused(digits: Digits, tmp_path: Path) -> None:
    model, codes = tmp_path / "model.onnx", tmp_path / "codes.npz"
    model.write_bytes(onnx_bytes(digits.layers, "onnxruntime", 3))
    codes.write_bytes(expected_codes(digits.images[:2]))
    arrays = dict(np.load(codes))
    np.savez(codes, **{**arrays, "codes": arrays["codes"][:-1]})
    with pytest.raises(ToolError, match="not a file of expected codes"):
        check_codes(model, codes, threads=1)
    np.savez(codes, **{**arrays, "codes": arrays["codes"][:-1], "changes": arrays["changes"][:, :-1]})
    with pytest.raises(ToolError, match=r"holds 127 codes, but model\.onnx computes another number"):
        check_codes(model, codes, threads=1)
    np.savez(codes, **{**arrays, "images": arrays["images"].astype(np.float64)})
    with pytest.raises(ToolError, match="not a file of expected codes"):
        check_codes(model, codes, threads=1)


def test_a_small_archive_that_unpacks_to_gigabytes_is_refused(digits: Digits, tmp_path: Path) -> None:
    model, codes = tmp_path / "model.onnx", tmp_path / "codes.npz"
    model.write_bytes(onnx_bytes(digits.layers, "onnxruntime", 3))
    codes.write_bytes(expected_codes(digits.images[:2]))
    zeros = np.broadcast_to(np.uint8(0), (MAX_BYTES,))
    np.savez_compressed(codes, **{**dict(np.load(codes)), "codes": zeros})
    assert codes.stat().st_size < 2**21
    with pytest.raises(ToolError, match="unpacked it is larger than 1024 MiB"):
        check_codes(model, codes, threads=1)
