"""Hashes files and folders of data. A file that has not changed since it was last hashed is not read again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crqat.core import run_directory
from crqat.core.errors import ToolError
from crqat.core.progress import Progress, quiet

MEMORY = ".hashes"
ABSENT = "nothing there"
# A file may change twice within one clock tick, so a file that changed this recently is not remembered.
_YOUNG_NS = 2 * 10**9
_CHUNK = 256


@dataclass(frozen=True)
class DiskState:
    """Contents of a folder, or of one file: maps each relative path to size in bytes and SHA-256."""

    files: dict[str, tuple[int, str]]

    def __str__(self) -> str:
        """Return the number of files, their size, and one hash over all names, sizes and contents, as text."""
        if not self.files:
            return ABSENT
        size = sum(length for length, _ in self.files.values())
        return f"{len(self.files)} files, {size} bytes, {run_directory.hash_json(self.files)}"

    def holds(self, other: DiskState) -> bool:
        """Return whether this state contains every file of `other` with the same size and hash."""
        return other.files.items() <= self.files.items()


def disk_state(root: Path, runs: Path, progress: Progress = quiet) -> DiskState:
    """Return size and hash of every file in a folder, or of one file; empty if it does not exist.

    Hidden files, `__pycache__` and the runs themselves are left out; linked folders are followed. File hashes are
    stored in the runs' directory by path, size and times, so that an unchanged folder is not read twice.

    Args:
        root: The folder or file.
        runs: The directory of all runs.
        progress: Callback for the progress of reading files.

    Raises:
        ToolError: A file cannot be read.
    """
    paths = [(path.name, path) for path in [root] if path.is_file()] or sorted(_walk(root, runs.resolve()))
    memory = runs / MEMORY / f"{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]}.json"
    known, now = _remembered(memory), time.time_ns()
    files: dict[str, tuple[int, str]] = {}
    entries: dict[str, list[Any]] = {}
    unread = []
    for name, path in paths:
        with contextlib.suppress(OSError):  # a broken link or a removed file: the data's reader reports it
            status = path.stat()
            state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
            entry = known.get(name)
            if isinstance(entry, list) and entry[:3] == state and len(entry) == 4:
                files[name], entries[name] = (status.st_size, str(entry[3])), entry
            else:
                unread.append((name, path, state))
    with ThreadPoolExecutor() as pool:  # hashlib releases Python's lock
        for start in range(0, len(unread), _CHUNK):
            chunk = unread[start : start + _CHUNK]
            for (name, _, state), digest in zip(chunk, pool.map(_digest, [p for _, p, _ in chunk]), strict=True):
                files[name] = (state[0], digest)
                if now - max(state[1:]) > _YOUNG_NS:
                    entries[name] = [*state, digest]
            if len(unread) > _CHUNK:
                progress("reading the data", min(start + _CHUNK, len(unread)), len(unread), "for its hash")
    if entries != known:
        with contextlib.suppress(OSError):  # without it, the next call takes longer
            memory.parent.mkdir(parents=True, exist_ok=True)
            run_directory.replace_file(memory, json.dumps(entries).encode())
    return DiskState(dict(sorted(files.items())))


def _remembered(memory: Path) -> dict[str, Any]:
    try:
        content = json.loads(memory.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _walk(root: Path, runs: Path) -> Iterator[tuple[str, Path]]:
    """Yield relative name and path of each file; a folder that several links lead to is entered only once."""
    seen: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(root, followlinks=True):
        status = Path(parent).stat()
        if (status.st_dev, status.st_ino) in seen or Path(parent).resolve() == runs:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in names:
            if not name.startswith("."):
                path = Path(parent, name)
                yield path.relative_to(root).as_posix(), path


def _digest(path: Path) -> str:
    try:
        return run_directory.sha256_file(path)
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}; make it readable, or remove it from the data folder"
        raise ToolError(msg) from error
