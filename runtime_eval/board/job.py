"""The board's side of `crqat.runtime_eval.board.ssh`: a job directory and the process that works in it.

This single file uses only the standard library, because it is sent over ssh and run before anything else is on the
board. Each call is one command. It prints JSON lines: ``{}`` every few seconds while it works, so that silence means a
lost connection; progress reports; and ``{"result": ...}`` or ``{"error": "text"}`` at the end.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

JOBS = Path(".cache") / "crqat" / "jobs"  # in the home directory
FOLDER = "crqat-bundle"
# numpy, and one of these to run files.
RUNTIMES = ("onnxruntime", "tensorrt")
_HEARTBEAT_SECONDS = 5.0
_POLL_SECONDS = 1.0  # seldom, because a latency is being measured
_CHUNK = 1 << 20
# The exit code appears atomically and after everything else, so a reader that sees it sees a finished job.
_SCRIPT = 'code=$1; shift; "$@"; echo $? >"$code.part" && mv "$code.part" "$code"'
# The exit code of `crqat.core.errors.ToolError`, which is not on the board yet. 1 is Python's own after an exception.
_FAILED = 3
_speaking = threading.Lock()


@dataclass(frozen=True)
class State:
    """State of a benchmark job on a board.

    Attributes:
        state: "absent", "running", "finished" or "dead".
        code: Exit code of a finished job.
        reason: Why a dead job ended.
        unpacked: Whether the board has the unpacked bundle.
        missing: Packages that the board's Python lacks.
    """

    state: str
    code: int | None = None
    reason: str | None = None
    unpacked: bool = False
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Process:
    """Identity of the process that works on a job: a later process with the same id differs in the other values.

    Attributes:
        pid: Process id.
        started: Start time in the kernel's ticks; None if the process ended before it could be read.
        boot: Id of the board's boot.
    """

    pid: int
    started: str | None
    boot: str


def say(message: Mapping[str, object]) -> None:
    """Print a message as one JSON line for the caller at the other end of ssh; exit if the connection is gone."""
    with _speaking:
        try:
            sys.stdout.write(json.dumps(message) + "\n")
            sys.stdout.flush()
        except OSError:
            os._exit(_FAILED)


def _heartbeat() -> None:
    while True:
        time.sleep(_HEARTBEAT_SECONDS)
        say({})


@contextmanager
def _locked(job: Path) -> Iterator[None]:
    """Hold the job's lock, so that two callers do not start the same job."""
    job.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(job / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _started(pid: int) -> str | None:
    """Return the start time of a living process in the kernel's ticks; only one process has this id and time."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def state(job: Path) -> State:
    """Return the state of the job in the directory `job`."""
    return replace(_progress(job), unpacked=(job / FOLDER).is_dir(), missing=_missing())


def _missing() -> list[str]:
    there = {name for name in ("numpy", *RUNTIMES) if importlib.util.find_spec(name) is not None}
    return [*({"numpy"} - there), *([] if there.intersection(RUNTIMES) else RUNTIMES[:1])]


def _progress(job: Path) -> State:
    # Ask twice whether it is finished: it may have ended between the first two questions.
    return _finished(job) or _running(job) or _finished(job) or _dead(job) or State("absent")


def _finished(job: Path) -> State | None:
    try:
        return State("finished", code=int((job / "code").read_text()))
    except FileNotFoundError:
        return None


def _running(job: Path) -> State | None:
    process = _process(job)
    if process is None or process.started is None or process.boot != _boot():
        return None
    return State("running") if _started(process.pid) == process.started else None


def _dead(job: Path) -> State | None:
    process = _process(job)
    if process is None:
        return None
    return State("dead", reason="its process is gone" if process.boot == _boot() else "the board was restarted")


def _process(job: Path) -> Process | None:
    try:
        return Process(**json.loads((job / "process.json").read_text()))
    except FileNotFoundError:
        return None


def received(job: Path, sha256: str) -> int:
    """Return how many bytes of the archive with this SHA-256 the board already has."""
    path = job / f"{sha256}.tar.gz"
    return path.stat().st_size if path.is_file() else 0


def receive(job: Path, sha256: str, offset: str) -> int:
    """Write standard input into the archive from byte `offset` on, and return the archive's size in bytes.

    A byte may arrive twice, over a lost connection and over the next one; it is written to the same position both
    times.
    """
    job.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(job / f"{sha256}.tar.gz", os.O_WRONLY | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "wb") as out:
        out.seek(int(offset))
        while chunk := sys.stdin.buffer.read(_CHUNK >> 2):
            out.write(chunk)
            out.flush()
            say({"received": out.tell()})
    return received(job, sha256)


def start(job: Path, sha256: str) -> State:
    """Unpack the archive if necessary, and start the benchmark unless it runs or is finished.

    Raises:
        ValueError: The archive is not the one that was sent.
    """
    with _locked(job):
        found = state(job)
        if found.state in ("running", "finished"):
            return found
        if not found.unpacked:
            _unpack(job, sha256)
        for name in ("code", "process.json", "log", "results.json"):
            (job / name).unlink(missing_ok=True)
        _launch(job)
        return state(job)


def _unpack(job: Path, sha256: str) -> None:
    archive, digest, part = job / f"{sha256}.tar.gz", hashlib.sha256(), job / "unpacking"
    with archive.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        archive.unlink()
        msg = "the bundle was damaged in transfer; run the same command again"
        raise ValueError(msg)
    shutil.rmtree(part, ignore_errors=True)
    with tarfile.open(archive) as members:  # made by the sender's crqat, as its hash shows
        if hasattr(tarfile, "data_filter"):  # missing in the first releases of 3.10
            members.extraction_filter = tarfile.data_filter
        members.extractall(part)  # noqa: S202
    (part / FOLDER).rename(job / FOLDER)
    part.rmdir()
    archive.unlink()


def _launch(job: Path) -> None:
    work = [sys.executable, "-m", "runtime_eval", ".", "--out", str(job / "results.json")]
    with (job / "log").open("wb") as log:
        process = subprocess.Popen(
            ["nohup", "sh", "-c", _SCRIPT, "sh", str(job / "code"), *work],
            cwd=job / FOLDER,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # as setsid does: the job survives the end of the connection
        )
    part = job / "process.json.part"
    part.write_text(json.dumps(asdict(Process(process.pid, _started(process.pid), _boot()))))
    part.replace(job / "process.json")


def follow(job: Path, offset: str) -> State:
    """Print the job's log from a byte offset on until the job ends; then return how it ended."""
    position = int(offset)
    while True:
        found = _progress(job)
        with suppress(FileNotFoundError), (job / "log").open("rb") as log:
            log.seek(position)
            while chunk := log.read(_CHUNK):
                over = found.state != "running"
                lines = chunk if over else chunk[: chunk.rfind(b"\n") + 1]
                if not lines:
                    break
                position += len(lines)
                log.seek(position)
                say({"log": lines.decode(errors="replace"), "offset": position})
        if found.state != "running":
            return found
        time.sleep(_POLL_SECONDS)


def fetch(job: Path) -> str:
    """Return the text of the results file (JSON) that a finished job has written."""
    return (job / "results.json").read_text()


def clean(job: Path) -> None:
    """Stop the job if it runs, and remove all its files."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        end = time.monotonic() + 5
        process = _process(job)
        if process is not None and _running(job):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        while _running(job) and time.monotonic() < end:
            time.sleep(0.05)
    if job.exists():
        shutil.rmtree(job)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError | ValueError | tarfile.TarError):
        return str(error) or type(error).__name__
    return f"internal error: {type(error).__name__}: {error}"


_COMMANDS = {function.__name__: function for function in (state, received, receive, start, follow, fetch, clean)}


def main() -> int:
    """Run one command on a job, as the arguments COMMAND JOB ARGUMENTS... say, and print its result or error."""
    threading.Thread(target=_heartbeat, daemon=True).start()
    try:
        command, name, *arguments = sys.argv[1:]
        if len(name) != 64 or set(name) - set("0123456789abcdef"):
            msg = f"{name!r} is not the name of a job, a SHA-256"
            raise ValueError(msg)
        result = _COMMANDS[command](Path.home() / JOBS / name, *arguments)
    except Exception as error:  # the other side reports it in one line
        say({"error": _reason(error)})
        return _FAILED
    say({"result": asdict(result) if isinstance(result, State) else result})
    return 0


if __name__ == "__main__":
    sys.exit(main())
