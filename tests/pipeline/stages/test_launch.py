"""`crqat train --nproc` as a user meets it: real processes, one line for each error, and nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from crqat.core.errors import UsageError
from crqat.pipeline.recipe.recipe import load
from crqat.pipeline.stages import launch
from crqat.pipeline.stages.launch import check

ROOT = Path(__file__).parents[3]
RECIPE = """
name: net
device: cpu
compile: never
data: {source: digits, crop_padding: 1, flip: false}
model: {name: "net:network"}
float: {epochs: 2000, batch_size: 100}
quantization: {calibration_images: 64}
"""
NETWORK = """
import os, signal, time
from pathlib import Path
from torch import nn

def die(module, inputs):
    if os.environ["RANK"] == "1":
        with Path("deaths").open("a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)

def sleep(module, inputs):
    Path("asleep" + os.environ["RANK"]).touch()
    time.sleep(120)

def network(classes, channels):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, classes))
    if "DIES" in os.environ:
        net.register_forward_pre_hook(die)
    if "SLEEPS" in os.environ:
        net.register_forward_pre_hook(sleep)
    return net
"""
SLOW_END = """
import atexit, os, time
if os.environ.get("RANK") == "0":
    atexit.register(time.sleep, 5)
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "net.py").write_text(NETWORK)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return [sys.executable, "-m", "crqat", "train", str(tmp_path / "recipe.yaml"), "--nproc", "2"]


def environment(**further: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **further}


def run(command: list[str], folder: Path, **further: str) -> tuple[int, list[str]]:
    """The exit code, and the lines on stderr."""
    ended = subprocess.run(
        command, cwd=folder, env=environment(**further), capture_output=True, text=True, timeout=300, check=False
    )
    return ended.returncode, ended.stderr.splitlines()


