"""Which layer gets which bit width: within the size, and no better choice exists."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from crqat.core.errors import UsageError
from crqat.export.analysis.bit_allocation import allocate, mean_bits
from crqat.export.analysis.bit_width_cost import LayerDivergence

WIDTHS = (2, 4, 8)


def layers(seed: int, count: int = 6) -> list[LayerDivergence]:
    """Random costs, not even decreasing with the width."""
    generator = np.random.default_rng(seed)
    return [
        LayerDivergence(
            f"layer{number}",
            int(generator.integers(10, 10_000)),
            dict(zip(WIDTHS, generator.exponential(size=3).tolist(), strict=True)),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("average", [2.0, 2.7, 4.0, 5.5, 8.0])
def test_it_is_the_best_of_all_choices(seed: int, average: float) -> None:
    rows = layers(seed)
    names = [row.layer for row in rows]
    possible = [dict(zip(names, bits, strict=True)) for bits in itertools.product(WIDTHS, repeat=len(rows))]
    allowed = [bits for bits in possible if mean_bits(rows, bits) <= average]

    def cost(bits: dict[str, int]) -> float:
        return sum(row.divergence[bits[row.layer]] for row in rows)

    found = allocate(rows, average)
    assert mean_bits(rows, found) <= average + 1e-6
    assert cost(found) == pytest.approx(min(map(cost, allowed)), abs=1e-9)


def test_mean_bits_counts_weights() -> None:
    rows = [LayerDivergence("a", 100, {}), LayerDivergence("b", 300, {})]
    assert mean_bits(rows, {"a": 8, "b": 2}) == 3.5


def test_less_than_the_narrowest_width_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--average-bits 1.5: the smallest bit width is 2"):
        allocate(layers(0), 1.5)
