from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import brentq, minimize_scalar  # type: ignore[import-untyped]
from scipy.stats import norm  # type: ignore[import-untyped]

from crqat.runtime_eval.measure.accuracy import (
    Z,
    compare,
    images_for_difference,
    images_for_ratio,
    images_for_share,
    ratio_bounds,
    summarize,
    tango,
    top_classes,
    wilson,
)


def test_top_classes_breaks_ties_by_class_number() -> None:
    logits = np.array([[1, 3, 3, 0, 3, 2, 2], [0, 0, 0, 0, 0, 0, 0]], dtype=np.float32)
    assert top_classes(logits).tolist() == [[1, 2, 4, 5, 6], [0, 1, 2, 3, 4]]
    # As many classes as ImageNet has: numpy sorts short rows stably whatever it is told.
    many = np.random.default_rng(0).integers(0, 4, (50, 1000)).astype(np.float32)
    expected = [sorted(range(1000), key=lambda c, row=row: (-row[c], c))[:5] for row in many.tolist()]  # type: ignore[misc]
    assert top_classes(many).tolist() == expected
    assert (top_classes(many)[:, 0] == many.argmax(axis=1)).all()


def test_top_classes_takes_all_if_there_are_fewer_than_five() -> None:
    assert top_classes(np.array([[0.0, 2.0, 1.0]], dtype=np.float32)).tolist() == [[1, 2, 0]]


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (10, 10), (9990, 10000), (1, 1)])
def test_wilson_inverts_the_score_test(successes: int, n: int) -> None:
    low, high = wilson(successes, n)
    for bound, inside in ((low, successes > 0), (high, successes < n)):
        if inside:
            assert abs(successes - n * bound) / math.sqrt(n * bound * (1 - bound)) == pytest.approx(norm.ppf(0.95))
        else:
            assert bound == successes / n


def at_level(b: int, c: int, n: int, z: float, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    monkeypatch.setattr("crqat.runtime_eval.measure.accuracy.Z", z)
    return tango(b, c, n)


def test_tango_gives_the_published_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tango 1998, section 6.1 (soft contact lenses): 90 % lower limit of a new-only 0, standard-only 1, n 44.
    assert tango(0, 1, 44)[0] == pytest.approx(-0.096, abs=5e-4)
    # R: PropCIs::scoreci.mp(41, 48, 549, conf.level = 0.90), as printed in points.
    assert tango(48, 41, 549) == pytest.approx((-0.0157, 0.0414), abs=5e-5)
    # R: contingencytables' test of cavo_2012, rbind(c(59, 6), c(16, 80)), at 95 %.
    z = float(norm.ppf(0.975))
    assert at_level(6, 16, 161, z, monkeypatch) == pytest.approx((-0.1240, -0.0054), abs=5e-5)
    # R: PropCIs::scoreci.mp(60, 20, 1000, conf.level = 0.95), whose difference is the second less the first.
    assert at_level(20, 60, 1000, z, monkeypatch) == pytest.approx((-0.0584, -0.0231), abs=5e-5)


def brute_force(b: int, c: int, n: int) -> tuple[float, float]:
    """Tango's bounds from the definition: maximize the likelihood numerically under each hypothesis."""

    def score(difference: float) -> float:
        def loss(q: float) -> float:
            cells = ((b, q + difference), (c, q), (n - b - c, 1 - 2 * q - difference))
            return -sum(count * math.log(max(p, 1e-300)) for count, p in cells if count)

        low, high = max(0.0, -difference), (1 - difference) / 2
        q = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-13}).x
        return float((b - c - n * difference) / math.sqrt(n * (2 * q + difference - difference**2)))

    observed = (b - c) / n
    edge = 1e-9
    low = -1.0 if observed == -1 else brentq(lambda d: score(d) - Z, -1 + edge, observed - edge)
    high = 1.0 if observed == 1 else brentq(lambda d: score(d) + Z, observed + edge, 1 - edge)
    return low, high


@pytest.mark.parametrize(
    ("b", "c", "n"),
    [
        (3, 1, 10),
        (1, 3, 10),
        (0, 4, 12),
        (5, 0, 797),
        (9, 6, 797),
        (2, 1, 3),
        (30, 30, 60),
        (120, 80, 10000),
        (0, 1, 2),
    ],
)
def test_tango_is_the_score_test_at_the_constrained_likelihood(b: int, c: int, n: int) -> None:
    assert tango(b, c, n) == pytest.approx(brute_force(b, c, n), abs=1e-5)


