"""Saves and resumes training: after an interruption at any time, the result has the same bits as without it.

A state is everything that the rest of the training depends on: networks, optimizer, counters, all random generators,
and the position in the images. It is saved between two steps. Results that follow from the recipe alone, such as the
split and the calibration, are computed again.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crqat.core.errors import Interrupted, UsageError
from crqat.core.progress import Progress
from crqat.train import distributed
from crqat.train.checkpoint import Checkpoints, State
from crqat.train.data.batches import Feed, Generators
from crqat.train.training.optimizer import Fit

SAVE_EVERY = 300.0


@dataclass
class Training:
    """The parts of a training run that change from step to step.

    Attributes:
        fit: Optimizer and counters; its name is the phase, "float" or "qat".
        feeds: Batches of the training run, by name.
        models: Networks by name; in QAT the float network is among them.
        generators: Random generators of the order of images and of the augmentation.
        history: Rows of all finished epochs.
    """

    fit: Fit
    feeds: dict[str, Feed]
    models: dict[str, nn.Module]
    generators: Generators
    history: list[dict[str, Any]]


class Keeper:
    """Saves a training run's state periodically, after each epoch, and when the process is asked to end.

    Each rank has a keeper and calls it at the same points; rank 0 reads and writes for all, by its own clock.

    Args:
        directory: Directory for the states of this recipe; None saves nothing.
        seconds: Seconds between two states; 0 saves after every step.
        device: Device of the training.
        progress: Reports a state that was found.

    Raises:
        UsageError: The state was saved on another kind of device, or by another number of ranks.
    """

    def __init__(self, directory: Path | None, seconds: float, device: torch.device, progress: Progress) -> None:
        self._checkpoints = None if directory is None else Checkpoints(directory, progress)
        self._seconds, self._device, self._progress = seconds, device, progress
        self._found = self._latest()
        self._started = self._saved = time.monotonic()
        self._training: Training | None = None
        self._signal: int | None = None
        self._vote = distributed.Vote()
        if self._found is not None:
            self._started -= self._found.values["seconds"]
            if self._found.values["device"] != device.type:
                was = self._found.values["device"]
                msg = f"{directory}: a training on {was} cannot resume on {device.type}; --restart discards it"
                raise UsageError(msg)
            if (ranks := self._found.values.get("ranks", 1)) != distributed.world():
                msg = f"{directory}: a training in {ranks} process{'es' * (ranks > 1)} cannot resume in "
                msg += f"{distributed.world()}; use `crqat train RECIPE --nproc {ranks}`, or --restart to discard it"
                raise UsageError(msg)

    def _latest(self) -> State | None:
        if self._checkpoints is None:
            return None
        return distributed.from_first(self._checkpoints.latest() if distributed.rank() == 0 else None)

    @property
    def found(self) -> bool:
        """Whether there is a saved state to resume from; the same on all ranks."""
        return self._found is not None

    @property
    def seconds(self) -> float:
        """Return the training time so far in seconds, excluding steps that were redone after a restart."""
        return time.monotonic() - self._started

    def finished(self, phase: str, model: nn.Module) -> bool:
        """Whether the saved state belongs to a later phase than `phase` ("float" or "qat").

        If so, the weights that `model` had at the end of `phase` are loaded into it.
        """
        if self._found is None or self._found.values["phase"] == phase:
            return False
        self._load({phase: model}, self._found)
        return True

    @contextmanager
    def keep(self, training: Training) -> Iterator[None]:
        """Restore a training run from its saved state if there is one, and handle signals within the context.

        On SIGINT or SIGTERM, a state is saved before the process ends.
        """
        self._training, self._saved = training, time.monotonic()
        found, self._found = self._found, None
        if found is not None and found.values["phase"] == training.fit.name:
            self._restore(training, found)
        elif training.fit.name == "qat":
            self.save()  # the training of the float network is done
        if self._checkpoints is None or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        if self._signal is not None:
            if distributed.world() > 1:
                return  # torchrun repeats a signal that the terminal has sent, and kills processes that do not react
            raise KeyboardInterrupt  # the second request ends at once
        self._signal = number

    def after_step(self) -> None:
        """Save a state if one is due; otherwise do not wait for the device.

        With several ranks, a due state is saved one step later.
        """
        if self._checkpoints is None:
            return
        due = distributed.rank() == 0 and time.monotonic() - self._saved >= self._seconds
        if any(self._vote.largest(due, self._signal or 0)):
            self.save()

    def save(self) -> None:
        """Save a state now, and end if the process was asked to.

        Raises:
            ToolError: The state cannot be written.
            Interrupted: The process received SIGINT or SIGTERM.
        """
        if self._checkpoints is None or self._training is None:
            return
        # A signal may reach only some ranks; all of them save and end, or none does.
        self._vote.close()
        number = int(distributed.largest(self._signal or 0)[0])
        state = self._state(self._training)
        if distributed.rank() == 0:
            self._checkpoints.save(state)
        self._saved = time.monotonic()
        if number:
            distributed.from_first(None)  # no rank ends before the state is written
            msg = f"interrupted; saved at {_place(self._training.fit)}: run the same command to resume"
            raise Interrupted(msg, number)

    def _state(self, training: Training) -> State:
        fit_tensors, fit_values = training.fit.state()
        tensors = {f"fit.{name}": tensor for name, tensor in fit_tensors.items()}
        for name, model in training.models.items():
            tensors |= {f"model.{name}.{key}": tensor for key, tensor in _tensors(model).items()}
        for name, feed in training.feeds.items():
            if feed.order is not None:
                tensors[f"feed.{name}"] = feed.order
        tensors |= {f"random.{name}": tensor for name, tensor in _random_tensors(training).items()}
        algorithm, keys, *rest = np.random.get_state()  # noqa: NPY002 - a user's own modules may draw from it
        values = {
            "phase": training.fit.name,
            "fit": fit_values,
            "feeds": {name: feed.done for name, feed in training.feeds.items()},
            "history": training.history,
            "seconds": self.seconds,
            "device": self._device.type,
            "python": random.getstate(),
            "numpy": [algorithm, np.asarray(keys).tolist(), *rest],
            "ranks": distributed.world(),
        }
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        return _with_other_ranks(State(own, values))

    def _restore(self, training: Training, state: State) -> None:
        state = _of_rank(state)
        values, tensors = state.values, state.tensors
        self._load(training.models, state)
        training.fit.load_state(_below("fit.", tensors), values["fit"])
        for name, feed in training.feeds.items():
            order = tensors.get(f"feed.{name}")
            feed.order, feed.done = None if order is None else order.to(self._device), values["feeds"][name]
        training.history[:] = values["history"]
        version, keys, gauss = values["python"]
        random.setstate((version, tuple(keys), gauss))
        np.random.set_state(tuple(values["numpy"]))  # noqa: NPY002
        training.generators.order.set_state(tensors["random.order"])
        training.generators.augmentation.set_state(tensors["random.augmentation"])
        torch.set_rng_state(tensors["random.torch"])
        for name, tensor in _below("random.cuda.", tensors).items():
            with suppress(IndexError, RuntimeError):  # fewer devices than there were: ours is the first
                torch.cuda.set_rng_state(tensor, int(name))
        self._progress("continued", 1, 1, f"from {_place(training.fit)}")

    @torch.no_grad()
    def _load(self, models: dict[str, nn.Module], state: State) -> None:
        """Copy a state into the networks' existing tensors, to which compiled networks and averages refer."""
        for name, model in models.items():
            own, saved = _tensors(model), _below(f"model.{name}.", state.tensors)
            if {k: t.shape for k, t in own.items()} != {k: t.shape for k, t in saved.items()}:
                msg = "the saved state of this training does not fit the recipe's network as it is now; "
                msg += "`crqat train RECIPE --restart` discards it"
                raise UsageError(msg)
            for key, tensor in own.items():
                tensor.copy_(saved[key])


