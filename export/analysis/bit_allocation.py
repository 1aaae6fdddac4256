"""Allocates bit widths to layers: the exact minimum of the summed divergence for a given average bit width."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[import-untyped]

from crqat.core.errors import ToolError, UsageError
from crqat.export.analysis.bit_width_cost import LayerDivergence


def allocate(layers: Sequence[LayerDivergence], average_bits: float) -> dict[str, int]:
    """Return the bit width of each layer that minimizes the summed divergence, by a small integer program.

    The sum treats layers as independent of each other, which they are only roughly.

    Args:
        layers: Divergence of each layer at each bit width; all have the same bit widths.
        average_bits: The largest mean bit width over all weights of all layers.

    Raises:
        UsageError: Even the smallest bit widths are above the average.
        ToolError: The solver finds no solution.
    """
    widths = sorted(layers[0].divergence)
    if average_bits < widths[0]:
        msg = f"--average-bits {average_bits:g}: the smallest bit width is {widths[0]}; take at least that"
        raise UsageError(msg)
    cost = np.array([[layer.divergence[bits] for bits in widths] for layer in layers])
    weights = np.array([layer.weights for layer in layers], dtype=float)
    shares = weights / weights.sum()
    # Variables: one for each layer and bit width, of which a layer takes exactly one.
    one_each = np.kron(np.eye(len(layers)), np.ones(len(widths)))
    size = np.outer(shares, widths).ravel()
    outcome = milp(
        cost.ravel(),
        integrality=np.ones(cost.size),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size[None], ub=average_bits)],
        options={"mip_rel_gap": 0.0},
    )
    if outcome.x is None:
        msg = f"scipy's solver found no bit widths of {average_bits:g} on average: {outcome.message}"
        raise ToolError(msg)
    chosen = outcome.x.reshape(cost.shape).argmax(axis=1)
    return {layer.layer: widths[index] for layer, index in zip(layers, chosen, strict=True)}


def mean_bits(layers: Sequence[LayerDivergence], bits: dict[str, int]) -> float:
    """Return the mean bit width over all weights."""
    return sum(layer.weights * bits[layer.layer] for layer in layers) / sum(layer.weights for layer in layers)