@pytest.mark.parametrize("n", [1, 2, 797, 1_000_000])
def test_tango_without_a_discordant_pair_has_a_closed_form(n: int) -> None:
    bound = Z**2 / (n + Z**2)
    assert tango(0, 0, n) == pytest.approx((-bound, bound), rel=1e-9)


@pytest.mark.parametrize("n", [1, 5, 100])
def test_tango_with_all_pairs_discordant_in_one_direction(n: int) -> None:
    low, high = tango(n, 0, n)
    assert high == 1.0
    # The likelihood is largest where no pair is concordant, q = (1 - d) / 2: n (1 - d) = Z sqrt(n (1 - d^2)).
    assert low == pytest.approx((n - Z**2) / (n + Z**2), rel=1e-9)


@pytest.mark.parametrize(("b", "c", "n"), [(0, 0, 1), (7, 2, 50), (50, 0, 50), (25, 25, 50), (400, 3, 10**6)])
def test_tango_is_antisymmetric_and_holds_the_observed_difference(b: int, c: int, n: int) -> None:
    low, high = tango(b, c, n)
    assert -1 <= low <= (b - c) / n <= high <= 1
    assert tango(c, b, n) == pytest.approx((-high, -low), abs=1e-12)


def test_tango_covers_the_true_difference_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    b_share, c_share, n = 0.03, 0.02, 800
    counts = rng.multinomial(n, [b_share, c_share, 1 - b_share - c_share], size=2000)
    bounds = np.array([tango(int(b), int(c), n) for b, c, _ in counts])
    # 2000 draws of 0.95 have a standard deviation of 0.005.
    assert np.mean(bounds[:, 0] <= b_share - c_share) == pytest.approx(0.95, abs=0.015)
    assert np.mean(bounds[:, 1] >= b_share - c_share) == pytest.approx(0.95, abs=0.015)


def numeric_ratio_bounds(both: int, first: int, second: int, n: int) -> tuple[float, float]:
    """The bounds from the definition: maximize the likelihood numerically under each hypothesis."""

    def score(ratio: float) -> float:
        def loss(only: float) -> tuple[float, float, float]:
            # For each P(only the first) the best P(both), by the same search inside.
            def inner(u: float) -> float:
                cells = ((both, u), (first, only), (second, (ratio - 1) * u + ratio * only))
                rest = 1 - ratio * u - (1 + ratio) * only
                return -sum(k * math.log(max(p, 1e-300)) for k, p in (*cells, (n - both - first - second, rest)) if k)

            high = (1 - (1 + ratio) * only) / ratio
            low = max(0.0, ratio * only / (1 - ratio)) if ratio < 1 else 0.0
            found = minimize_scalar(inner, bounds=(0.0, high if ratio >= 1 else min(high, low)), method="bounded",
                                    options={"xatol": 1e-14})  # fmt: skip
            return float(found.fun), float(found.x), only

        top = 1 / (1 + ratio)
        only = minimize_scalar(lambda v: loss(v)[0], bounds=(0.0, top), method="bounded", options={"xatol": 1e-14}).x
        u = loss(only)[1]
        variance = ratio * ((ratio - 1) * u + (1 + ratio) * only) / n
        return float(((both + second) - ratio * (both + first)) / n / math.sqrt(variance))

    observed = (both + second) / (both + first)
    low = brentq(lambda r: score(r) - Z, 0.2 * observed, observed - 1e-9)
    return low, brentq(lambda r: score(r) + Z, observed + 1e-9, 5 * observed)


@pytest.mark.parametrize("counts", [(700, 9, 6, 797), (6, 3, 1, 12), (90, 30, 10, 200), (9000, 120, 80, 10000)])
def test_ratio_bounds_are_the_score_test_at_the_constrained_likelihood(counts: tuple[int, int, int, int]) -> None:
    assert ratio_bounds(*counts) == pytest.approx(numeric_ratio_bounds(*counts), abs=2e-4)


def test_ratio_bounds_cover_the_true_ratio_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    shares, n = (0.88, 0.03, 0.02, 0.07), 800
    true = (shares[0] + shares[2]) / (shares[0] + shares[1])
    draws = rng.multinomial(n, shares, size=2000)
    bounds = np.array([ratio_bounds(int(both), int(first), int(second), n) for both, first, second, _ in draws])
    assert np.mean(bounds[:, 0] <= true) == pytest.approx(0.95, abs=0.015)
    assert np.mean(bounds[:, 1] >= true) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("counts", [(50, 0, 0, 60), (1, 0, 0, 1), (10, 5, 0, 20), (0, 5, 0, 20), (0, 3, 3, 6)])
