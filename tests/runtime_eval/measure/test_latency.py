from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom  # type: ignore[import-untyped]

from crqat.runtime_eval.config import BenchmarkConfig
from crqat.runtime_eval.measure.latency import compare, median_interval, summarize


def test_summarize_gives_milliseconds() -> None:
    rounds = [[0.001, 0.002, 0.003]] * 30
    result = summarize(rounds, threads=2)
    assert result.n == 90
    assert result.rounds == 30
    assert result.threads == 2
    assert (result.p50_ms, result.p90_ms, result.min_ms) == pytest.approx((2.0, 3.0, 1.0))
    assert result.cv == pytest.approx(np.std([1, 2, 3] * 30, ddof=1) / 2)
    assert result.unstable is False


@pytest.mark.parametrize(
    ("n", "p90", "p99"), [(63, False, False), (64, True, False), (661, True, False), (662, True, True)]
)
def test_a_percentile_needs_enough_samples(n: int, p90: bool, p99: bool) -> None:
    result = summarize([[0.001] * n], threads=1)
    assert (result.p90_ms is not None, result.p99_ms is not None) == (p90, p99)


def test_what_the_machine_says_makes_a_steady_latency_unstable() -> None:
    steady, drifting = [[0.001] * 9] * 10, [[0.001 * (1 + 0.05 * turn)] * 9 for turn in range(10)]
    assert summarize(steady, 1, disturbance="clocks not locked").unstable == "clocks not locked"
    assert str(summarize(drifting, 1, disturbance="clocks not locked").unstable).startswith(
        "clocks not locked; the middle"
    )


def test_the_devices_computation_is_told_apart() -> None:
    assert summarize([[0.002] * 3], 1).compute_p50_ms is None
    assert summarize([[0.002] * 3], 1, [0.001, 0.0015, 0.009]).compute_p50_ms == pytest.approx(1.5)


def test_a_drifting_clock_is_unstable_and_a_single_slow_inference_or_round_is_not() -> None:
    drifting = [[0.001 * (1 + 0.05 * turn)] * 9 for turn in range(10)]
    # The quartiles of 1, 1.05 .. 1.45 are 1.1125 and 1.3375, their median is 1.225.
    assert "10 rounds spreads by 18.4%" in str(summarize(drifting, threads=1).unstable)
    interrupted = [[0.001] * 8 + [0.1]] * 9 + [[0.002] * 9]
    result = summarize(interrupted, threads=1)
    assert result.unstable is False
    assert result.cv is not None and result.cv > 1
    assert result.cv_rounds == pytest.approx(np.std([1] * 9 + [2], ddof=1) / 1.1)


@pytest.mark.parametrize("n", range(1, 40))
def test_median_interval_is_the_narrowest_that_keeps_95_percent(n: int) -> None:
    low, high, coverage = median_interval([float(value) for value in np.random.default_rng(n).permutation(n)])
    j = int(low) + 1
    assert high == n - j
    assert coverage == pytest.approx(1 - 2 * binom.cdf(j - 1, n, 0.5))
    assert coverage >= 0.95 or (n < 6 and j == 1)
    assert 1 - 2 * binom.cdf(j, n, 0.5) < 0.95


def test_the_default_and_the_smallest_number_of_rounds_reach_95_percent() -> None:
    assert median_interval([0.0] * BenchmarkConfig.latency_rounds)[2] == pytest.approx(0.978515625)
    assert median_interval([0.0] * 6)[2] == pytest.approx(0.96875)


def test_the_ratio_is_paired_by_round() -> None:
    # Both models slow down together; each round still says 0.5.
    base = [[0.002 * factor] * 3 for factor in (1, 1.5, 2, 3, 1, 4)]
    fast = [[0.001 * factor] * 5 for factor in (1, 1.5, 2, 3, 1, 4)]
    result = compare(base, fast)
    assert result.latency_ratio == pytest.approx(0.5)
    assert result.latency_ratio_interval == pytest.approx([0.5, 0.5])
    assert result.latency_ratio_coverage == pytest.approx(0.96875)


def test_engines_that_differ_are_no_unstable_machine() -> None:
    rounds = [[0.001 * (1 + 0.08 * (number % 3))] * 5 for number in range(10)]
    assert "spreads by" in str(summarize(rounds, 1).unstable)
    assert summarize(rounds, 1, builds=3).unstable is False
    restless = [[0.001 * (1 + 0.08 * (number % 3) + 0.1 * (number // 3))] * 5 for number in range(10)]
    assert "spreads by" in str(summarize(restless, 1, builds=3).unstable)
