"""A benchmark on a board, over the user's own OpenSSH client: its configuration, keys, jump hosts and known host keys.

The work is a process of the board's own, in a job directory that is named after the bundle. The connection only starts
it and looks at it (`board.job`, which is sent along with each call), so a connection that is lost costs nothing:
the next one, of this call or of a later one, finds the job where it is.
"""

from __future__ import annotations

import contextlib
import json
import queue
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from crqat.core import run_directory, strict_json, typed_json
from crqat.core.errors import ToolError, UsageError
from crqat.core.progress import Progress
from crqat.core.results.benchmark import Results
from crqat.runtime_eval.board import bundle as bundles
from crqat.runtime_eval.board import job
from crqat.runtime_eval.board.bundle import Bundle

_ADDRESS = re.compile(r"ssh://(?:(\w[\w.-]*)@)?(\w[\w.-]*|\[[0-9A-Fa-f:.]+\])(?::(\d{1,5}))?/?", re.ASCII)
_PROGRESS = re.compile(r"(.+): (\d+)/(\d+)(?:  (.*))?")
_SOURCE = Path(__file__).with_name("job.py")
# A board's Python reads job.py from standard input, as many bytes as the first line says; what follows is data.
_BOOT = (
    'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("the Python there is %d.%d; 3.10 or newer is needed, '
    'name one with --python (JetPack 5 has none: docs/jetpack5.md)" % v[:2]); '
    'b = sys.stdin.buffer; exec(compile(b.read(int(b.readline())), "job.py", "exec"))'
)
# Never a question, no waiting for a dead link. Host keys are checked as the user's configuration says.
_OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": "15",
    "ServerAliveInterval": "15",
    "ServerAliveCountMax": "3",
    "ClearAllForwardings": "yes",
    "RemoteCommand": "none",
}
SILENCE_SECONDS = 60.0
# What is said of a job that was found.
_BEFORE = {
    "absent": "new",
    "running": "runs already and is picked up",
    "finished": "was finished before",
    "dead": "anew, because the one before was lost: {reason}",
}
# Seconds before each further attempt after a connection was lost.
RETRIES = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)

_Answer = TypeVar("_Answer")


class Disconnected(ToolError):
    """There is no connection, or there is none any more."""


@dataclass(frozen=True)
class Board:
    """Where a benchmark runs.

    Attributes:
        host: Name, address or the user's own alias for it.
        user: None leaves it to the user's ssh configuration.
        port: As above.
        python: The Python there: a path or a name on its PATH.
        ssh_config: Instead of the user's ~/.ssh/config.
    """

    host: str
    user: str | None = None
    port: int | None = None
    python: str = "python3"
    ssh_config: Path | None = None

    @classmethod
    def parse(cls, address: str, python: str = "python3", ssh_config: Path | None = None) -> Board:
        """The board of an address ssh://[USER@]HOST[:PORT].

        Raises:
            UsageError: It is something else.
        """
        match = _ADDRESS.fullmatch(address)
        port = match and match[3] and int(match[3])
        if match is None or port == 0 or (port or 1) > 65535:
            msg = (
                f"--on {address}: write it as ssh://[USER@]HOST[:PORT]; HOST may be an alias of your ssh configuration"
            )
            raise UsageError(msg)
        if not python or python.startswith("-"):
            msg = f"--python {python}: not the path of a Python"
            raise UsageError(msg)
        if ssh_config is not None and not ssh_config.is_file():
            msg = f"--ssh-config {ssh_config}: no such file"
            raise UsageError(msg)
        return cls(match[2], match[1], port or None, python, ssh_config)

    @property
    def address(self) -> str:
        """As `parse` reads it."""
        user, port = f"{self.user}@" if self.user else "", f":{self.port}" if self.port else ""
        return f"ssh://{user}{self.host}{port}"

    @property
    def name(self) -> str:
        """What tells it from other boards in the name of a directory."""
        port = f"_{self.port}" if self.port else ""
        return re.sub(r"[^\w.-]", "_", self.host.strip("[]"), flags=re.ASCII) + port

    def command(self, *remote: str) -> list[str]:
        """The ssh command that runs the words of `remote` there."""
        config = ["-F", str(self.ssh_config)] if self.ssh_config else []
        options = [word for name, value in _OPTIONS.items() for word in ("-o", f"{name}={value}")]
        port = ["-p", str(self.port)] if self.port else []
        user = ["-l", self.user] if self.user else []
        # ssh joins words by blanks and the shell there takes them apart again.
        return ["ssh", *config, "-T", *options, *port, *user, "--", self.host.strip("[]"), shlex.join(remote)]


