"""How long work says where it is. The stages call it; the command line draws it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called by a stage as it goes."""

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        """Say that `done` of `total` steps of `task` are behind us; `note` is a short text, a loss for instance."""


def quiet(task: str, done: int, total: int, note: str = "") -> None:
    """A `Progress` that says nothing."""
