"""Runs a benchmark on a board over the user's OpenSSH client, with its configuration, keys and known hosts.

The work is a separate process on the board, in a job directory named after the bundle. The connection only starts and
watches it (`board.job`, which is sent with each call), so a lost connection costs nothing: the next connection, of this
call or a later one, finds the job where it is.
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
# The board's Python reads job.py from standard input, as many bytes as the first line says; data follows.
_BOOT = (
    'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("the Python there is %d.%d; 3.10 or newer is needed, '
    'name one with --python (JetPack 5 has none: docs/jetpack5.md)" % v[:2]); '
    'b = sys.stdin.buffer; exec(compile(b.read(int(b.readline())), "job.py", "exec"))'
)
# Never ask questions or wait for a dead link. Host keys are checked as the user's configuration says.
_OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": "15",
    "ServerAliveInterval": "15",
    "ServerAliveCountMax": "3",
    "ClearAllForwardings": "yes",
    "RemoteCommand": "none",
}
SILENCE_SECONDS = 60.0
# Descriptions of the state in which a job was found.
_BEFORE = {
    "absent": "new",
    "running": "runs already and is picked up",
    "finished": "was finished before",
    "dead": "again, because the previous job was lost: {reason}",
}
# Seconds before each further attempt after a lost connection.
RETRIES = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)

_Answer = TypeVar("_Answer")


class Disconnected(ToolError):
    """Raised if no connection to a board could be made, or if the connection was lost."""


@dataclass(frozen=True)
class Board:
    """A board that runs a benchmark.

    Attributes:
        host: Host name, address or alias of the user's ssh configuration.
        user: User name; None leaves it to the ssh configuration.
        port: Port; None leaves it to the ssh configuration.
        python: Python on the board: a path or a name on its PATH.
        ssh_config: Configuration file to use instead of ~/.ssh/config.
    """

    host: str
    user: str | None = None
    port: int | None = None
    python: str = "python3"
    ssh_config: Path | None = None

    @classmethod
    def parse(cls, address: str, python: str = "python3", ssh_config: Path | None = None) -> Board:
        """Return the board of an address ssh://[USER@]HOST[:PORT].

        Raises:
            UsageError: The address or an option is not valid.
        """
        match = _ADDRESS.fullmatch(address)
        port = match and match[3] and int(match[3])
        if match is None or port == 0 or (port or 1) > 65535:
            msg = (
                f"--on {address}: write it as ssh://[USER@]HOST[:PORT]; HOST may be an alias of your ssh configuration"
            )
            raise UsageError(msg)
        if not python or python.startswith("-"):
            msg = f"--python {python}: not the path or name of a Python interpreter on the board"
            raise UsageError(msg)
        if ssh_config is not None and not ssh_config.is_file():
            msg = f"--ssh-config {ssh_config}: no such file"
            raise UsageError(msg)
        return cls(match[2], match[1], port or None, python, ssh_config)

    @property
    def address(self) -> str:
        """Address in the form that `parse` reads."""
        user, port = f"{self.user}@" if self.user else "", f":{self.port}" if self.port else ""
        return f"ssh://{user}{self.host}{port}"

    @property
    def name(self) -> str:
        """Name of the board in the names of directories: its host, and its port if one is given."""
        port = f"_{self.port}" if self.port else ""
        return re.sub(r"[^\w.-]", "_", self.host.strip("[]"), flags=re.ASCII) + port

    def command(self, *remote: str) -> list[str]:
        """Return the ssh command that runs the words of `remote` on the board."""
        config = ["-F", str(self.ssh_config)] if self.ssh_config else []
        options = [word for name, value in _OPTIONS.items() for word in ("-o", f"{name}={value}")]
        port = ["-p", str(self.port)] if self.port else []
        user = ["-l", self.user] if self.user else []
        # ssh joins the words by blanks, and the shell on the board splits them again.
        return ["ssh", *config, "-T", *options, *port, *user, "--", self.host.strip("[]"), shlex.join(remote)]


def measure(board: Board, bundle: Bundle, paths: Mapping[str, Path], anew: bool, progress: Progress) -> Results:
    """Measure a bundle on a board, or resume a measurement that runs or ran there.

    Args:
        board: The board.
        bundle: Bundle from `crqat.runtime_eval.board.bundle.describe`.
        paths: File of each of the bundle's members, from the same function.
        anew: Whether to stop and remove any earlier job of this bundle first.
        progress: Callback for the progress of the upload and of the job.

    Returns:
        The board's results for this bundle.

    Raises:
        ToolError: There was no connection after several attempts, the board's Python lacks a package, or the benchmark
            failed on the board. If the benchmark still runs there, another call of this function watches it further.
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
        msg = f"{board.address}: the benchmark there failed ({reason}); last output: {link.last_words or 'none'}"
        raise ToolError(msg)
    return _checked(link.persist(lambda: link.ask("fetch")), board, bundle)


