from __future__ import annotations

import numpy as np
import pytest

from crqat.core.compare_codes import Tie, compare_codes


def test_without_ties_every_differing_code_is_wrong() -> None:
    same = np.arange(6, dtype=np.uint8).reshape(2, 3)
    other = same.copy()
    other[1, 0], other[1, 2] = 0, 6
    counted = compare_codes({"a": (same, same.reshape(-1)), "b": (same, other)})
    assert (counted.codes, counted.differing, counted.wrong) == (12, 2, 2)
    assert (counted.first_wrong, counted.largest) == ("b", 3)
    assert (counted.farthest_from_tie, counted.farthest_in) == (0.0, "")


@pytest.mark.parametrize(
    ("before", "expected", "judged", "bound", "wrong"),
    [
        (2.499, 2, 3, 0.01, 0),  # on the other side of a near tie
        (2.4, 2, 3, 0.01, 1),  # too far from the tie
        (2.499, 2, 1, 0.01, 1),  # near a tie, but not that one
        (2.499, 2, 4, 0.01, 1),  # more than one code
        (2.4, 2, 4, 1.2, 0),  # values that are known so badly leave two codes open
        (300.0, 255, 254, 0.01, 1),  # clipped: not near a tie at all
        (2.499, 2, 2, 0.0, 0),
    ],
)
def test_codes_may_differ_only_near_their_tie(
    before: float, expected: int, judged: int, bound: float, wrong: int
) -> None:
    tie = Tie(np.array([before]), np.array(bound))
    counted = compare_codes({"t": (np.array([expected]), np.array([judged]))}, {"t": tie})
    assert (counted.wrong, counted.differing) == (wrong, int(expected != judged))
    assert counted.first_wrong == ("t" if wrong else "")


def test_each_code_has_its_own_bound_and_the_farthest_is_shown() -> None:
    tie = Tie(np.array([[0.45, 0.45, 3.0]]), np.array([[0.1, 0.01, 0.0]]))
    counted = compare_codes({"t": (np.array([[0, 0, 3]]), np.array([1, 1, 3]))}, {"t": tie})
    assert (counted.differing, counted.wrong, counted.farthest_in) == (2, 1, "t")
    assert counted.farthest_from_tie == pytest.approx(0.05)


def test_unsigned_codes_do_not_wrap_around() -> None:
    counted = compare_codes({"t": (np.array([0], np.uint8), np.array([255], np.uint8))})
    assert counted.largest == 255


def test_tensors_of_other_sizes_are_an_error() -> None:
    with pytest.raises(ValueError, match="t: expected 3 codes, got 2"):
        compare_codes({"t": (np.zeros(3, int), np.zeros(2, int))})
