"""Measures the constants of the step time formula in separate processes, and predicts from them."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from crqat.core.errors import ToolError, UsageError
from crqat.core.progress import Progress
from crqat.train.config import TrainConfig
from crqat.train.scaling.model import (
    Constants,
    Link,
    all_reduce_terms,
    fit_rounds,
    predict,
    quartiles,
)

SCHEMA_VERSION = 1
_PACKAGES = Path(__file__).parents[3]
# Time limit in seconds for one group of processes, including compilation: longer is a hang.
TIME_LIMIT = 1800.0


def measure(config: TrainConfig, processes: Sequence[int], between: Link | None, progress: Progress) -> dict[str, Any]:
    """Measure the constants in separate processes and evaluate the formula.

    Args:
        config: The recipe; its `qat` and `consistency` sections define a step.
        processes: Numbers of processes to predict; empty takes `default_processes`.
        between: The link between machines, given by the user.
        progress: Reports the current measurement.

    Returns:
        JSON: constants with spread and n, `predictions`, and `check`, which compares one prediction with this machine.

    Raises:
        UsageError: The recipe trains nothing or does not fit its data, or there are more processes than images.
        ToolError: A process died or took too long.
    """
    if config.qat.epochs == 0:
        msg = "qat.epochs: 0 trains nothing, so there is no step to measure; use --set qat.epochs=1"
        raise UsageError(msg)
    holds, threads = _machine(config.device)
    job = {
        "config": asdict(config),
        "holds": holds,
        "processes": list(processes),
        "between": between is not None,
    }
    progress("measuring", 0, 2, "training steps of one process, and the speed of its data source")
    alone = _run_processes(1, job, threads)
    asked = alone["processes"]
    world = max([number for number in asked if number <= holds], default=1)
    group = None
    if world > 1:
        progress("measuring", 1, 2, f"all-reduce and training steps of {world} processes")
        group = _run_processes(world, job, threads)
    progress("measuring", 2, 2)
    return assemble(alone, group, world, holds, threads, between)


def assemble(
    alone: Mapping[str, Any],
    group: Mapping[str, Any] | None,
    world: int,
    holds: int,
    threads: int,
    between: Link | None,
) -> dict[str, Any]:
    """Combine the measurements of the worker processes into the result of `measure`.

    Args:
        alone: Measurements of one process; see `crqat.train.scaling.worker`.
        group: Measurements of `world` processes at once; None if this machine runs only one.
        world: Number of processes in the group.
        holds: Number of processes that this machine can run.
        threads: Number of threads of each process.
        between: The link between machines, if it was given.

    Raises:
        ToolError: The bandwidth cannot be computed, because an all-reduce of more bytes took no longer than one of
            fewer bytes.
    """
    points = alone["compute"]
    step, image = fit_rounds([(1.0, point["local_batch"]) for point in points], [p["seconds"] for p in points])
    rate = quartiles([size / seconds for size, seconds in alone["data"]])
    constants: dict[str, Any] = {
        "batch": alone["batch"],
        "gradient_bytes": alone["gradient_bytes"],
        "image_bytes": alone["image_bytes"],
        "holds": holds,
        "step_seconds": step,
        "image_seconds": image,
        "data_rate": {"value": rate["median"], "quartiles": rate["quartiles"], "n": rate["n"]},
        "local": None,
        "between": None if between is None else {**asdict(between), "source": "given by the user, not measured"},
    }
    local = None
    measured: dict[str, Any] = {
        "compute": [{"local_batch": point["local_batch"], **quartiles(point["seconds"])} for point in points]
    }
    if group is not None:
        terms = [all_reduce_terms(world, point["bytes"]) for point in group["all_reduce"]]
        latency, per_byte = fit_rounds(terms, [point["seconds"] for point in group["all_reduce"]])
        if per_byte["value"] == 0:
            msg = (
                "an all-reduce of more bytes took no longer than one of fewer bytes, so this machine is busy with "
                "other work; try again"
            )
            raise ToolError(msg)
        local = Link(latency["value"], 1 / per_byte["value"])
        constants["local"] = {"latency": latency, "bandwidth": _inverse(per_byte), "processes": world}
        measured["all_reduce"] = [
            {"bytes": point["bytes"], **quartiles(point["seconds"])} for point in group["all_reduce"]
        ]
    filled = Constants(
        batch=alone["batch"],
        gradient_bytes=alone["gradient_bytes"],
        image_bytes=alone["image_bytes"],
        step_seconds=step["value"],
        image_seconds=image["value"],
        data_rate=rate["median"],
        holds=holds,
        local=local,
        between=between,
    )
    check: dict[str, Any] = {"status": f"not run: this machine holds {holds} process{'es' * (holds > 1)}"}
    if group is not None:
        predicted, real = predict(filled, world), quartiles(group["step"])
        check = {
            "status": "measured",
            "processes": world,
            "predicted_seconds": predicted["step_seconds"],
            "measured_seconds": real,
            "measured_to_predicted": real["median"] / predicted["step_seconds"],
            # The formula assumes that processes on one machine do not slow each other down; this checks it.
            "predicted_compute_seconds": predicted["compute_seconds"],
            "measured_compute_seconds": quartiles(group["compute"]),
        }
    return {
        "schema_version": SCHEMA_VERSION,
        "device": alone["device"],
        "backend": None if group is None else group["backend"],
        "compiled": alone["compiled"],
        "threads": threads,
        "constants": constants,
        "measured": measured,
        "predictions": [predict(filled, number) for number in alone["processes"]],
        "check": check,
    }


def _inverse(constant: Mapping[str, Any]) -> dict[str, Any]:
    """Return 1 / a fitted constant and its quartiles; None in place of a quartile where the constant's is 0."""
    low, high = constant["quartiles"]
    ends = [1 / high if high else None, 1 / low if low else None]
    return {"value": 1 / constant["value"], "quartiles": ends, "n": constant["n"]}