def clean(board: Board, bundle: Bundle, progress: Progress) -> None:
    """Stop the benchmark of a bundle on a board if it runs, and remove all files of the bundle there.

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
    """A job's progress report: the number of bytes received, or a piece of its log and the offset of its end."""

    received: int | None = None
    log: str | None = None
    offset: int = 0


class _Link:
    """Connection to one job on a board; `last_words`: the last line of the job's log that reports no progress."""

    def __init__(self, board: Board, bundle: Bundle, progress: Progress) -> None:
        self._board, self._progress = board, progress
        # Another Python on the board is another measurement.
        self._job = run_directory.hash_json({"bundle": bundle.sha256, "python": board.python})
        self._offset = 0
        self._advanced = False  # whether there was progress since the connection was last lost
        self.last_words = ""

    def persist(self, step: Callable[[], _Answer]) -> _Answer:
        """Run a repeatable action, and repeat it a limited number of times if the connection is lost."""
        failures = 0
        while True:
            try:
                return step()
            except Disconnected as error:  # noqa: PERF203 (an attempt takes seconds)
                failures = 0 if self._advanced else failures
                self._advanced = False
                if failures == len(RETRIES):
                    msg = f"{error}; work that was started there continues: run the same command again to resume"
                    raise ToolError(msg) from error
                self._progress("reconnect", failures, len(RETRIES), str(error))
                time.sleep(RETRIES[failures])
                failures += 1

    def upload(self, bundle: Bundle, paths: Mapping[str, Path]) -> str:
        """Copy the archive, resuming an interrupted copy, and return its SHA-256."""
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
        """Report the job's progress until it ends, and return how it ended."""
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
                msg = f"{self._board.address}: the benchmark there was silent for {limit:.0f} s; --force restarts it"
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
            command: Name of the command.
            arguments: Arguments after the job's name.
            data: (file, offset): what the command reads from standard input, the file's bytes from the offset on.
            heard: Callback for everything that the command reports before its result.

        Raises:
            Disconnected: There is no connection, or it was lost.
            ToolError: The command failed on the board.
        """
        # Relative paths start in the home directory after a login; the shell on the board would not expand a quoted ~.
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
                msg = f"{self._board.address}: no response for {SILENCE_SECONDS:.0f} s"
                raise Disconnected(msg) from None
            finally:
                process.kill()
                process.wait()
            errors.seek(0)
            raise self._failure(code, errors.read().decode(errors="replace"))

    def _failure(self, code: int, text: str) -> ToolError:
        """Return why there was no result, from ssh's exit code and the text on standard error."""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        last = lines[-1] if lines else f"ssh ended with code {code} and no message"
        if code not in (255, 0) and code > 0:
            hint = "; name the Python there with --python" if code in (126, 127) else ""
            return ToolError(f"{self._board.address}: {last}{hint}")
        if "Host key verification failed" in text:
            last += " (connect once by hand, with ssh, and compare the key)"
        return Disconnected(f"{self._board.address}: {last}")


def _messages(process: subprocess.Popen[bytes], data: tuple[Path, int] | None) -> Iterator[Mapping[str, object]]:
    """Send job.py and `data` to the board, and yield the JSON objects it prints; TimeoutError after a long silence."""
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
        # A login shell may have printed text of its own first.
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