def measure(board: Board, bundle: Bundle, paths: Mapping[str, Path], anew: bool, progress: Progress) -> Results:
    """Measure a bundle on a board, or pick up the measurement that runs or ran there.

    Args:
        board: Where.
        bundle: What `crqat.runtime_eval.board.bundle.describe` gave.
        paths: Likewise.
        anew: End and forget what ran there of this bundle before.
        progress: Told of the upload and of what the board tells.

    Returns:
        The board's results, of this bundle.

    Raises:
        ToolError: There is no connection and several attempts made none, the board's Python lacks something, or the
            work failed there. While the work runs, calling this again picks it up.
    """
    link = _Link(board, bundle, progress)
    if anew:
        link.ask("clean")
    found = typed_json.from_json(job.State, link.ask("state"))
    if found.missing:
        msg = f"{board.address}: {board.python} there has no {' and no '.join(found.missing)}; install it there, or "
        raise ToolError(msg + "name a Python that has it with --python")
    progress(f"{board.name}: job", 1, 1, _BEFORE[found.state].format(code=found.code, reason=found.reason))
    if found.state in ("absent", "dead"):
        sha256 = "" if found.unpacked else link.upload(bundle, paths)
        link.persist(lambda: link.ask("start", sha256))
    found = link.follow(bundle.benchmark)
    if found.state != "finished" or found.code != 0:
        reason = found.reason or f"exit code {found.code}"
        link.persist(lambda: link.ask("clean"))
        msg = f"{board.address}: the work there failed ({reason}); last words: {link.last_words or 'none'}"
        raise ToolError(msg)
    return _checked(link.persist(lambda: link.ask("fetch")), board, bundle)


def clean(board: Board, bundle: Bundle, progress: Progress) -> None:
    """Remove everything of a bundle from a board, and end its work if it runs.

    Raises:
        ToolError: There is no connection.
    """
    _Link(board, bundle, progress).ask("clean")


def _checked(text: str, board: Board, bundle: Bundle) -> Results:
    try:
        results = typed_json.from_json(Results, strict_json.parse(text))
    except ValueError as error:
        msg = f"{board.address}: the results there are damaged ({error}); run again with --force"
        raise ToolError(msg) from error
    if results.bundle != bundle.sha256:
        msg = f"{board.address}: the results there are of another bundle; run again with --force"
        raise ToolError(msg)
    return results


@dataclass(frozen=True)
class _Told:
    """What a job tells on the way: how many bytes it received, or a piece of its log and where that ends."""

    received: int | None = None
    log: str | None = None
    offset: int = 0


