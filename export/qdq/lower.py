"""Converts trained Grids to a target's encoding, with a claim of exactness.

The claim is "exact" if the stored Grid has the same representable values as the trained Grid. It is "lossy" if the
values differ; such a file is written only with `export.allow_lossy`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from crqat.core import targets as runtimes
from crqat.core.errors import UsageError
from crqat.core.grid import Grid
from crqat.train.graph.fold_batchnorm import folded_codes, per_channel

_STORED: dict[str, type[np.int8] | type[np.uint8]] = {"int8": np.int8, "uint8": np.uint8}
Claim = Literal["exact", "lossy"]

# Largest magnitude to which low-bit weight codes are scaled. The int32 bias rounds to units of s_x s_w: the larger the
# codes, the smaller the unit. 64 keeps 255 * (64 + 64) within 16 bits.
SPREAD_LIMIT = 64
# Scale of a channel whose codes are all 0. Any positive scale represents it, but its bias is stored in units of it.
_UNUSED_SCALE = np.float32(2.0**-10)


@dataclass(frozen=True)
class Activation:
    """An activation's Grid in a target's encoding.

    Attributes:
        grid: The Grid as the file stores it: code range and zero point are shifted to the range of `dtype`.
        dtype: np.int8 or np.uint8.
        clip: Bounds of the integer Clip after QuantizeLinear; None if no Clip is needed, because QuantizeLinear
            saturates to the range of `dtype`.
        claim: "exact" if the target represents the same values as training, "lossy" if they differ.
        note: Message for the user; empty if there is none.
    """

    grid: Grid
    dtype: type[np.signedinteger[Any]] | type[np.unsignedinteger[Any]]
    clip: tuple[int, int] | None
    claim: Claim = "exact"
    note: str = ""


@dataclass(frozen=True)
class Weight:
    """A weight's codes and Grid in a target's encoding, with BN folded in.

    Attributes:
        codes: Integer weight, int8 of the weight's shape.
        scale: float32 of shape [C], positive.
        bias: float32 of shape [C]: the folded bias rounded to a multiple of the unit s_x s_w, the same for all targets.
        bias_codes: The bias in units of s_x s_w, int32 of shape [C].
        bias_error: Largest rounding error of the bias, as a real number.
        claim: "exact" if the target represents the same values as training, "lossy" if they differ.
        note: Message for the user; empty if there is none.
    """

    codes: npt.NDArray[np.int8]
    scale: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    bias_codes: npt.NDArray[np.int32]
    bias_error: float
    claim: Claim = "exact"
    note: str = ""


def lower_activation(grid: Grid, target: str) -> Activation:
    """Convert an activation's trained Grid to a target's encoding.

    If the target supports zero points, the Grid is shifted so that its smallest code is that of the type. Otherwise the
    codes of training are kept.

    Raises:
        UsageError: The Grid needs a zero point other than 0, which the target does not support.
    """
    rules = runtimes.get(target)
    stored, (low, high) = _STORED[rules.activation_type], rules.code_range
    if rules.zero_points:
        shift = low - grid.qmin
        shifted = Grid(grid.scale, grid.zero_point + shift, low, grid.qmax + shift)
        return Activation(shifted, stored, None if shifted.qmax == high else (low, shifted.qmax))
    if grid.zero_point != 0:
        others = [other.name for other in runtimes.TARGETS.values() if other.zero_points]
        msg = (
            f"export.targets: {rules.title} refuses zero points other than 0, and a trained Grid has "
            f"{grid.zero_point}; export for {' or '.join(others)} alone, or train with quantization.activation_method: "
            "lsq"
        )
        raise UsageError(msg)
    if grid.qmax > high:
        halved = Grid(grid.scale * np.float32(grid.qmax / high), 0, 0, high)
        note = f"{rules.title} has no unsigned INT8, so this tensor gets {high + 1} codes instead of {grid.qmax + 1}"
        return Activation(halved, stored, None, "lossy", note)
    full = grid.qmin in (low, 0) and grid.qmax == high  # with qmin 0 the tensor has no negative value
    return Activation(grid, stored, None if full else (grid.qmin, grid.qmax))


def lower_weight(
    grid: Grid,
    weight: npt.NDArray[np.float32],
    multiplier: npt.NDArray[np.float32],
    bias: npt.NDArray[np.float32],
    input_activation: Activation | None,
    depthwise: bool,
    target: str,
) -> Weight:
    """Convert a weight to a target's encoding, with BN folded into the scale; codes are not rounded again.

    Args:
        grid: Trained per-channel Grid of the unfolded weight.
        weight: The unfolded latent weight, float32 of shape [C, ...].
        multiplier: m = gamma / sigma of each channel, float32 of shape [C]; ones without BN.
        bias: Folded bias, float32 of shape [C].
        input_activation: The converted activation that the weight is multiplied with; None if that is not quantized.
        depthwise: Whether the layer is a depthwise convolution; see `crqat.core.targets.is_depthwise`.
        target: Name of a runtime; see `crqat.core.targets`.
    """
    rules = runtimes.get(target)
    codes, scale = folded_codes(grid.quantize(weight), grid.scale, multiplier)
    # The trained scale was chosen so that the folded one is a float16 number; undo the product's last rounding.
    half = scale.astype(np.float16).astype(np.float32)
    rounded_to = (np.abs(multiplier) != 1) & (np.abs(half - scale) <= scale * 2.0**-21)
    scale = np.where(rounded_to, half, scale).astype(np.float32)
    codes = np.where(per_channel(scale, codes.ndim) == 0, 0, codes)  # the product may underflow
    used = codes.reshape(len(scale), -1).any(axis=1)
    scale = np.where(used, scale, _UNUSED_SCALE).astype(np.float32)
    claim, note = "exact", ""
    if input_activation is not None:
        largest = max(abs(grid.qmin), grid.qmax)
        fed = input_activation.grid
        fitting = rules.largest_weight(fed.qmax - fed.qmin, depthwise)
        if fitting is not None and largest > fitting:
            ratio = largest / fitting
            codes = np.rint(codes / ratio).astype(np.int32)
            scale = (scale * np.float32(ratio)).astype(np.float32)
            claim, note = (
                "lossy",
                f"codes reduced to +-{fitting}: with its input, larger ones saturate 16-bit sums",
            )
    spread = _spread(grid)
    unit_bias_scale = scale / np.float32(spread)
    if rules.bias_type == "int32":
        codes, scale = codes * spread, unit_bias_scale
    input_scale = np.float32(1) if input_activation is None else input_activation.grid.scale[0]
    unit = np.maximum(input_scale * unit_bias_scale, np.finfo(np.float32).smallest_subnormal).astype(np.float32)
    wanted, limit = np.rint(bias.astype(np.float64) / unit), 2.0**31 - 1
    if (np.abs(wanted) > limit).any():
        others = " or ".join(other.name for other in runtimes.TARGETS.values() if other.bias_type == "int32")
        claim, note = (
            "lossy",
            f"the bias does not fit int32 in units of s_x s_w; train for {others} to raise the scale",
        )
    bias_codes = np.clip(wanted, -limit, limit).astype(np.int32)
    rounded = (bias_codes * unit.astype(np.float64)).astype(np.float32)
    error = float(np.abs(rounded.astype(np.float64) - bias).max())
    return Weight(codes.astype(np.int8), scale, rounded, bias_codes, error, claim, note)  # type: ignore[arg-type]


def _spread(grid: Grid) -> int:
    """Return the largest power of two by which codes can be multiplied without exceeding SPREAD_LIMIT.

    The weight's scale is divided by it, so that the int32 bias is rounded to a finer unit. With 7 and 8 bits it is 1.
    """
    largest = max(abs(grid.qmin), grid.qmax)
    return 1 if largest >= SPREAD_LIMIT else 1 << int(np.log2(SPREAD_LIMIT / largest))


def clip_bound(high: float, grid: Grid) -> int:
    """Return the largest code of ``rint(min(x, high) / scale)``, the bound of an integer Clip that replaces ReLU6."""
    return min(grid.qmax, int(np.rint(np.float32(high) / grid.scale[0])) + grid.zero_point)
