"""Compares integer codes that two computations of a quantized network give, and counts differing and wrong codes.

Two codes of the same value may differ if its floating-point result lies near a rounding tie. A comparison therefore
counts the codes that differ, and among these the wrong codes, which no correct computation gives. If a tensor has no
`Tie`, every differing code is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class Tie:
    """Values of a tensor before rounding, which show whether a code lies near a rounding tie.

    Attributes:
        before: Values divided by the scale, before rounding: float64, as many elements as the tensor.
        bound: Largest difference between two correct computations of `before`, in the same unit: one number, or one per
            code.
    """

    before: npt.NDArray[np.float64]
    bound: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """Counts of a comparison of codes.

    Attributes:
        codes: Number of codes compared.
        differing: Number of codes that differ.
        wrong: Number of differing codes that no correct computation gives.
        largest: Largest difference among the wrong codes, in codes.
        first_wrong: Name of the first tensor with a wrong code, empty if there is none.
        farthest_from_tie: Largest distance of a differing code's value from the tie, in codes; 0 without a `Tie`.
        farthest_in: Name of the tensor in which `farthest_from_tie` was found, empty if there is none.
    """

    codes: int
    differing: int
    wrong: int
    largest: int
    first_wrong: str
    farthest_from_tie: float
    farthest_in: str


def compare_codes(
    pairs: Mapping[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]], ties: Mapping[str, Tie] | None = None
) -> Comparison:
    """Compare tensors of integer codes, and count the codes that differ and those that are wrong.

    Args:
        pairs: Maps each tensor's name to (expected codes, codes to check), integer arrays with as many elements.
        ties: `Tie` of each tensor whose codes may differ near a rounding tie, by tensor name. A differing code is then
            correct if its value before rounding is at most `bound` beyond the tie, and it differs by at most one, or by
            at most `bound` rounded up if that is more.

    Raises:
        ValueError: The arrays of a pair differ in their number of elements.
    """
    import numpy as np

    codes = differing = wrong = largest = 0
    first_wrong = farthest_in = ""
    farthest = 0.0
    for name, (expected, judged) in pairs.items():
        if expected.size != judged.size:
            msg = f"{name}: expected {expected.size} codes, got {judged.size}"
            raise ValueError(msg)
        codes += expected.size
        expected, judged = expected.reshape(-1), judged.reshape(-1)
        different = expected != judged
        if not different.any():
            continue
        other = judged[different].astype(np.int64)
        steps = np.abs(expected[different].astype(np.int64) - other)
        bad = np.ones(steps.shape, bool)
        tie = (ties or {}).get(name)
        if tie is not None:
            allowed = tie.bound.reshape(-1)[different] if tie.bound.size > 1 else tie.bound.reshape(-1)
            # A code that differs by one lies half a code plus the distance from the tie away.
            distance = np.abs(other - tie.before.reshape(-1)[different]) - 0.5
            bad = ~((distance <= allowed) & (steps <= np.maximum(1, np.ceil(allowed))))
            if float(distance.max()) > farthest:
                farthest, farthest_in = float(distance.max()), name
        differing += len(steps)
        wrong += int(bad.sum())
        largest = max(largest, int(steps[bad].max(initial=0)))
        if bad.any():
            first_wrong = first_wrong or name
    return Comparison(codes, differing, wrong, largest, first_wrong, farthest, farthest_in)
