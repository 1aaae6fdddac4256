"""Locks a run's directory, so that only one process at a time writes to it; errors name the holder of the lock."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock

from crqat.core.errors import ToolError, UsageError

LOCK, HOLDER = ".lock", ".lock-holder.json"
# Seconds that a killed process's children may keep its lock: data workers look for their parent every five seconds.
_SECONDS_OF_THE_DEAD = 15.0


@contextmanager
def hold(run: Path) -> Iterator[None]:
    """Context manager that locks a run's directory for this process, which may already hold the lock.

    The operating system holds the lock, so it is released whenever and however the process ends.

    Args:
        run: Directory of the run; created if necessary.

    Raises:
        UsageError: The directory's name is not UTF-8 text.
        ToolError: Another process holds the lock, or the directory cannot be written to.
    """
    try:
        os.fspath(run).encode()
    except UnicodeEncodeError as error:
        msg = f"--runs {run}: not UTF-8 text, which safetensors cannot open; choose another name"
        raise UsageError(msg) from error
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(run.resolve() / LOCK, is_singleton=True)
        again = lock.is_locked
        _acquire(lock, run)
    except OSError as error:
        msg = f"cannot write to {run}: {error.strerror}; choose another place with --runs"
        raise ToolError(msg) from error
    try:
        if not again:
            # On a full disk the empty lock file still fits, but its holder's description does not.
            with suppress(OSError):
                (run / HOLDER).write_text(json.dumps(_myself()))
        yield
    finally:
        if not again:
            (run / HOLDER).unlink(missing_ok=True)
        lock.release()


def _acquire(lock: filelock.BaseFileLock, run: Path) -> None:
    with suppress(filelock.Timeout):
        lock.acquire(timeout=0)
        return
    holder = _holder(run)
    with suppress(filelock.Timeout):
        if holder is not None and holder["host"] == platform.node() and not _alive(holder["pid"]):
            lock.acquire(timeout=_SECONDS_OF_THE_DEAD)
            return
    who = "another process"
    if holder is not None:
        who = f"process {holder['pid']} on {holder['host']} ({holder['command']}), since {holder['since']}"
    msg = f"{run}: in use by {who}; wait for it, end it, or choose another place with --runs"
    raise ToolError(msg)


def _myself() -> dict[str, Any]:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return {"pid": os.getpid(), "host": platform.node(), "command": command, "since": since}


def _holder(run: Path) -> dict[str, Any] | None:
    try:
        holder = json.loads((run / HOLDER).read_text())
        return {"pid": int(holder["pid"]), **{key: str(holder[key]) for key in ("host", "command", "since")}}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
