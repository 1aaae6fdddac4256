"""Do these integer codes agree? One comparison for the export, for boards, for benchmarks and for tests.

Two codes of the same value may differ where floating point leaves the value on either side of a rounding tie. A
comparison therefore counts the codes that differ, and of those the wrong ones: those that no correct computation gives.
Without a `Tie` of its tensor every differing code is wrong.
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
    """How near a rounding tie the values of a tensor lie.

    Attributes:
        before: Values / scale before rounding, float64, of as many elements as the tensor.
        bound: How far apart, in codes, two correct computations of `before` can lie: one number, or one for each code.
    """

    before: npt.NDArray[np.float64]
    bound: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """What was counted.

    Attributes:
        codes: How many codes were compared.
        differing: How many of them differ.
        wrong: How many of these no correct computation gives.
        largest: The largest difference among the wrong ones, in codes.
        first_wrong: Name of the first tensor with a wrong code, empty if there is none.
        farthest_from_tie: How far beyond the tie the differing codes lie at most, in codes; 0 where no `Tie` is given.
        farthest_in: Name of the tensor where that is, empty if there is none.
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
    """Compare tensors of integer codes.

    Args:
        pairs: Name of a tensor to (expected codes, codes to judge), integers of the same number of elements.
        ties: Of the tensors whose codes may differ near a tie: by one code, or by as many as the bound spans.

    Raises:
        ValueError: A pair differs in the number of its elements.
    """
    import numpy as np

    codes = differing = wrong = largest = 0
    first_wrong = farthest_in = ""
    farthest = 0.0
    for name, (expected, judged) in pairs.items():
        if expected.size != judged.size:
            msg = f"{name}: {expected.size} codes are expected, there are {judged.size}"
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
            # A code that differs by one lies half a code and the distance of the tie away.
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
