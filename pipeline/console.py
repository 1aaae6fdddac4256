"""What the user sees: progress on stderr, tables and verdicts on stdout; drawn on a terminal, plain lines elsewhere."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from crqat.core.progress import Progress

_SECONDS_BETWEEN_LINES = 10.0
# Wider than any table: a log has no edge to wrap at, and a wrapped number is not a number.
_LOG_WIDTH = 1000


def drawn(stream: TextIO) -> bool:
    """Whether a stream can show things that move."""
    return stream.isatty() and not os.environ.get("CI")


def say(text: str) -> None:
    """One line on stderr, with the progress."""
    click.echo(text, err=True)


def printable(text: str) -> str:
    """A text from a file, without what would move the cursor or start a new line."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


class _Console(Console):
    """Rich's own ends the process with exit code 1 where nobody reads its output."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout. Cells are shown as they are; square brackets are no markup."""
    click.echo(title)  # not the table's own, which would be cut at the table's width
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    terminal = drawn(sys.stdout)
    _Console(file=sys.stdout, width=None if terminal else _LOG_WIDTH, force_terminal=terminal).print(table)


@contextmanager
def show_progress() -> Iterator[Progress]:
    """Give the function that stages call as they go."""
    if not drawn(sys.stderr):
        yield PlainProgress()
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    # stdout is the user's, for tables; only what libraries write to stderr is kept above the bars.
    bars = Bars(*columns, console=Console(stderr=True), redirect_stdout=False)
    tasks: dict[str, TaskID] = {}

    def draw(task: str, done: int, total: int, note: str = "") -> None:
        if not tasks:
            bars.start()
        if task not in tasks:
            tasks[task] = bars.add_task(task, total=total, note=note)
        bars.update(tasks[task], completed=done, total=total, note=note)

    try:
        yield draw
    finally:
        bars.stop()


class PlainProgress:
    """A line when a task starts, every ten seconds, and when it ends."""

    def __init__(self) -> None:
        self._started: dict[str, float] = {}
        self._printed: dict[str, float] = {}
        self._ended: set[str] = set()

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        """A `crqat.core.progress.Progress`."""
        now = time.monotonic()
        first, end = task not in self._started, done >= total
        due = now - self._printed.get(task, now) >= _SECONDS_BETWEEN_LINES
        if task in self._ended or not (first or end or due):
            return
        if end:
            self._ended.add(task)
        self._started.setdefault(task, now)
        self._printed[task] = now
        seconds = now - self._started[task]
        say(f"{task}: {done}/{total}{f'  {note}' if note else ''}  ({seconds:.0f} s)")
