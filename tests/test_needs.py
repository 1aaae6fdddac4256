from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import needs

ROOT = Path(__file__).parents[1]
FAKE = """
from tests.needs import missing, needs, require
import pytest

@needs("tmpfs")
def test_marked():
    raise AssertionError("it ran")

@pytest.fixture
def disk():
    require("tmpfs")

def test_by_fixture(disk):
    raise AssertionError("it ran")

def test_by_call():
    missing("python3.8", "no such interpreter")

def test_other():
    pytest.skip("of another reason")
"""


def ended(folder: Path, expect: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """The exit code and the output of pytest on tests that miss what no machine has."""
    (folder / "test_fake.py").write_text(FAKE)
    monkeypatch.setenv("CRQAT_EXPECT", expect)
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)
    # tests/conftest.py's hooks, in a folder whose tests are not this project's.
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "--rootdir", ".", "-q"]
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = needs\n  slow\n")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'src'}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_what_is_missing_is_named_in_front_of_the_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = ended(tmp_path, "chromium", monkeypatch)
    assert code == 0, output
    lines = output.splitlines()
    assert re.match(r"4 skipped in ", lines[-1]), output
    told = [line for line in lines if line.startswith("not run: ")]
    assert "not run: tmpfs (2 tests; the right to mount one)" in told
    assert "not run: python3.8 (1 test; an interpreter that is too old for a board)" in told
    assert "not run: of another reason (1 test)" in told
    assert lines[-1 - len(told) : -1] == told


def test_a_skip_for_an_expected_tool_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = ended(tmp_path, "tmpfs,python3.8", monkeypatch)
    assert code == 1
    assert re.search(r"2 failed, 1 skipped, 1 error|3 failed, 1 skipped|1 failed, 1 skipped, 2 errors", output), output
    assert "needs python3.8: no such interpreter; CRQAT_EXPECT says that it is here" in output


def test_an_expected_tool_that_no_test_needs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = ended(tmp_path, "chrome", monkeypatch)
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "CRQAT_EXPECT: unknown: chrome; known: chromium, qemu" in output


def test_cuda_is_named_even_if_no_test_was_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(needs.TOOLS, "cuda", (lambda: False, ""))
    assert needs.not_run([])[0].startswith("not run: no CUDA device (0 tests")
    monkeypatch.setitem(needs.TOOLS, "cuda", (lambda: True, ""))
    assert needs.not_run([]) == []


def test_ci_expects_what_it_installs() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    (table,) = re.findall(r"<<'TOOLS'\n(.*?)^TOOLS$", script, re.DOTALL | re.MULTILINE)
    (packages,) = re.findall(r"^expect=(.*)$", script, re.MULTILINE)
    named = {line.split()[0] for line in table.splitlines()} | set(packages.split(","))
    assert {"chromium", "qemu", "sshd", "compiler", "tensorrt_rtx"} <= named <= needs.TOOLS.keys()


def test_every_skip_for_a_tool_goes_through_needs() -> None:
    allowed = re.compile(
        r"sys\.platform|sys\.version_info|/proc|torch\.cuda\.is_available\(\), reason|CUDA|of another reason"
    )
    asked = re.compile(r"(pytest\.skip\(|skipif\(|importorskip\()(.*)")
    found = [
        f"{path.relative_to(ROOT)}: {call}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if path.name not in {"needs.py", "test_needs.py"}
        for call, rest in asked.findall(path.read_text())
        if not allowed.search(rest) and "CUDA device" not in rest
    ]
    assert found == []
