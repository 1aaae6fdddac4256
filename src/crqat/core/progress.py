"""The callback with which stages report the progress of long work; the command line passes one that draws it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Callback that a stage calls to report its progress."""

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        """Report that `done` of `total` steps of `task` are complete; `note` is a short text, such as a loss."""


def quiet(task: str, done: int, total: int, note: str = "") -> None:
    """A `Progress` that does nothing."""
