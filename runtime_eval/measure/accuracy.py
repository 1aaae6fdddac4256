"""Accuracy of a model, and its comparison with the float model image by image. Bounds are one-sided 95 %."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from crqat.core.results.benchmark import Accuracy, LatencyRatio, VersusFloat

# The 95 % point of the normal distribution. Both bounds together form a two-sided 90 % interval.
Z = 1.6448536269514722


def top_classes(logits: npt.NDArray[np.float32], count: int = 5) -> npt.NDArray[np.int64]:
    """Return the `count` largest classes of each row (or all), best first: [N, classes] to int64 [N, count].

    Equal logits, which INT8 models can have, are ordered by class number, as argmax orders them.
    """
    return np.argsort(-logits, axis=1, kind="stable")[:, :count].astype(np.int64)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Return Wilson's score bounds of a proportion (Wilson 1927, J. Am. Stat. Assoc. 22, 209), each one-sided 95 %."""
    center = (successes + Z**2 / 2) / (n + Z**2)
    half = Z / (n + Z**2) * math.sqrt(successes * (n - successes) / n + Z**2 / 4)
    # For 0 or n successes a bound is exactly 0 or 1; rounding must not change it.
    return 0.0 if successes == 0 else center - half, 1.0 if successes == n else center + half


def _tango_score(b: int, c: int, n: int, difference: float) -> float:
    """Return Tango's statistic for `difference` as the true difference; a larger `difference` gives less."""
    numerator = b - c - n * difference
    # q is P(only the second) at the likelihood's maximum under the hypothesis: 2n q^2 + linear q + constant = 0.
    linear = (2 * n - b + c) * difference - b - c
    constant = -c * difference * (1 - difference)
    root = math.sqrt(max(linear * linear - 8 * n * constant, 0.0))
    # The form of the larger root that does not subtract nearly equal numbers.
    q = -2 * constant / (root + linear) if linear > 0 else (root - linear) / (4 * n)
    variance = n * (2 * q + difference * (1 - difference))
    if variance <= 0:  # at the ends of the range, where the hypothesis allows no variation
        return math.copysign(math.inf, numerator) if numerator else 0.0
    return numerator / math.sqrt(variance)


def _crossing(score: Callable[[float], float], low: float, high: float, level: float) -> float:
    """Return the argument between `low` and `high` at which a falling function crosses `level`, by bisection."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if score(middle) > level else (low, middle)
    return middle


def tango(b: int, c: int, n: int) -> tuple[float, float]:
    """Return score bounds of the difference of two paired proportions, (b - c) / n, each one-sided 95 %.

    T. Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample design",
    Statistics in Medicine 17 (1998) 891, equations 24 to 26. Unlike Wald's bounds, they are valid for b = c = 0.

    Args:
        b: Number of pairs in which only the first succeeds.
        c: Number of pairs in which only the second succeeds.
        n: Number of all pairs, at least one.
    """
    observed = (b - c) / n

    def score(difference: float) -> float:
        return _tango_score(b, c, n, difference)

    return _crossing(score, -1.0, observed, Z), _crossing(score, observed, 1.0, -Z)


def _ratio_score(both: int, first: int, second: int, n: int, ratio: float) -> float:
    """Return the score statistic for `ratio`: the second succeeds `ratio` times as often as the first.

    A larger `ratio` gives a smaller statistic.
    """
    # At the likelihood's maximum under the hypothesis the pairs in which both fail keep their share; v is P(only the
    # first), the larger root of a v^2 + linear v + constant = 0, and u is P(both).
    share = (both + first + second) / n
    a = (1 + ratio) * n
    linear = (ratio * ratio - 1) * n * share - first - second * ratio * ratio
    constant = -first * (ratio - 1) * share
    v = (math.sqrt(max(linear * linear - 4 * a * constant, 0.0)) - linear) / (2 * a)
    u = (share - (1 + ratio) * v) / ratio
    variance = ratio * ((ratio - 1) * u + (1 + ratio) * v) / n
    numerator = (both + second - ratio * (both + first)) / n
    if variance <= 0:
        return math.copysign(math.inf, numerator) if numerator else 0.0
    return numerator / math.sqrt(variance)


def ratio_bounds(both: int, first: int, second: int, n: int) -> tuple[float, float]:
    """Return score bounds of the ratio of two paired proportions, (both + second) / (both + first), one-sided 95 %.

    J. Nam and W. Blackwelder, "Analysis of the ratio of marginal probabilities in a matched-pair setting", Statistics
    in Medicine 21 (2002) 689.

    Args:
        both: Number of pairs in which both succeed.
        first: Number of pairs in which only the first succeeds.
        second: Number of pairs in which only the second succeeds.
        n: Number of all pairs; the first succeeds in at least one.
    """
    observed = (both + second) / (both + first)

    def score(ratio: float) -> float:
        return _ratio_score(both, first, second, n, ratio)

    high = 2 * observed + 1
    while score(high) > -Z:
        high *= 2
    return _crossing(score, 1e-9, observed, Z) if observed > 0 else 0.0, _crossing(score, observed, high, -Z)


def images_for_ratio(both: int, first: int, second: int, n: int, limit: float) -> int | None:
    """Return how many pairs would suffice for `ratio_bounds` to exclude `limit`; None if no number would.

    Args:
        both: Number of pairs in which both succeed.
        first: Number of pairs in which only the first succeeds.
        second: Number of pairs in which only the second succeeds.
        n: Number of all pairs. More pairs are assumed to have the same shares of these outcomes.
        limit: Limit of the ratio (both + second) / (both + first).
    """
    if math.isclose((both + second) / (both + first), limit, abs_tol=1e-12):
        return None
    return max(1, math.ceil(n * (Z / _ratio_score(both, first, second, n, limit)) ** 2))


def images_for_share(share: float, limit: float) -> int | None:
    """Return how many images would suffice for Wilson's bounds of `share` to exclude `limit`; None if none would."""
    if math.isclose(share, limit, abs_tol=1e-12):
        return None
    return max(1, math.ceil(Z**2 * limit * (1 - limit) / (share - limit) ** 2))