@pytest.fixture
def started(command: list[str], tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A training without end, with a saved state."""
    with subprocess.Popen(
        [*command, "--save-every", "0"], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        until(lambda: bool(list(tmp_path.glob("runs/net/.states/*/*.json"))))
        yield process
        process.kill()


def until(true: object, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.1)


def children(parent: int) -> list[int]:
    return [int(number) for number in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def test_an_error_of_all_processes_is_told_once_and_not_tried_again(command: list[str], tmp_path: Path) -> None:
    options = ["--max-restarts", "3", "--set", "model.weights=none.pth"]
    # The process that tells takes long to end, so torch sees the end of the other one first.
    (tmp_path / "sitecustomize.py").write_text(SLOW_END)
    code, lines = run(command + options, tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT / 'src'}")
    assert code == 2, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("crqat: error: ")
    assert "none.pth" in lines[0]


def test_an_error_of_the_first_process_alone_ends_the_others_without_a_word(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the directory of runs should be")
    code, lines = run(command, tmp_path)
    assert code == 3
    assert len(lines) == 1, lines
    assert lines[0].startswith("crqat: error: cannot write to runs/net: Not a directory")


@pytest.mark.slow
def test_a_process_that_dies_each_time_is_tried_so_often_and_no_more(command: list[str], tmp_path: Path) -> None:
    code, lines = run([*command, "--max-restarts", "1"], tmp_path, DIES="1")
    assert code == 3
    assert (tmp_path / "deaths").read_text() == "xx"
    told = [line for line in lines if "by signal 9" in line]
    assert "all restart from the last state (1 of 1 restarts left)" in told[0]
    assert told[1].startswith("crqat: error: a process of the training ended by signal 9; the same command resumes")
    assert len(told) == 2, lines
    assert not any("Traceback" in line for line in without_finalizers(lines)), lines


def without_finalizers(lines: list[str]) -> list[str]:
    """Without what Python tells of a library's finalizer that a signal met while the process ended: nothing is lost."""
    kept, ignored = [], False
    for line in lines:
        if line.startswith("Exception ignored in"):
            ignored = True
        elif ignored and not line.startswith(("Traceback", " ")):
            ignored = False  # the exception itself, the last line of it
        elif not ignored:
            kept.append(line)
    return kept


def test_what_a_finalizer_says_is_told_from_a_traceback_of_ours() -> None:
    said = [
        "Exception ignored in: <function f>",
        "Traceback (most recent call last):",
        '  File "x"',
        "KeyboardInterrupt: ",
    ]
    ours = ["Traceback (most recent call last):", '  File "y"', "ValueError: z"]
    assert without_finalizers(["a", *said, "b", *ours]) == ["a", "b", *ours]


def failures(*ends: tuple[int, int]) -> list[ProcessFailure]:
    """Exit codes, and the second in which each was noticed."""
    made = [ProcessFailure(rank, 1, code, "") for rank, (code, _) in enumerate(ends)]
    for failure, (_, second) in zip(made, ends, strict=True):
        failure.timestamp = second
    return made


def test_a_process_that_torch_killed_because_it_did_not_answer_did_not_die() -> None:
    killed = -signal.SIGKILL
    assert launch.exit_codes(failures((2, 100), (killed, 130))) == [2]
    assert launch.exit_codes(failures((killed, 130), (3, 100))) == [3]
    assert launch.exit_codes(failures((3, 100), (killed, 100))) == [3, killed]
    assert launch.exit_codes(failures((killed, 100), (killed, 130))) == [killed]
    assert launch.exit_codes(failures((-signal.SIGTERM, 101), (2, 100))) == [2]
    assert launch.exit_codes(failures((-signal.SIGTERM, 100))) == [-signal.SIGTERM]


def test_run_is_not_started_in_several_processes(command: list[str], tmp_path: Path) -> None:
    code, lines = run([*command[:3], "run", "recipe.yaml"], tmp_path, RANK="1", WORLD_SIZE="2")
    assert (code, len(lines)) == (2, 1)
    assert "start `crqat train` with torchrun" in lines[0]


def test_what_cannot_be_shared_is_refused_before_anything_starts(command: list[str], tmp_path: Path) -> None:
    code, lines = run([*command, "--set", "float.batch_size=33"], tmp_path)
    assert (code, len(lines)) == (2, 1)
    assert "float.batch_size: 33 images a step" in lines[0]


def test_more_processes_than_cuda_devices_are_refused(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(Path(command[-3]), ("device=auto",))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    check(config, 4)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    with pytest.raises(UsageError, match=r"^--nproc 4: needs one CUDA device per process; torch sees 3 here$"):
        check(config, 4)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_end_it_saves_and_says_so_once(started: subprocess.Popen[str], number: signal.Signals) -> None:
    started.send_signal(number)
    assert started.wait(60) == 128 + number
    assert started.stderr is not None
    last = [line for line in started.stderr.read().splitlines() if line.startswith("crqat")]
    assert len(last) == 1, last
    assert last[0].startswith("crqat: error: interrupted; saved at float epoch")


@pytest.mark.slow
def test_who_does_not_answer_in_time_is_ended_with_a_line(command: list[str], tmp_path: Path) -> None:
    patience = environment(SLEEPS="1", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1")
    unchecked = [*command, "--unchecked"]  # the check before training would sleep, too, and rank 0 alone
    with subprocess.Popen(unchecked, cwd=tmp_path, env=patience, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: all((tmp_path / f"asleep{rank}").exists() for rank in range(2)))
        process.terminate()
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    lines = [line for line in told.splitlines() if line.startswith("crqat")]
    assert len(lines) == 1, told
    assert lines[0].startswith("crqat: error: stopped before a training process could save; the same command")


@pytest.mark.slow
def test_a_killed_launcher_leaves_nobody_behind(started: subprocess.Popen[str]) -> None:
    ranks = children(started.pid)
    assert len(ranks) == 2
    started.send_signal(signal.SIGKILL)
    until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks), 30.0)