class _Link:
    """One job on one board, and what was heard of it."""

    def __init__(self, board: Board, bundle: Bundle, progress: Progress) -> None:
        self._board, self._progress = board, progress
        # Another Python there is another measurement.
        self._job = run_directory.hash_json({"bundle": bundle.sha256, "python": board.python})
        self._offset = 0
        self._advanced = False  # since the connection was last lost
        self.last_words = ""

    def persist(self, step: Callable[[], _Answer]) -> _Answer:
        """Do something that may be done twice, and again if the connection is lost, a limited number of times."""
        failures = 0
        while True:
            try:
                return step()
            except Disconnected as error:  # noqa: PERF203 (an attempt takes seconds)
                failures = 0 if self._advanced else failures
                self._advanced = False
                if failures == len(RETRIES):
                    msg = f"{error}; what was started there goes on: run the same command again to pick it up"
                    raise ToolError(msg) from error
                self._progress("reconnect", failures, len(RETRIES), str(error))
                time.sleep(RETRIES[failures])
                failures += 1

    def upload(self, bundle: Bundle, paths: Mapping[str, Path]) -> str:
        """Copy the archive, from where an interrupted copy stopped, and give its SHA-256."""
        with tempfile.TemporaryDirectory() as scratch:
            archive = Path(scratch) / "bundle.tar.gz"
            bundles.write(bundle, paths, archive)
            sha256, size = run_directory.sha256_file(archive), archive.stat().st_size

            def heard(told: _Told) -> None:
                if told.received is not None:
                    self._progress("upload, KiB", told.received >> 10, size >> 10)

            def step() -> None:
                offset = self.ask("received", sha256)
                if offset < size:
                    self.ask("receive", sha256, str(offset), data=(archive, offset), heard=heard)

            self.persist(step)
        return sha256

    def follow(self, benchmark: Mapping[str, Any]) -> job.State:
        """Tell of the job's progress until it is over."""
        limit = SILENCE_SECONDS + sum(
            benchmark.get(key, 0.0) for key in ("time_limit_seconds", "warm_up_seconds", "latency_seconds")
        )
        spoke = time.monotonic()

        def heard(told: _Told) -> None:
            nonlocal spoke
            if told.log is not None:
                self._offset, spoke = told.offset, time.monotonic()
                for line in filter(str.strip, told.log.splitlines()):
                    self._tell(line)
            elif time.monotonic() - spoke > limit:
                msg = f"{self._board.address}: the work there has been silent for {limit:.0f} s; --force starts it anew"
                raise ToolError(msg)

        found = self.persist(lambda: self.ask("follow", str(self._offset), heard=heard))
        return typed_json.from_json(job.State, found)

    def _tell(self, line: str) -> None:
        told = _PROGRESS.fullmatch(line)
        if told is None:
            self.last_words = line.strip()
        else:
            task, done, total, note = told.groups("")
            self._progress(f"{self._board.name}: {task}", int(done), int(total), note)

    def ask(
        self,
        command: str,
        *arguments: str,
        data: tuple[Path, int] | None = None,
        heard: Callable[[_Told], None] = lambda told: None,
    ) -> Any:
        """Run one command of `crqat.runtime_eval.board.job` on the board.

        Args:
            command: Its name.
            arguments: Its arguments behind the job.
            data: A file, from a position on, for its standard input.
            heard: Gets everything that it tells before its result.

        Raises:
            Disconnected: There is no connection, or it was lost.
            ToolError: The command failed there.
        """
        # A path below the home directory is where a login begins; quoted, the shell there would take ~ for a name.
        python = re.sub(r"^~/", "./", self._board.python)
        words = self._board.command(python, "-c", _BOOT, command, self._job, *arguments)
        with tempfile.TemporaryFile() as errors:
            try:
                process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
            except OSError as error:
                msg = f"ssh: cannot be run ({error.strerror}); install OpenSSH's client"
                raise ToolError(msg) from error
            try:
                for message in _messages(process, data):
                    if "error" in message:
                        msg = f"{self._board.address}: {message['error']}"
                        raise ToolError(msg)
                    if "result" in message:
                        return message["result"]
                    self._advanced = self._advanced or bool(message)
                    heard(typed_json.from_json(_Told, message))
                code = process.wait(SILENCE_SECONDS)
            except (TimeoutError, subprocess.TimeoutExpired):
                msg = f"{self._board.address}: no sign of life for {SILENCE_SECONDS:.0f} s"
                raise Disconnected(msg) from None
            finally:
                process.kill()
                process.wait()
            errors.seek(0)
            raise self._failure(code, errors.read().decode(errors="replace"))

    def _failure(self, code: int, text: str) -> ToolError:
        """Why there was no result, from ssh's exit code and what stands on standard error."""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        last = lines[-1] if lines else f"ssh ended with {code} and no word"
        if code not in (255, 0) and code > 0:
            hint = "; name the Python there with --python" if code in (126, 127) else ""
            return ToolError(f"{self._board.address}: {last}{hint}")
        if "Host key verification failed" in text:
            last += " (connect once by hand, with ssh, and compare the key)"
        return Disconnected(f"{self._board.address}: {last}")


def _messages(process: subprocess.Popen[bytes], data: tuple[Path, int] | None) -> Iterator[Mapping[str, object]]:
    """Feed the program there and yield what it says, JSON objects; TimeoutError if it says nothing for too long."""
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_feed, args=(process, data), daemon=True).start()
    threading.Thread(target=_listen, args=(process, lines), daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=SILENCE_SECONDS)
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            return
        # Before it, a login shell may have said something of its own.
        with contextlib.suppress(ValueError):
            message = json.loads(line)
            if isinstance(message, dict):
                yield message


def _feed(process: subprocess.Popen[bytes], data: tuple[Path, int] | None) -> None:
    assert process.stdin is not None  # noqa: S101 (a pipe was asked for; this tells mypy)
    source = _SOURCE.read_bytes()
    with contextlib.suppress(OSError), process.stdin as pipe:
        pipe.write(b"%d\n" % len(source) + source)
        if data is not None:
            path, offset = data
            with path.open("rb") as file:
                file.seek(offset)
                shutil.copyfileobj(file, pipe, 1 << 16)


def _listen(process: subprocess.Popen[bytes], lines: queue.SimpleQueue[bytes | None]) -> None:
    assert process.stdout is not None  # noqa: S101 (as above)
    with process.stdout as pipe:
        for line in pipe:
            lines.put(line)
    lines.put(None)