def _machine(device: str) -> tuple[int, int]:
    """Return how many processes this machine can run, and the threads of each.

    A machine can run one process for each CUDA device; on the CPU, as many processes as fit on its cores with
    OMP_NUM_THREADS threads each (1 if the variable is not set, as under torchrun).
    """
    import torch

    # OpenMP's list for nested regions begins with the number that counts; other values are ignored.
    given = re.match(r"\s*0*([1-9]\d*)\s*(,|$)", os.environ.get("OMP_NUM_THREADS", ""))
    threads = 1 if given is None else int(given[1])
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.device_count(), threads
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // threads), threads


def _run_processes(world: int, job: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """Run `crqat.train.scaling.worker` as `world` processes and return rank 0's measurements."""
    path = os.pathsep.join([str(_PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])])
    # No file in the current folder may shadow a library; Python 3.10 does not know the variable.
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": str(threads)}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all of them are here; a host's name may not resolve
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps({**job, "world": world}))
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(world):
                command = [sys.executable, "-m", "crqat.train.scaling.worker", str(folder), str(rank)]
                own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                with (folder / f"{rank}.log").open("wb") as log:
                    ranks.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=own))
            _wait(ranks, folder)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        result: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return result


def _wait(ranks: Sequence[subprocess.Popen[bytes]], folder: Path) -> None:
    """Wait until all processes have succeeded, or until one fails.

    Raises:
        UsageError: The first failing process reported an error in the recipe.
        ToolError: A process failed in another way, or the time limit is exceeded.
    """
    end = time.monotonic() + TIME_LIMIT
    while any(process.poll() is None for process in ranks):
        if time.monotonic() > end:
            msg = (
                f"the measurement of {len(ranks)} processes takes longer than {TIME_LIMIT:.0f} s; measure a smaller "
                "network or batch"
            )
            raise ToolError(msg)
        if any(process.poll() for process in ranks):
            break
        time.sleep(0.05)
    # One process reports an error; the others end because of it.
    for said in sorted(folder.glob("*.error.json")):
        error = json.loads(said.read_text())
        raise (UsageError if error["usage"] else ToolError)(error["text"])
    for rank, process in enumerate(ranks):
        if process.poll():
            lines = (folder / f"{rank}.log").read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            msg = f"process {rank} of {len(ranks)} ended with {process.returncode}: {lines[-1]}"
            raise ToolError(msg)
