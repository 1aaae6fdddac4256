"""The recipe's key `tracker`: writes epochs and final results as TensorBoard event files."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crqat.core import run_directory
from crqat.core.errors import ToolError
from crqat.core.results.benchmark import MEASURED, Results
from crqat.core.results.training import TrainingPayload
from crqat.pipeline.recipe.recipe import Recipe

FOLDER = "tensorboard"
_MISSING = "tracker: tensorboard is not installed; pip install crqat-edge[tensorboard], or leave tracker out"


def of_recipe(config: Recipe, runs: Path) -> TensorBoard | None:
    """Return the tracker of a recipe's run; None if the recipe names none.

    Raises:
        ToolError: The tracker's package is missing.
    """
    if config.tracker is None:
        return None
    if importlib.util.find_spec("tensorboard") is None:
        raise ToolError(_MISSING)
    return TensorBoard(runs / config.name)


class TensorBoard:
    """Writes event files into the run's directory, in several series.

    The series "float" and "qat" hold the epochs of the two trainings, "train" holds the final accuracies and the
    duration, and every benchmark has a series of its own. Each epoch appears once: a training that begins or resumes
    writes all rows of its history again, replacing those of an interrupted training.
    """

    def __init__(self, run: Path) -> None:
        self._folder = run / FOLDER
        self._written = 0

    def forget(self, *series: str) -> None:
        """Delete the event files of the given series."""
        for name in series:
            shutil.rmtree(self._folder / name, ignore_errors=True)

    def has(self, series: str) -> bool:
        """Return whether event files of the series named `series` exist."""
        return (self._folder / series).exists()

    def epochs(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write the metrics of those epochs in `history` that no earlier call has written."""
        new = history[self._written :]
        self._written = len(history)
        for phase in dict.fromkeys(row["phase"] for row in new):
            with self._writer(phase) as writer:
                for row in new:
                    for name, value in row.items():
                        if row["phase"] == phase and name not in ("phase", "epoch"):
                            writer.add_scalar(name, value, row["epoch"])

    def trained(self, directory: Path) -> None:
        """Write the final accuracies and the duration of a finished training, unless they are already written.

        If the epochs were not written during the training, they are written too.

        Args:
            directory: Directory of the `train` stage.
        """
        if self.has("train"):
            return
        if not (self.has("float") or self.has("qat")):
            lines = (directory / "history.jsonl").read_text("utf-8").splitlines()
            self.epochs([json.loads(line) for line in lines])
        payload = run_directory.payload_of(TrainingPayload, directory, run_directory.read_manifest(directory))
        found = {name: candidate.validation_accuracy for name, candidate in payload.candidates.items()}
        with self._writer("train") as writer:
            for name, accuracy in {"float": payload.float_network.validation_accuracy, **found}.items():
                writer.add_scalar(f"final validation/{name}", accuracy)
            writer.add_scalar("seconds of the training", payload.seconds)

    def measured(self, stage: str, results: Results) -> None:
        """Write a benchmark's results, replacing earlier ones.

        Args:
            stage: "benchmark", or "benchmark@NAME" for a board.
            results: Results of all files.
        """
        self.forget(stage)
        with self._writer(stage) as writer:
            for file, model in results.models.items():
                if model.status != MEASURED:
                    continue
                versus, timed = model.versus_float, model.timed
                values = {
                    "top-1": model.accuracy and model.accuracy.top1,
                    "accuracy drop, points": versus and versus.drop_points,
                    "agreement": versus and versus.agreement,
                    "latency p50, ms": timed and timed.p50_ms,
                    "latency, share of float": versus and versus.latency_ratio,
                    "size, bytes": model.size_bytes,
                }
                for name, value in values.items():
                    if value is not None:
                        writer.add_scalar(f"{name}/{file}", value)

    @contextmanager
    def _writer(self, series: str) -> Iterator[Any]:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:  # the installation is broken
            raise ToolError(_MISSING) from error
        try:
            writer = SummaryWriter(str(self._folder / series))
            try:
                yield writer
            finally:
                writer.close()
        except OSError as error:
            msg = f"{self._folder}: cannot be written: {error.strerror}"
            raise ToolError(msg) from error
