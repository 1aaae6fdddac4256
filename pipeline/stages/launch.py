"""`crqat train` in several processes: the launcher, and the work of each process."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from crqat.core import failures
from crqat.core.errors import InternalError, Interrupted, ToolError, UsageError
from crqat.core.progress import quiet
from crqat.core.results.training import TrainingPayload
from crqat.core.run_directory import payload_of, read_manifest
from crqat.pipeline import console
from crqat.pipeline.recipe import recipe
from crqat.pipeline.stages import lock
from crqat.pipeline.stages import run as stages

_SIGNALS = 128
# Exit codes of a process that reported its error or was stopped because of the others: -15 if it could not respond.
_TOLD = (2, 3, _SIGNALS + signal.SIGINT, _SIGNALS + signal.SIGTERM, -signal.SIGTERM)

# Seconds; slightly less than torch gives a process to respond, since torch counts whole seconds.
_UNANSWERED = 25


def check(config: recipe.Recipe, processes: int) -> None:
    """Check that a recipe can be trained in `processes` processes, before any of them is started.

    Raises:
        UsageError: The recipe cannot be trained with this number of processes.
        ToolError: The recipe needs a device that does not exist.
    """
    import torch

    from crqat.train import device as machine
    from crqat.train import distributed, shares

    training = recipe.train_config(config)
    shares.check(training, processes)
    device = machine.choose_device(training.device)
    if device.type == "cuda" and torch.cuda.device_count() < processes:
        msg = f"--nproc {processes}: needs one CUDA device per process; torch sees {torch.cuda.device_count()} here"
        raise UsageError(msg)
    if training.qat.sync_bn:
        distributed.check_sync_bn(device)


def run(arguments: Sequence[str], once: Sequence[str], processes: int, max_restarts: int) -> int:
    """Start `crqat train` in several processes as torchrun does, wait for them and return crqat's exit code.

    Args:
        arguments: Arguments after `crqat train`.
        once: Arguments that are added at the first start, but not when the processes are restarted.
        processes: Number of processes, each with its own device or a share of the CPU's cores.
        max_restarts: How often all processes are restarted from the last state after one has died. Processes that exit
            with a reported error are not restarted; the error would recur.

    Raises:
        ToolError: A process died, and no restart is left.
        Interrupted: A signal stopped the training before a process could save its state.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # Users cannot fix what DistributedDataParallel warns about its speed.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.disable()  # torch would repeat what the processes reported, or what is reported below
    command = ["-m", "crqat", "train", *arguments]
    for left in range(max_restarts, -1, -1):
        # Rendezvous as with torchrun's --standalone: on this machine, at a free port.
        how = LaunchConfig(
            1, 1, processes, run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
        )
        with tempfile.TemporaryDirectory(prefix="crqat-") as folder:
            said = Path(folder) / "said"
            os.environ["CRQAT_SAID"] = str(said)
            try:
                elastic_launch(how, sys.executable)(*command, *(once if left == max_restarts else ()))
            except SignalException as asked:  # torch has passed the signal on, and waited for the processes
                if said.exists():
                    return _SIGNALS + asked.sigval
                msg = "stopped before a training process could save; the same command resumes from the last state"
                raise Interrupted(msg, asked.sigval) from asked
            except ChildFailedError as error:
                codes = exit_codes(list(error.failures.values()))
                # torch may stop the process that reported the error before it exits by itself, and then gives the code
                # of another process.
                reported = int(said.read_text() or 0) if said.exists() else 0
            else:
                return 0
            finally:
                del os.environ["CRQAT_SAID"]
        died = [code for code in (reported, *codes) if code and code not in _TOLD]
        if not died:
            return reported or min((code for code in codes if code > 0), default=_SIGNALS + signal.SIGTERM)
        how_it_died = f"by signal {-died[0]}" if died[0] < 0 else f"with {died[0]}"
        if died[0] == InternalError.exit_code_of_rank:
            how_it_died = "by an internal error"
        what = f"a process of the training ended {how_it_died}"
        if left:
            click.echo(
                f"crqat: {what}; all restart from the last state ({left} of {max_restarts} restarts left)", err=True
            )
    msg = f"{what}; the same command resumes from the last state; --max-restarts does so automatically"
    raise ToolError(msg)


def exit_codes(failures: Sequence[Any]) -> list[int]:
    """Return the exit codes of the failed processes, without those that torch itself stopped.

    When one process fails, torch sends the others SIGTERM, and SIGKILL 30 s later if they are still starting or wait
    for a device. Their exit codes say nothing about the cause, which the first process that ended has reported.

    Args:
        failures: The `ProcessFailure`s of torch's elastic launcher.
    """
    first = min(failure.timestamp for failure in failures)
    killed = [f.exitcode == -signal.SIGKILL and f.timestamp - first >= _UNANSWERED for f in failures]
    codes = [failure.exitcode for failure, by_torch in zip(failures, killed, strict=True) if not by_torch]
    return [code for code in codes if code != -signal.SIGTERM] or codes


def several() -> bool:
    """Return whether torchrun started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def train(
    config: recipe.Recipe, runs: Path, force: bool, restart: bool, save_every: float, unchecked: bool = False
) -> TrainingPayload | None:
    """Train in this process, which is one of several; return the training's results on rank 0, None on other ranks.

    Rank 0 decides whether the stage is out of date, and writes its files. The other ranks only take part in the
    training.
    """
    from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

    from crqat.train import distributed
    from crqat.train.training.stage import train as run_training

    _prctl_pr_set_pdeathsig(signal.SIGTERM)  # end with a killed launcher
    # torchrun restarts a dead process with the same command, which must not discard the state.
    restart = restart and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    run = runs / config.name
    with failures.explained("train", run), distributed.started(config.device):
        if distributed.rank() == 0:
            with lock.hold(run), console.show_progress() as progress:
                began: list[bool] = []

                def begin() -> None:
                    began.append(distributed.from_first(True))

                directory = stages.train(config, runs, force, progress, restart, save_every, begin, unchecked)
                if not began:
                    distributed.from_first(False)
            return payload_of(TrainingPayload, directory, read_manifest(directory))
        if distributed.from_first(False):
            run_training(recipe.train_config(config), None, quiet, run, save_every)
        return None
