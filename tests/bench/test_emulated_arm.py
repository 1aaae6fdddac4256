from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import emulated_arm
from bench.onnxruntime_process import NotRun
from tests.needs import arm_python

# What this machine is, and what a process is that it starts.
TELL = """
import json, platform, subprocess, sys, onnxruntime
child = subprocess.run([sys.executable, "-c", "import platform; print(platform.machine())"], capture_output=True)
features = next(line for line in open("/proc/cpuinfo") if line.startswith("Features")).split()
told = [platform.machine(), child.stdout.decode().strip(), onnxruntime.__version__, "asimddp" in features]
print(json.dumps(told))
"""


@pytest.mark.arm
@pytest.mark.parametrize(("cpu", "dot_product"), [("cortex-a57", False), ("cortex-a76", True), ("max", True)])
def test_an_emulated_cpu_runs_onnxruntime_and_its_own_processes(cpu: str, dot_product: bool) -> None:
    done = subprocess.run([arm_python(cpu), "-c", TELL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["aarch64", "aarch64", emulated_arm.ONNXRUNTIME, dot_product]


def test_without_an_emulator_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotRun, match="not run: no qemu-aarch64; install Debian's qemu-user"):
        emulated_arm.python("cortex-a57")


def test_packages_that_cannot_be_had_are_one_line_and_leave_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("qemu-aarch64", "apt-get", "dpkg"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text("#!/bin/sh\necho 'E: no network' >&2\nexit 100\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # What an earlier test found is another cache's.
    monkeypatch.setattr(emulated_arm, "_root", emulated_arm._root.__wrapped__)
    monkeypatch.setattr(sys, "argv", ["emulated_arm"])
    assert emulated_arm.main() == 1
    assert capsys.readouterr().err == "not run: apt-get ended with 100: E: no network\n"
    assert list(emulated_arm.cache().iterdir()) == []
