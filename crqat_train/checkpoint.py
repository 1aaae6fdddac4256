"""Writes numbered training states atomically, keeps the last two on disk, and verifies each state that it reads."""

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
    """Everything from which a training run can resume: tensors on the CPU by name, and values that JSON can hold."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Checkpoints:
    """Saved states of one training run, two files each: `NUMBER.safetensors` and `NUMBER.json`.

    The JSON file holds the state's values, and the SHA-256 of tensors and values.

    Args:
        directory: Created when the first state is saved.
        progress: Receives a warning for each state that cannot be read.
    """

    def __init__(self, directory: Path, progress: Progress) -> None:
        self.directory, self._progress = directory, progress

    def latest(self) -> State | None:
        """Return the intact state with the highest number; None if there is none."""
        for number in reversed(self._numbers()):
            try:
                return self._read(number)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:  # noqa: PERF203 - so few
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                self._progress(
                    f"state {number}", 1, 1, f"warning: cannot be read ({reason}); the state before it is tried"
                )
        return None

    def save(self, state: State) -> None:
        """Write a state, and remove all saved states except the last two.

        Raises:
            ToolError: The directory cannot be written; earlier states are unchanged.
        """
        number = max(self._numbers(), default=0) + 1
        tensors = safetensors.torch.save(state.tensors)
        digests = {"tensors": hashlib.sha256(tensors).hexdigest(), "values": hash_json(state.values)}
        described = {"format": FORMAT, "sha256": digests, "values": state.values}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._prune()  # files that a killed process left half written may fill the disk
            replace_file(self.directory / f"{number}.safetensors", tensors)
            replace_file(self.directory / f"{number}.json", json.dumps(described).encode())
            sync(self.directory)
            self._prune()
        except OSError as error:
            msg = (
                f"cannot save the training's state to {self.directory}: {error.strerror}; "
                "free the disk or change its permissions, then run the same command to resume from the last saved state"
            )
            raise ToolError(msg) from error

    def _numbers(self) -> list[int]:
        """Return the numbers of the saved states, sorted as numbers: sorted as text, 10 would come before 9."""
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
            msg = f"its format is {described['format']}, and this version of crqat reads format {FORMAT}"
            raise ValueError(msg)
        found = {"tensors": hashlib.sha256(tensors).hexdigest(), "values": hash_json(described["values"])}
        if found != described["sha256"]:
            msg = "its SHA-256 does not match its content"
            raise ValueError(msg)
        return State(safetensors.torch.load(tensors), described["values"])

    def _prune(self) -> None:
        """Remove all states except the last two, and files that a killed process left half written."""
        kept = {f"{number}.{kind}" for number in self._numbers()[-KEPT:] for kind in ("safetensors", "json")}
        for path in self.directory.iterdir():
            if path.name not in kept:
                path.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str] | None = None) -> None:
    """Write a safetensors file; a full disk raises OSError.

    The file is written by Python, because on a full disk safetensors' own `save_file` raises another kind of error.
    """
    path.write_bytes(safetensors.torch.save(tensors, header))


def read_header(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; empty if it has none.

    Raises:
        UsageError: The file is missing or is not a safetensors file; the message names it.
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
        UsageError: The file is missing or is not a safetensors file; the message names it.
    """
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        msg = f"{path}: not a readable safetensors file ({error}); run the stage that wrote it again with --force"
        raise UsageError(msg) from error
