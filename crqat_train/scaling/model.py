"""Predicts how CR-QAT training scales under data parallelism: a formula of the step time and the fit of its constants.

    step(P)       = max(compute + all-reduce, data)
    compute       = a + b ceil(B / P)                              B images a step in all, P processes
    all-reduce    = 2 (P - 1) latency + 2 (P - 1) / P G / bandwidth    G bytes of gradients around a ring
    data          = share ceil(B / P) D / rate                     D bytes an image, `share` processes on one source

DistributedDataParallel overlaps the all-reduce with the backward pass if there is more than one bucket of gradients, so
the formula is then an upper bound. Nothing is assumed: each constant is measured, counted, or given by the user.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls  # type: ignore[import-untyped]

_SMALLEST_DEFAULT = 4  # images per process; smaller sizes must be requested by the user
_MOST_MACHINES = 8


@dataclass(frozen=True)
class Link:
    """Speed of a network link over which processes all-reduce gradients in a ring.

    Attributes:
        latency: Seconds that each step of the ring takes in addition to the transfer of data.
        bandwidth: Bytes per second that one process sends.
    """

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Constants:
    """Constants of the step time formula.

    Attributes:
        batch: Images in a step, over all processes.
        gradient_bytes: Bytes of the gradients of all trained parameters.
        image_bytes: Bytes that the source delivers for one image of a step.
        step_seconds: a, the constant part of a step, independent of the batch.
        image_seconds: b, the time that each image of a process adds.
        data_rate: Bytes per second of the recipe's source.
        holds: Number of processes that one machine like this one can run.
        local: Link between processes of one machine; None if it was not measured.
        between: Link between machines; None if it was not given.
    """

    batch: int
    gradient_bytes: int
    image_bytes: int
    step_seconds: float
    image_seconds: float
    data_rate: float
    holds: int
    local: Link | None
    between: Link | None


def all_reduce_terms(processes: int, size: float) -> tuple[float, float]:
    """Return the cost of a ring all-reduce of `size` bytes: steps, and bytes that each process sends."""
    return 2.0 * (processes - 1), 2.0 * (processes - 1) / processes * size


def predict(constants: Constants, processes: int) -> dict[str, Any]:
    """Predict step time and throughput for a number of processes.

    Args:
        constants: Constants of a machine and a recipe.
        processes: Number of processes, P.

    Returns:
        Seconds of the parts and of the step, images per second, efficiency (speed-up over P, in 0..1) and the limiting
        part; or, where these cannot be predicted, the reason under "not_predicted".
    """
    row: dict[str, Any] = {"processes": processes, "machines": math.ceil(processes / constants.holds)}
    link = constants.local if row["machines"] == 1 else constants.between
    if processes > 1 and link is None:
        where = "on one machine was not measured" if row["machines"] == 1 else "between machines was not given"
        return {**row, "not_predicted": f"the link {where}; see --bandwidth and --latency"}
    local = math.ceil(constants.batch / processes)
    compute = constants.step_seconds + constants.image_seconds * local
    steps, sent = all_reduce_terms(processes, constants.gradient_bytes)
    exchange = 0.0 if link is None or processes == 1 else steps * link.latency + sent / link.bandwidth
    share = min(processes, constants.holds)
    data = share * local * constants.image_bytes / constants.data_rate
    step = max(compute + exchange, data)
    alone = step if processes == 1 else predict(constants, 1)["step_seconds"]
    return {
        **row,
        "local_batch": local,
        "compute_seconds": compute,
        "all_reduce_seconds": exchange,
        "data_seconds": data,
        "step_seconds": step,
        "images_per_second": constants.batch / step,
        "efficiency": alone / (processes * step),
        "limit": "data" if data > compute + exchange else "all-reduce" if exchange > compute else "compute",
    }


def fit(terms: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[float, ...]:
    """Return the non-negative constants c of `seconds = terms @ c` with the least squares of relative errors.

    Args:
        terms: One row for each measured time.
        seconds: The measured times, above 0.
    """
    times = np.asarray(seconds)
    rows = np.asarray(terms) / times[:, None]
    # Normalize the columns: a byte and a second are orders of magnitude apart.
    scale = rows.max(axis=0)
    solution, _ = nnls(rows / scale, np.ones(len(times)))
    return tuple(float(value) for value in solution / scale)


def quartiles(values: Sequence[float]) -> dict[str, Any]:
    """Return the "median", both "quartiles" and the number "n" of some values."""
    low, middle, high = (float(value) for value in np.percentile(values, [25, 50, 75]))
    return {"median": middle, "quartiles": [low, high], "n": len(values)}


def fit_rounds(terms: Sequence[Sequence[float]], rounds: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """Fit constants to times that were measured repeatedly; a round is one repetition of all measurements.

    The values come from a fit to the medians over the rounds, their quartiles from fits to the single rounds.

    Args:
        terms: See `fit`.
        rounds: For each row of `terms`, the seconds measured in each round.

    Returns:
        For each constant, its "value", its "quartiles" and the number of rounds "n".
    """
    values = fit(terms, [float(np.median(seconds)) for seconds in rounds])
    single = [fit(terms, seconds) for seconds in zip(*rounds, strict=True)]
    return [
        {"value": value, "quartiles": quartiles(column)["quartiles"], "n": len(column)}
        for value, column in zip(values, zip(*single, strict=True), strict=True)
    ]


def default_processes(holds: int, batch: int, between: bool) -> list[int]:
    """Return the numbers of processes to predict by default: powers of two on one machine.

    With a link `between` machines, 2, 4 and 8 full machines of `holds` processes are added. Numbers that do not divide
    the batch, or leave too few images for each process, are left out.
    """
    numbers = [2**power for power in range(holds.bit_length()) if 2**power <= holds]
    if between:
        machines = [2**power for power in range(1, _MOST_MACHINES.bit_length())]
        numbers += [holds * number for number in machines]
    return [
        number for number in numbers if number == 1 or (batch % number == 0 and batch / number >= _SMALLEST_DEFAULT)
    ]


def local_batches(batch: int, processes: Sequence[int]) -> list[int]:
    """Return the numbers of images per process for which a training step is timed, in ascending order.

    These numbers are one process's share of the batch when the largest number of processes runs, the whole batch, and
    one number between the two.
    """
    smallest = math.ceil(batch / max(processes)) if max(processes) > 1 else math.ceil(batch / 2)
    if batch == 1:
        return [1, 2]
    return sorted({smallest, round(math.sqrt(smallest * batch)), batch})
