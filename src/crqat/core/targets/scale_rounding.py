"""Rounds scales up to values that files can store, such as float16, and raises those too small for int32 biases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from crqat.core.targets.base import Target

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# |bias| / (s_x s_w) stays below this limit if a bias is int32: half of the type's range.
BIAS_LIMIT = 2.0**30
# The smallest positive number and the largest. float16 numbers are 2^-24 apart below 2^-14, where scales get coarse;
# float32 holds any trained scale.
_RANGES = {"float16": (2.0**-24, 65504.0), "float32": (0.0, 3.4028234663852886e38)}


def round_up(scale: npt.NDArray[np.float32], targets: Sequence[Target]) -> npt.NDArray[np.float32]:
    """Return the scales rounded up to values that the files of every target can store, float32 of the same shape.

    If a target stores float16, no scale may exceed float16's largest number; `too_large` checks this.
    """
    import numpy as np

    for target in _narrow(targets):
        stored = scale.astype(target.scale_type)
        below = stored.astype(np.float32) < scale
        scale = np.where(below, np.nextafter(stored, stored.dtype.type(np.inf)), stored).astype(np.float32)
    return scale


def too_large(scale: npt.NDArray[np.float32], targets: Sequence[Target]) -> Target | None:
    """Return a target whose files cannot store the largest of the scales as a finite number; None if all can.

    A scale that is NaN counts as too large.
    """
    largest = scale.max()
    return next((target for target in _narrow(targets) if not largest <= _RANGES[target.scale_type][1]), None)


def _narrow(targets: Sequence[Target]) -> list[Target]:
    return [target for target in targets if target.scale_type != "float32"]


def folded_scale(
    scale: npt.NDArray[np.float32],
    multiplier: npt.NDArray[np.float32],
    bias: npt.NDArray[np.float32],
    input_scale: np.float32 | None,
    targets: Sequence[Target],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Fold BN into the scales of a weight, and raise scales that are too small.

    A scale is too small if a target's files cannot store it, or if the bias overflows int32 when it is stored in units
    of the scale times `input_scale`.

    Args:
        scale: Trained scale of the unfolded weight, float32 of shape [C].
        multiplier: Factor of BN for each channel, float32 of shape [C]; ones without BN.
        bias: Folded bias, float32 of shape [C].
        input_scale: Scale of the activation that the weight multiplies; None if it is not quantized.
        targets: Targets whose files must hold the scales.

    Returns:
        The folded scales before they are rounded to stored values, and which channels were raised. A channel that BN
        multiplies by 0 has codes 0 at any scale and keeps its scale.
    """
    import numpy as np

    folded = scale * np.abs(multiplier)
    smallest = np.full_like(folded, max(_RANGES[target.scale_type][0] for target in targets))
    if input_scale is not None and any(target.bias_type == "int32" for target in targets):
        smallest = np.maximum(smallest, np.abs(bias) / np.float32(BIAS_LIMIT) / input_scale)
    raised = (folded < smallest) & (multiplier != 0)
    return np.where(raised, smallest, folded), raised


def unfolded(
    folded: npt.NDArray[np.float32],
    scale: npt.NDArray[np.float32],
    multiplier: npt.NDArray[np.float32],
    raised: npt.NDArray[np.bool_],
    targets: Sequence[Target],
) -> npt.NDArray[np.float32]:
    """Return the scales of the unfolded weight that `folded_scale` maps to `folded`, float32 of shape [C].

    Args:
        folded: Scales from `folded_scale`, rounded to values that files can store.
        scale: As in `folded_scale`.
        multiplier: As in `folded_scale`.
        raised: Second result of `folded_scale`.
        targets: As in `folded_scale`.
    """
    import numpy as np

    changed = (multiplier != 0) if _narrow(targets) else raised
    # The rounding of the division must not make a scale smaller.
    with np.errstate(divide="ignore", invalid="ignore"):
        final = np.maximum(folded / np.abs(multiplier), scale)
    result: npt.NDArray[np.float32] = np.where(changed, final, scale)
    return result
