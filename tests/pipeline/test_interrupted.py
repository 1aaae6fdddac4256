"""The command line on a training that is interrupted, by the user or by the machine."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench import kill_and_resume
from crqat.pipeline import cli
from crqat.train.quantizers import calibration
from tests.needs import missing

pytestmark = pytest.mark.slow

EPOCHS = ("--set", "float.epochs=40", "--set", "qat.epochs=1")


def hashes(folder: Path) -> dict[str, str]:
    files = (folder / "runs" / "soak" / "train").glob("*.safetensors")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def log(folder: Path) -> list[str]:
    """What the commands said so far."""
    return (folder / "log").read_text().splitlines()


def train(folder: Path, *options: str) -> kill_and_resume.Command:
    return kill_and_resume.Command(folder, ["train", "recipe.yaml", *EPOCHS, *options])


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def states(folder: Path) -> list[Path]:
    return sorted((folder / "runs" / "soak" / ".states").glob("*/*.json"))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> dict[str, str]:
    """The hashes of a training that was left alone."""
    folder = kill_and_resume.prepare(tmp_path_factory.mktemp("whole") / "run")
    assert train(folder).wait(kill_and_resume.SECONDS) == 0
    assert states(folder) == [] and not (folder / "runs" / "soak" / ".states").exists()
    return hashes(folder)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_same_command_goes_on(
    tmp_path: Path, whole: dict[str, str], number: signal.Signals, code: int
) -> None:
    folder = kill_and_resume.prepare(tmp_path / "run")
    first = train(folder)
    until(lambda: len(states(folder)) > 1)
    os.kill(first.pid, number)
    assert first.wait(kill_and_resume.SECONDS) == code
    last = log(folder)[-1]
    assert last.startswith("crqat: error: interrupted; saved at float epoch ")
    assert last.endswith(": run the same command to resume")
    assert train(folder).wait(kill_and_resume.SECONDS) == 0
    place = last.split("saved at ")[1].split(": run the same")[0]
    assert any(line.startswith(f"continued: 1/1  from {place}") for line in log(folder))
    assert hashes(folder) == whole
    assert states(folder) == []


def test_restart_and_another_recipe_do_not_go_on(tmp_path: Path, whole: dict[str, str]) -> None:
    folder = kill_and_resume.prepare(tmp_path / "run")
    first = train(folder)
    until(lambda: len(states(folder)) > 1)
    first.kill()
    assert train(folder, "--set", "seed=1", "--set", "float.epochs=1").wait(kill_and_resume.SECONDS) == 0
    assert hashes(folder) != whole
    assert len(states(folder)) == 2  # of the first recipe, which can still go on
    assert train(folder, "--restart").wait(kill_and_resume.SECONDS) == 0
    assert not any(line.startswith("continued") for line in log(folder))
    assert hashes(folder) == whole


def test_the_second_process_is_told_of_the_first(tmp_path: Path) -> None:
    folder = kill_and_resume.prepare(tmp_path / "run")
    first = train(folder)
    until(lambda: len(states(folder)) > 0)
    for stage in ("train", "run"):
        assert kill_and_resume.crqat(folder, stage, "recipe.yaml") == 3
        line = log(folder)[-1]
        assert line.startswith(f"crqat: error: runs/soak: in use by process {first.pid} on ")
        assert "(crqat train recipe.yaml --set float.epochs=40" in line
    first.kill()
    assert train(folder, "--set", "float.epochs=1").wait(kill_and_resume.SECONDS) == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own of 8 MB, as the folder of all runs."""
    place = tmp_path / "run" / "runs"
    kill_and_resume.prepare(tmp_path / "run")
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        missing("tmpfs", f"none can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Take all that is left of a disk."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"0" * 4096)
        except OSError:
            return path


def test_a_full_disk(disk: Path, whole: dict[str, str]) -> None:
    folder = disk.parent
    first = train(folder)
    until(lambda: len(states(folder)) > 1)
    filler = fill(disk)
    assert first.wait(kill_and_resume.SECONDS) == 3
    line = log(folder)[-1]
    assert line.startswith("crqat: error: cannot save the training's state to runs/soak/.states/")
    assert "No space left on device" in line and "run the same command to resume from the last saved state" in line
    assert train(folder).wait(kill_and_resume.SECONDS) == 3  # still full
    filler.unlink()
    assert train(folder).wait(kill_and_resume.SECONDS) == 0
    assert any(line.startswith("continued: 1/1  from float epoch ") for line in log(folder))
    assert hashes(folder) == whole


def test_a_full_disk_leaves_the_export_before(disk: Path) -> None:
    folder = disk.parent
    assert train(folder, "--set", "float.epochs=1").wait(kill_and_resume.SECONDS) == 0
    export = kill_and_resume.Command(folder, ["export", "recipe.yaml", *EPOCHS, "--set", "float.epochs=1"])
    assert export.wait(kill_and_resume.SECONDS) == 0
    files = {path.name: path.read_bytes() for path in (disk / "soak" / "export").iterdir()}
    filler = fill(disk)
    again = ["export", "recipe.yaml", *EPOCHS, "--set", "float.epochs=1", "--force"]
    assert kill_and_resume.crqat(folder, *again) == 3
    what = "crqat: error: cannot write the stage export to runs/soak: No space left on device"
    assert log(folder)[-1] == f"{what}; make room there, or for temporary files (TMPDIR)"
    assert {path.name: path.read_bytes() for path in (disk / "soak" / "export").iterdir()} == files
    filler.unlink()
    assert kill_and_resume.crqat(folder, *again) == 0


def test_a_disk_that_turns_read_only(disk: Path, whole: dict[str, str]) -> None:
    folder = disk.parent
    first = train(folder)
    until(lambda: len(states(folder)) > 1)
    first.kill()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert train(folder).wait(kill_and_resume.SECONDS) == 3
    assert log(folder)[-1] == (
        "crqat: error: cannot write to runs/soak: Read-only file system; choose another place with --runs"
    )
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert train(folder).wait(kill_and_resume.SECONDS) == 0
    assert any(line.startswith("continued: 1/1  from float epoch ") for line in log(folder))
    assert hashes(folder) == whole


@pytest.fixture
def as_in_the_foreground() -> Iterator[None]:
    """A shell's background jobs ignore SIGINT, the tests among them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("as_in_the_foreground")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_between_two_phases_a_signal_ends_with_how_to_go_on_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    """In the calibration, behind the state of the last float epoch."""
    folder = kill_and_resume.prepare(tmp_path / "run")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "argv", ["crqat", "train", "recipe.yaml", "--unchecked", "--set", "qat.epochs=1"])
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "calibrate", lambda *_: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("crqat: error: ") and last.endswith("work is kept; run the same command again to resume")
    assert len(states(folder)) == 2
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "continued: 1/1  from float epoch 2 of 2" in capsys.readouterr().err