def _place(fit: Fit) -> str:
    epoch, step = fit.epochs_done + (fit.steps_in_epoch > 0), fit.steps_in_epoch
    inside = f", step {step} in it" if step else ""
    return f"{fit.name} epoch {epoch} of {fit.section.epochs}{inside}"


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and all buffers, including those that a state dict leaves out."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _with_other_ranks(state: State) -> State:
    """Return rank 0's state together with the other ranks' own parts: random generators and the sum of losses."""
    if distributed.world() == 1:
        return state
    tensors = {n: t for n, t in state.tensors.items() if n.startswith("random.") or n == "fit.loss_sum"}
    values = {name: state.values[name] for name in ("python", "numpy")}
    own = distributed.gather((tensors, values))
    further = {f"rank.{number}.{n}": t for number, (found, _) in enumerate(own) for n, t in found.items() if number}
    return State({**state.tensors, **further}, {**state.values, "rank": [found for _, found in own]})


def _of_rank(state: State) -> State:
    number = distributed.rank()
    if number == 0:
        return state
    tensors = {**state.tensors, **_below(f"rank.{number}.", state.tensors)}
    return State(tensors, {**state.values, **state.values["rank"][number]})


def _random_tensors(training: Training) -> dict[str, Tensor]:
    drawn = training.generators
    states = {"order": drawn.order.get_state(), "augmentation": drawn.augmentation.get_state()}
    states["torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        states |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states