def images_for_difference(b: int, c: int, n: int, limit: float) -> int | None:
    """Return how many pairs would suffice for Tango's bounds to exclude `limit`; None if no number would.

    More pairs are assumed to have the same shares of outcomes. The score statistic then grows with the square root of
    their number, and `limit` is excluded where the statistic reaches its 95 % point.

    Args:
        b: Number of pairs in which only the first succeeds.
        c: Number of pairs in which only the second succeeds.
        n: Number of all pairs, at least one.
        limit: Limit of the difference (b - c) / n.
    """
    if math.isclose((b - c) / n, limit, abs_tol=1e-12):
        return None
    score = _tango_score(b, c, n, limit)
    return max(1, math.ceil(n * (Z / score) ** 2))


def summarize(top: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> Accuracy:
    """Return a model's accuracy on all images.

    `chance` is the expected accuracy of the same predictions, each as often as the model makes it, assigned to the
    images at random (Cohen 1960, Educ. Psychol. Meas. 20, 37). For a model that always predicts one class it is that
    class's share.

    Args:
        top: Best classes of each image from `top_classes`, int64 [N, at most 5].
        labels: Class of each image, int64 [N].
    """
    hits = top == labels[:, None]
    right = int(hits[:, 0].sum())
    classes = int(max(top.max(), labels.max())) + 1
    answered, asked = (np.bincount(numbers, minlength=classes) / len(labels) for numbers in (top[:, 0], labels))
    return Accuracy(
        n=len(labels),
        top1=right / len(labels),
        top1_interval=wilson(right, len(labels)),
        top5=int(hits.any(axis=1).sum()) / len(labels),
        chance=float(answered @ asked),
    )


def compare(
    float_top: npt.NDArray[np.int64],
    top: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    size_ratio: float,
    ratio: LatencyRatio | None = None,
) -> VersusFloat:
    """Compare the accuracy, predictions, size and latency of a model with those of the float model, on the same images.

    Args:
        float_top: Best classes of each image by the float model, as in `summarize`.
        top: Best classes of each image by this model.
        labels: Class of each image, int64 [N].
        size_ratio: Size of this file divided by that of the float file.
        ratio: Latency of this model divided by that of the float model; None if the two were not timed in the same
            runtime.
    """
    float_right, right = float_top[:, 0] == labels, top[:, 0] == labels
    n, same = len(labels), int((float_top[:, 0] == top[:, 0]).sum())
    only_float, only_this = int((float_right & ~right).sum()), int((~float_right & right).sum())
    low, high = tango(only_float, only_this, n)
    return VersusFloat(
        both_right=int((float_right & right).sum()),
        only_float_right=only_float,
        only_this_right=only_this,
        both_wrong=int((~float_right & ~right).sum()),
        drop_points=100 * (only_float - only_this) / n,
        drop_interval_points=(100 * low, 100 * high),
        agreement=same / n,
        agreement_interval=wilson(same, n),
        size_ratio=size_ratio,
        latency_ratio=None if ratio is None else ratio.latency_ratio,
        latency_ratio_interval=None if ratio is None else ratio.latency_ratio_interval,
        latency_ratio_coverage=None if ratio is None else ratio.latency_ratio_coverage,
    )
