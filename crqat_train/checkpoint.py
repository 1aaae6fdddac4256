"""Numbered states of a training on disk: written completely or not at all, checked when read, the last two kept."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from crqat.core.errors import ToolError, UsageError
from crqat.core.progress import Progress
from crqat.core.run_directory import hash_json, replace_file, sync

FORMAT = 1
KEPT = 2


@dataclass(frozen=True)
class State:
    """One state: tensors on the CPU, and what JSON holds."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Checkpoints:
    """The states of one training: `NUMBER.safetensors`, and `NUMBER.json`, which holds the SHA-256 of both.

    Args:
        directory: Made when the first state is saved.
        progress: Told of states that cannot be read.
    """

    def __init__(self, directory: Path, progress: Progress) -> None:
        self.directory, self._progress = directory, progress

    def latest(self) -> State | None:
        """The state of the highest number that is intact, None if there is none."""
        for number in reversed(self._numbers()):
            try:
                return self._read(number)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:  # noqa: PERF203 - so few
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                self._progress(f"state {number}", 1, 1, f"warning: skipped, it cannot be read ({reason})")
        return None

    def save(self, state: State) -> None:
        """Write a state and remove all but the last two.

        Raises:
            ToolError: The directory cannot take it; the states before are as they were.
        """
        number = max(self._numbers(), default=0) + 1
        tensors = safetensors.torch.save(state.tensors)
        digests = {"tensors": hashlib.sha256(tensors).hexdigest(), "values": hash_json(state.values)}
        described = {"format": FORMAT, "sha256": digests, "values": state.values}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._prune()  # what a killed process left half written may fill the disk
            replace_file(self.directory / f"{number}.safetensors", tensors)
            replace_file(self.directory / f"{number}.json", json.dumps(described).encode())
            sync(self.directory)
            self._prune()
        except OSError as error:
            msg = (
                f"cannot save the training's state to {self.directory}: {error.strerror}; "
                "once that is mended, the same command goes on from the last state that was saved"
            )
            raise ToolError(msg) from error

    def _numbers(self) -> list[int]:
        """By value: as a name, 10 would come before 9."""
        try:
            names = [path.name for path in self.directory.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            msg = f"{self.directory}: cannot be read: {error.strerror}"
            raise ToolError(msg) from error
        return sorted(int(match[1]) for match in map(re.compile(r"(\d+)\.json").fullmatch, names) if match)

    def _read(self, number: int) -> State:
        described = json.loads((self.directory / f"{number}.json").read_bytes())
        tensors = (self.directory / f"{number}.safetensors").read_bytes()
        if described["format"] != FORMAT:
            msg = f"format {described['format']}, not {FORMAT}"
            raise ValueError(msg)
        found = {"tensors": hashlib.sha256(tensors).hexdigest(), "values": hash_json(described["values"])}
        if found != described["sha256"]:
            msg = "its SHA-256 is not the one that was written"
            raise ValueError(msg)
        return State(safetensors.torch.load(tensors), described["values"])

    def _prune(self) -> None:
        """Remove older states, and what a killed process left half written."""
        kept = {f"{number}.{kind}" for number in self._numbers()[-KEPT:] for kind in ("safetensors", "json")}
        for path in self.directory.iterdir():
            if path.name not in kept:
                path.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str] | None = None) -> None:
    """Write a safetensors file. A full disk is an OSError here, which safetensors' own function does not raise."""
    path.write_bytes(safetensors.torch.save(tensors, header))


def read_header(path: Path) -> dict[str, str]:
    """The texts that a safetensors file was written with; empty if there are none.

    Raises:
        UsageError: It is missing or is no safetensors file; the message names it.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        msg = f"{path}: not a readable safetensors file ({error})"
        raise UsageError(msg) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        UsageError: It is missing or is none; the message names it.
    """
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        msg = f"{path}: not a readable safetensors file ({error}); run the stage that wrote it again with --force"
        raise UsageError(msg) from error
