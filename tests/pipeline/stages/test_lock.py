from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crqat.core.errors import ToolError
from crqat.pipeline.stages import lock

HOLDS = """
import os, sys, time
from pathlib import Path
from crqat.pipeline.stages import lock
with lock.hold(Path(sys.argv[1])):
"""


def holder(run: Path, inside: str = "time.sleep(100)") -> subprocess.Popen[str]:
    """A process that holds a run's lock, once it does."""
    code = f"{HOLDS}    print('held', flush=True)\n    {inside}"
    root = Path(lock.__file__).parents[3]
    process = subprocess.Popen([sys.executable, "-c", code, str(run)], cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_second_is_told_who_holds_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = holder(run)
    try:
        with pytest.raises(ToolError) as caught, lock.hold(run):
            pass
        assert caught.value.exit_code == 3
        message = str(caught.value)
        assert message.startswith(f"{run}: in use by process {process.pid} on {platform.node()} (-c ")
        assert f"since {time.strftime('%Y-')}" in message and "wait for it" in message
        (run / lock.HOLDER).write_text("{")  # damaged: no reason to let the second in
        with pytest.raises(ToolError, match="in use by another process; wait for it"), lock.hold(run):
            pass
    finally:
        process.kill()
        process.wait()


def test_a_dead_holders_lock_does_not_block(tmp_path: Path) -> None:
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((tmp_path / lock.HOLDER).read_text())["pid"] == process.pid  # it left its name
    with lock.hold(tmp_path):
        assert json.loads((tmp_path / lock.HOLDER).read_text())["pid"] == os.getpid()
    assert not (tmp_path / lock.HOLDER).exists()


def test_children_of_a_dead_holder_do_not_block(tmp_path: Path) -> None:
    """A forked worker may have its parent's lock until it notices that the parent is gone."""
    process = holder(tmp_path, "os.fork() or time.sleep(2); time.sleep(100 if os.getppid() > 1 else 0)")
    time.sleep(0.3)
    process.kill()
    process.wait()
    with lock.hold(tmp_path):
        assert json.loads((tmp_path / lock.HOLDER).read_text())["pid"] == os.getpid()


def test_inside_it_may_be_held_again(tmp_path: Path) -> None:
    with lock.hold(tmp_path):
        with lock.hold(tmp_path):
            pass
        assert (tmp_path / lock.HOLDER).is_file()
        code = f"{HOLDS}    print('held')"
        root = Path(lock.__file__).parents[3]
        command = [sys.executable, "-c", code, str(tmp_path)]
        other = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert other.returncode == 1 and "ToolError" in other.stderr and f"process {os.getpid()} " in other.stderr
    with lock.hold(tmp_path):
        pass