def test_ratio_bounds_hold_what_was_seen_where_cells_are_empty(counts: tuple[int, int, int, int]) -> None:
    both, first, second, _ = counts
    low, high = ratio_bounds(*counts)
    assert 0 <= low <= (both + second) / (both + first) <= high < math.inf
    assert high > low


@pytest.mark.parametrize(("counts", "limit"), [((900, 14, 8, 1000), 0.99), ((900, 30, 5, 1000), 0.99)])
def test_so_many_pairs_decide_a_ratio_and_fewer_do_not(counts: tuple[int, int, int, int], limit: float) -> None:
    needed = images_for_ratio(*counts, limit)
    assert needed is not None

    def decided(pairs: float) -> bool:
        both, first, second, n = (count * pairs / 1000 for count in counts)
        low, high = ratio_bounds(both, first, second, n)  # type: ignore[arg-type]
        return not low <= limit <= high

    assert decided(1.001 * needed + 1) and not decided(0.999 * needed - 1)
    assert images_for_ratio(98, 2, 1, 200, 0.99) is None


def test_summarize_counts_top_1_and_top_5() -> None:
    top = np.array([[3, 1, 0, 2, 5], [3, 1, 0, 2, 5], [3, 1, 0, 2, 5], [9, 1, 0, 2, 5]])
    result = summarize(top, np.array([3, 5, 4, 9]))
    assert (result.n, result.top1, result.top5) == (4, 0.5, 0.75)
    assert result.top1_interval == wilson(2, 4)


def test_compare_makes_the_paired_table() -> None:
    labels = np.array([0, 0, 0, 0, 0, 0])
    float_top = np.array([[0], [0], [0], [1], [1], [2]])
    top = np.array([[0], [1], [2], [0], [1], [1]])
    result = compare(float_top, top, labels, 0.25)
    table = [result.both_right, result.only_float_right, result.only_this_right, result.both_wrong]
    assert table == [1, 2, 1, 2]
    assert result.drop_points == pytest.approx(100 / 6)
    assert result.drop_interval_points == pytest.approx([100 * bound for bound in tango(2, 1, 6)])
    # Images 0 and 4; the last one is wrong in both, but not in the same way.
    assert (result.agreement, result.agreement_interval) == (2 / 6, wilson(2, 6))


@pytest.mark.parametrize(("b", "c", "limit"), [(14, 8, 0.01), (30, 5, 0.01), (0, 0, 0.001), (5, 9, 0.0)])
def test_so_many_pairs_decide_and_fewer_do_not(b: int, c: int, limit: float) -> None:
    needed = images_for_difference(b, c, 1000, limit)
    assert needed is not None
    factor = 1000  # so that rounding of the counts to whole pairs does not matter
    exact = images_for_difference(b * factor, c * factor, 1000 * factor, limit)
    assert exact == needed

    def decided(pairs: float) -> bool:
        scaled = [count * pairs / 1000 for count in (b, c, 1000)]
        low, high = tango(*scaled)  # type: ignore[arg-type]
        return not low <= limit <= high

    assert decided(1.001 * needed)
    assert not decided(0.999 * needed - 1)
    assert images_for_difference(10, 0, 1000, 0.01) is None


@pytest.mark.parametrize(("share", "limit"), [(0.96, 0.95), (0.94, 0.95), (0.5, 0.51)])
def test_so_many_images_decide_a_share_and_fewer_do_not(share: float, limit: float) -> None:
    needed = images_for_share(share, limit)
    assert needed is not None
    for n, decided in ((math.ceil(1.01 * needed), True), (math.floor(0.99 * needed), False)):
        low, high = wilson(share * n, n)  # type: ignore[arg-type]
        assert (not low <= limit <= high) == decided
    assert images_for_share(0.95, 0.95) is None


def test_chance_is_what_the_same_answers_dealt_out_at_random_would_get() -> None:
    labels = np.array([0] * 90 + [1] * 10)
    always = np.zeros((100, 1), dtype=np.int64)
    assert summarize(always, labels).chance == pytest.approx(0.9)
    knows = labels[:, None].copy()
    assert summarize(knows, labels).chance == pytest.approx(0.82)
