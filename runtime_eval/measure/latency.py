"""Latency statistics. Models take turns in rounds, so that changes of the machine's speed affect all of them alike.

Each round measures in a new process. The addresses at which a process places its code and buffers change a short
latency by percents for the life of the process (Mytkowicz et al., "Producing wrong data without doing anything
obviously wrong!", ASPLOS 2009), which no number of samples from one process can show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from crqat.core.results.benchmark import MEASURED, Latency, LatencyRatio

# Fewest samples for a percentile: below these, MLPerf's early stopping rule (99 % confidence) gives no estimate.
P90_SAMPLES = 64
P99_SAMPLES = 662
# The middle half of the rounds' medians lies within 1 to 3 % on an undisturbed machine, even with new processes. A
# wider spread means that the clock or other work changed them. One disturbed round in ten does not count: the ratio, a
# median, does not follow it either.
UNSTABLE_SPREAD = 0.05


def _cv(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / np.mean(values)) if len(values) > 1 else 0.0


def summarize(
    rounds: Sequence[Sequence[float]],
    threads: int,
    computed: Sequence[float] = (),
    disturbance: str | None = None,
    builds: int = 1,
) -> Latency:
    """Return the statistics of one model's inferences at batch 1.

    Args:
        rounds: Seconds of each inference, by round; no round is empty.
        threads: Number of threads that one inference may use, for the record.
        computed: Seconds of the device's computation in each inference, if the runtime reports them.
        disturbance: Reason from the machine itself why the measurement is not reliable, if any.
        builds: Number of engines that took turns in the rounds. One file's engines differ in speed, which is no
            instability: for the spread, each round's median is divided by the median of its own engine's rounds.

    Returns:
        The statistics in milliseconds; a percentile is None if it has too few samples. `cv` is the coefficient of
        variation of all samples, `cv_rounds` that of the rounds' medians, `round_spread` the interquartile range of the
        rounds' medians divided by their median. The spread and a disturbance decide whether the model is `unstable`,
        which is False or the reason. `compute_p50_ms` is the median of the device's computation alone.
    """
    samples = np.concatenate([np.asarray(samples) for samples in rounds]) * 1e3
    medians = [float(np.median(samples)) * 1e3 for samples in rounds]
    own = [float(np.median(medians[number % builds :: builds])) for number in range(len(medians))]
    steady = [median / of_build for median, of_build in zip(medians, own, strict=True)]
    low, middle, high = (float(value) for value in np.percentile(steady, [25, 50, 75]))
    spread = (high - low) / middle
    moved = (
        f"the middle half of the medians of {len(rounds)} rounds spreads by {spread:.1%} "
        f"(more than {UNSTABLE_SPREAD:.0%})"
    )
    reasons = [reason for reason in (disturbance, moved if spread > UNSTABLE_SPREAD else None) if reason]
    p50, p90, p99 = (float(value) for value in np.percentile(samples, [50, 90, 99]))
    return Latency(
        status=MEASURED,
        batch=1,
        threads=threads,
        n=len(samples),
        p50_ms=p50,
        p90_ms=p90 if len(samples) >= P90_SAMPLES else None,
        p99_ms=p99 if len(samples) >= P99_SAMPLES else None,
        compute_p50_ms=float(np.median(computed)) * 1e3 if len(computed) else None,
        min_ms=float(samples.min()),
        cv=_cv(samples.tolist()),
        cv_rounds=_cv(medians),
        round_spread=spread,
        rounds=len(rounds),
        round_p50_ms=medians,
        unstable="; ".join(reasons) or False,
    )


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return a distribution-free confidence interval of the median: (lower bound, upper bound, two-sided coverage).

    The j-th smallest and the j-th largest of n values miss the median with probability 2 P(Binomial(n, 1/2) < j). The
    largest j with 95 % coverage is used, or the whole range if even that has less (n < 6).
    """
    ordered, n = sorted(values), len(values)

    def miss(j: int) -> float:
        return sum(math.comb(n, i) for i in range(j)) / 2.0 ** (n - 1)

    j = 1
    while miss(j + 1) <= 0.05:
        j += 1
    return ordered[j - 1], ordered[n - j], 1 - miss(j)


def compare(float_rounds: Sequence[Sequence[float]], rounds: Sequence[Sequence[float]]) -> LatencyRatio:
    """Return the ratio of a model's latency to that of the float model, from the ratio of their medians in each round.

    Args:
        float_rounds: Seconds of each inference of the float model, by round.
        rounds: Seconds of each inference of the other model, for the same rounds.
    """
    ratios = [float(np.median(b) / np.median(a)) for a, b in zip(float_rounds, rounds, strict=True)]
    low, high, coverage = median_interval(ratios)
    return LatencyRatio(float(np.median(ratios)), (low, high), coverage)
