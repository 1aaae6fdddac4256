"""`crqat doctor`: what it finds here, and what it says where something is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from crqat.pipeline.commands import doctor
from crqat.pipeline.commands.doctor import Finding
from crqat.runtime_eval.machine import host


def test_examination_names_what_is_installed_here() -> None:
    findings = {item.what: item for item in doctor.examine()}
    import onnxruntime
    import torch

    assert findings["PyTorch"].found == torch.__version__
    assert findings["ONNX Runtime"].found
    assert onnxruntime.__version__ in findings["ONNX Runtime"].found
    assert "CPUExecutionProvider" in findings["ONNX Runtime"].found
    assert (findings["CUDA device"].found is not None) == (torch.cuda.is_available() or host.cuda_device())
    for what, package in (("TensorRT", "tensorrt"), ("TensorRT for RTX", "tensorrt_rtx")):
        assert findings[what].found == getattr(doctor._import(package), "__version__", None)
    assert {what for what, item in findings.items() if item.needed} == {"PyTorch", "NNCF", "ONNX", "ONNX Runtime"}
    assert all(item.purpose and item.remedy for item in findings.values())


def test_the_tested_versions_are_told_and_the_newest_is_that_of_the_tests() -> None:
    lines = (Path(__file__).parents[3] / "constraints.txt").read_text().splitlines()
    pinned = dict(line.partition(";")[0].split("==") for line in lines if "==" in line.partition(";")[0])
    purposes = {item.what: item.purpose for item in doctor.examine()}
    packages = {"PyTorch": "torch", "NNCF": "nncf", "ONNX": "onnx", "ONNX Runtime": "onnxruntime"}
    for what, package in packages.items():
        assert purposes[what].endswith(f"; tested: {', '.join(doctor.tested(package))}")
        assert pinned[package] in doctor.tested(package)
    assert purposes["TensorRT for RTX"].endswith(f"; tested: {pinned['tensorrt-rtx-cu13']}")


def test_only_versions_in_which_nothing_failed_are_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("passed", "1.9.0"), ("failed", "1.11.0"), ("inconclusive", "1.10.1"), ("inconclusive", "1.9.0")]
    told = [{"status": status, "versions": {"onnxruntime": version}} for status, version in rows]
    (tmp_path / "versions.json").write_text(json.dumps({"rows": told}))
    monkeypatch.setattr(doctor, "VERSIONS", tmp_path / "versions.json")
    assert doctor.tested("onnxruntime") == ["1.9.0", "1.10.1 (inconclusive)"]
    assert doctor._tested("export", "onnxruntime") == "export; tested: 1.9.0, 1.10.1 (inconclusive)"
    assert doctor._tested("export", "onnx") == "export"


@pytest.mark.parametrize(
    ("needed", "found", "code", "conclusion"),
    [
        (True, "1.0", 0, "crqat run works here"),
        (False, None, 0, "crqat run works here"),
        (True, None, 3, "crqat run does not work here; missing: part"),
    ],
)
def test_conclusion(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    needed: bool,
    found: str | None,
    code: int,
    conclusion: str,
) -> None:
    finding = Finding("part", found, "its purpose", "its remedy", needed)
    monkeypatch.setattr(doctor, "examine", lambda: [finding])
    assert doctor.show() == code
    out = capsys.readouterr().out
    assert out.endswith(f"{conclusion}\n")
    assert ("its remedy" in out) == ("MISSING" in out) == (found is None)


def test_broken_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')")
    (tmp_path / "loud_package.py").write_text(
        "import sys\nprint('hi')\nprint('hi', file=sys.stderr)\n__version__ = '2'"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor._released("broken_package") is None
    assert doctor._released("loud_package") == "2"


def test_what_stubs_leave_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_stubs").mkdir()
    (tmp_path / "only_stubs" / "__init__.pyi").write_text("__version__: str")
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor._import("only_stubs") is not None
    assert doctor._released("only_stubs") is None


def test_a_device_that_pytorch_does_not_use_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CUDA_DEVICES", (str(tmp_path / "nvidiactl"),))
    assert doctor._cuda(None) is None
    (tmp_path / "nvidiactl").touch()
    assert doctor._cuda(None) == "a device file, but PyTorch does not use it"


def test_greetings_of_packages_are_swallowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "greeting_package.py").write_text("import logging\nlogging.getLogger('x').warning('hi')\nprint('hi')")
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor._import("greeting_package") is not None
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/cpuinfo is Linux's")
def test_dot_product_is_what_the_kernel_lists() -> None:
    listed = Path("/proc/cpuinfo").read_text().split()
    expected = [flag for flag in ("avx512_vnni", "avx_vnni", "asimddp", "i8mm") if flag in listed]
    assert doctor._dot_product() == (", ".join(expected) or None)
