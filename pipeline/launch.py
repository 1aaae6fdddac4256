"""`crqat train` in several processes: how they are started here, and what each of them does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from artifacts.errors import ToolError
from artifacts.progress import quiet
from artifacts.store import read_manifest
from pipeline import console, lock, recipe, stages

# Where a process leaves its exit code: torchrun's own is 1 whatever happened.
_EXIT_FILE = "CRQAT_EXIT_FILE"
_SIGNALS = 128


def check(config: recipe.Recipe, processes: int) -> None:
    """Say before anything is started what each of the processes would say.

    Raises:
        UsageError: The recipe cannot be trained in so many processes.
        ToolError: It needs a device that is not there.
    """
    from crqat_train import ranks

    training = recipe.train_config(config)
    ranks.check(training, processes)
    if training.qat.sync_bn:
        from crqat_train import distributed, machine

        distributed.check_sync_bn(machine.choose_device(training.device))


def run(arguments: Sequence[str], processes: int, max_restarts: int) -> int:
    """Start `crqat train` in some processes by torchrun, wait for them and return crqat's exit code.

    Args:
        arguments: Behind `crqat train`.
        processes: How many, each with a device of its own or a share of the CPU's cores.
        max_restarts: How often all of them are started again, from the last state, after one has died.

    Raises:
        ToolError: They ended without a word of their own, killed for instance.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["--max-restarts", str(max_restarts), "-m", "pipeline.cli", "train", *arguments]
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    with tempfile.TemporaryDirectory(prefix="crqat-") as directory:
        note = Path(directory) / "exit"
        # What DistributedDataParallel notes about its own speed is not the user's to mend.
        defaults = {"OMP_NUM_THREADS": threads, "TORCH_CPP_LOG_LEVEL": "ERROR"}
        environment = {**defaults, **os.environ, _EXIT_FILE: str(note)}
        # A session of its own: Ctrl-C in a terminal comes here alone and is passed on once; torchrun tells the others.
        child = subprocess.Popen(command, env=environment, start_new_session=True)
        asked: list[int] = []

        def pass_on(number: int, _: Any) -> None:
            if not asked:
                child.send_signal(number)
            asked.append(number)

        before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            code = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if code == 0:
            return 0
        if asked:
            return _SIGNALS + asked[0]
        if note.is_file():
            return int(note.read_text())
    msg = f"the {processes} processes of the training ended (torchrun: {code}); the same command goes on from the "
    msg += "last state, --max-restarts does so by itself"
    raise ToolError(msg)


def note_exit(code: int) -> None:
    """Leave this process's exit code to `run`; one that torchrun ended because of another has nothing to say."""
    path = os.environ.get(_EXIT_FILE)
    if path and 0 < code < _SIGNALS:
        Path(path).write_text(str(code))


def several() -> bool:
    """Whether torchrun started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def train(config: recipe.Recipe, runs: Path, force: bool, restart: bool, save_every: float) -> dict[str, Any] | None:
    """Be one of several processes of a training; give the manifest's payload on rank 0, None on the others.

    Rank 0 runs the stage as a single process does, and says whether there is something to train. The others train with
    it, and write to a directory that is thrown away.
    """
    from crqat_train import distributed
    from crqat_train.trainer import train as run_training

    # A process that died is started again by the same command, which is not to discard the state.
    restart = restart and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    with distributed.started(config.device):
        if distributed.rank() == 0:
            with lock.hold(runs / config.name), console.show_progress() as progress:
                began: list[bool] = []

                def begin() -> None:
                    began.append(distributed.from_first(True))

                directory = stages.train(config, runs, force, progress, restart, save_every, begin)
                if not began:
                    distributed.from_first(False)
            return read_manifest(directory).payload
        if distributed.from_first(False):
            with tempfile.TemporaryDirectory(prefix="crqat-") as out:
                run_training(recipe.train_config(config), Path(out), quiet, runs / config.name, save_every)
        return None
