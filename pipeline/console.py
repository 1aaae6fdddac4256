"""Output of the command line: progress on stderr, tables and verdicts on stdout; animated on a terminal only."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from crqat.core.progress import Progress
from crqat.core.typed_json import to_json

_SECONDS_BETWEEN_LINES = 10.0
# Wider than any table: a log has no edge to wrap at, and wrapping would split numbers.
_LOG_WIDTH = 1000
# In the context of a command: whether --quiet was given, and the document of --json (None without it).
_QUIET, _DOCUMENT = "crqat.quiet", "crqat.json"


def drawn(stream: TextIO) -> bool:
    """Return whether a stream is a terminal on which lines can be redrawn, as animated progress needs."""
    return stream.isatty() and not os.environ.get("CI")


def be_quiet(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    """Click callback that stores whether --quiet was given, before or after the command's name."""
    if wanted:
        context.meta[_QUIET] = True


def _of_command(name: str) -> Any:
    context = click.get_current_context(silent=True)
    return None if context is None else context.meta.get(name)


def quiet() -> bool:
    """Return whether the command runs with --quiet."""
    return bool(_of_command(_QUIET))


def wants_json() -> bool:
    """Return whether the command runs with --json."""
    return _of_command(_DOCUMENT) is not None


@contextmanager
def json_document() -> Iterator[None]:
    """Context manager for --json: text goes to stderr; at the end, the values from `give` are printed as JSON."""
    document: dict[str, Any] = {}
    click.get_current_context().meta[_DOCUMENT] = document
    with redirect_stdout(io.StringIO() if quiet() else sys.stderr):
        yield
    if document:  # of several processes, only one has a document and prints it
        click.echo(json.dumps(document, indent=1, allow_nan=False))


def give(**data: Any) -> None:
    """Add values to the JSON document that --json prints, by name; do nothing without --json."""
    document = _of_command(_DOCUMENT)
    if document is not None:
        document.update(to_json(data))


def say(text: str) -> None:
    """Print one line on stderr, unless --quiet was given."""
    if not quiet():
        click.echo(text, err=True)


def printable(text: str) -> str:
    """Return a text from a file without characters that would move the cursor or start a new line."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


class _Console(Console):
    """Rich console whose process does not exit with code 1 when nobody reads its output."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout. Cells are shown as they are; square brackets are not markup."""
    click.echo(title)  # rich's own title would be cut at the table's width
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    terminal = drawn(sys.stdout)
    _Console(file=sys.stdout, width=None if terminal else _LOG_WIDTH, force_terminal=terminal).print(table)


@contextmanager
def show_progress() -> Iterator[Progress]:
    """Context manager that yields a callback which shows the progress of a stage on stderr."""
    if quiet():
        yield _warnings_alone
        return
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
    # Only what libraries write to stderr is kept above the progress bars; stdout is for the user's tables.
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


def _warnings_alone(task: str, done: int, total: int, note: str = "") -> None:
    """`crqat.core.progress.Progress` for --quiet, which shows only warnings."""
    if note.startswith("warning: "):
        click.echo(f"{task}: {note}", err=True)


class PlainProgress:
    """Progress as text: one line when a task starts, every ten seconds, and when it ends."""

    def __init__(self) -> None:
        self._started: dict[str, float] = {}
        self._printed: dict[str, float] = {}
        self._ended: set[str] = set()

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        """Report progress; see `crqat.core.progress.Progress`."""
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
