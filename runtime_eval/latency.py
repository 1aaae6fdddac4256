"""Latency: models take turns in rounds, so that a machine that speeds up or slows down does so for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

# Fewest samples behind a percentile: below these MLPerf's early stopping rule (99 % confidence) gives no estimate.
P90_SAMPLES = 64
P99_SAMPLES = 662
# Medians of rounds are steady to about 1 % on an idle machine at a fixed clock. Where they spread by more than this,
# a clock or another process moved them, and a difference of a few percent means nothing.
UNSTABLE_CV = 0.05


def _cv(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / np.mean(values)) if len(values) > 1 else 0.0


def summarize(rounds: Sequence[Sequence[float]], threads: int) -> dict[str, Any]:
    """Statistics of one model's inferences at batch 1.

    Args:
        rounds: Seconds of each inference, by round; no round is empty.
        threads: What one inference may use; recorded.

    Returns:
        Milliseconds; a percentile is None if there are too few samples for it. `cv` is the coefficient of variation
        of all samples, `cv_rounds` that of the rounds' medians, which decides whether the model is `unstable`.
    """
    samples = np.concatenate([np.asarray(samples) for samples in rounds]) * 1e3
    medians = [float(np.median(samples)) * 1e3 for samples in rounds]
    cv_rounds = _cv(medians)
    reason = f"the medians of {len(rounds)} rounds vary by {cv_rounds:.1%} (more than {UNSTABLE_CV:.0%})"
    p50, p90, p99 = (float(value) for value in np.percentile(samples, [50, 90, 99]))
    return {
        "status": "measured",
        "batch": 1,
        "threads": threads,
        "n": len(samples),
        "p50_ms": p50,
        "p90_ms": p90 if len(samples) >= P90_SAMPLES else None,
        "p99_ms": p99 if len(samples) >= P99_SAMPLES else None,
        "min_ms": float(samples.min()),
        "cv": _cv(samples.tolist()),
        "cv_rounds": cv_rounds,
        "rounds": len(rounds),
        "round_p50_ms": medians,
        "unstable": reason if cv_rounds > UNSTABLE_CV else False,
    }


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Distribution-free interval of the median: lower bound, upper bound, and its actual two-sided coverage.

    The j-th smallest and the j-th largest of n values miss the median with probability 2 P(Binomial(n, 1/2) < j); the
    largest j is taken that keeps 95 %, or the whole range where even that has less (n < 6).
    """
    ordered, n = sorted(values), len(values)

    def miss(j: int) -> float:
        return sum(math.comb(n, i) for i in range(j)) / 2.0 ** (n - 1)

    j = 1
    while miss(j + 1) <= 0.05:
        j += 1
    return ordered[j - 1], ordered[n - j], 1 - miss(j)


def compare(float_rounds: Sequence[Sequence[float]], rounds: Sequence[Sequence[float]]) -> dict[str, Any]:
    """A model's latency relative to its float original's, from the ratios of the medians of each round.

    Args:
        float_rounds: Seconds of each inference of the float model, by round.
        rounds: The same rounds of the other model.
    """
    ratios = [float(np.median(b) / np.median(a)) for a, b in zip(float_rounds, rounds, strict=True)]
    low, high, coverage = median_interval(ratios)
    return {
        "latency_ratio": float(np.median(ratios)),
        "latency_ratio_interval": [low, high],
        "latency_ratio_coverage": coverage,
    }
