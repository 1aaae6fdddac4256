"""What one network must keep to when a recipe names several targets: the union of their constraints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crqat.core.targets.base import BIAS_LIMIT, Residual, Target, activation_codes, weight_codes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_RESIDUALS: tuple[Residual, ...] = ("none", "skip", "both")


@dataclass(frozen=True)
class Constraints:
    """The constraints of several targets at once.

    Attributes:
        targets: At least one.
    """

    targets: tuple[Target, ...]

    @property
    def residual(self) -> Residual:
        """Which inputs of a residual Add carry quantizers: as many as the most demanding target wants."""
        return max((target.residual for target in self.targets), key=_RESIDUALS.index)

    @property
    def quantize_before_activation(self) -> bool:
        """Whether any target needs a quantizer between a convolution and an activation that it does not fuse."""
        return any(target.quantize_before_activation for target in self.targets)

    @property
    def without_zero_points(self) -> Target | None:
        """A target that takes no zero point other than 0, None if all take any."""
        return next((target for target in self.targets if not target.zero_points), None)

    def activation_codes(self, bits: int, nonnegative: bool) -> tuple[int, int]:
        """Smallest and largest code of an activation.

        Without unsigned INT8, 8 bits of a tensor without negative values are the upper half of the signed range. A
        runtime with unsigned codes alone takes all of them: then its file needs no Clip behind a ReLU.
        """
        qmin, qmax = activation_codes(bits, nonnegative)
        if nonnegative:
            qmax = min(qmax, *(target.largest_nonnegative for target in self.targets))
        return qmin, qmax

    def weight_bits(self, bits: int, input_codes: int | None, depthwise: bool) -> tuple[int, str]:
        """The bit width of a weight whose sums do not saturate, and why it is not what is asked for.

        Args:
            bits: Asked for.
            input_codes: Largest stored code of the activation that it meets, None if that is not quantized.
            depthwise: See `is_depthwise`.

        Returns:
            Bits and a reason, empty where nothing changes.
        """
        asked, reason = bits, ""
        for target in self.targets if input_codes is not None else ():
            fitting = target.largest_weight(input_codes or 0, depthwise)
            while fitting is not None and weight_codes(bits)[1] > fitting:
                bits -= 1
                reason = f"{asked} bits could saturate {target.title}'s 16-bit sums behind its input"
        return bits, reason

    def scale_up(self, scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The smallest values that every target stores and that are not below scales, float32 of the same shape."""
        for target in self._narrow:
            scale = target.scale_up(scale)
        return scale

    def too_large(self, scale: npt.NDArray[np.float32]) -> Target | None:
        """A target that does not hold the largest of the scales (or a NaN) as a finite number, None if all do."""
        largest = scale.max()
        return next((target for target in self._narrow if not largest <= target.largest_scale), None)

    @property
    def _narrow(self) -> Sequence[Target]:
        return [target for target in self.targets if target.scale_type != "float32"]

    def weight_scale(
        self,
        scale: npt.NDArray[np.float32],
        multiplier: npt.NDArray[np.float32],
        bias: npt.NDArray[np.float32],
        input_scale: np.float32 | None,
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """A weight's folded scales, raised so that every target holds them and the bias in their units.

        Args:
            scale: Trained, of the unfolded weight, float32 of shape [C].
            multiplier: What BN multiplies each channel by, float32 of shape [C]; ones without BN.
            bias: Folded, float32 of shape [C].
            input_scale: Scale of the activation that the weight meets, None if that is not quantized.

        Returns:
            The folded scales before they are rounded to stored values, and which channels had to be raised. A channel
            that BN multiplies by 0 has codes 0 whatever its scale; it keeps the one it has.
        """
        import numpy as np

        folded = scale * np.abs(multiplier)
        smallest = np.full_like(folded, max(target.smallest_scale for target in self.targets))
        if input_scale is not None and any(target.bias_type == "int32" for target in self.targets):
            smallest = np.maximum(smallest, np.abs(bias) / np.float32(BIAS_LIMIT) / input_scale)
        raised = (folded < smallest) & (multiplier != 0)
        return np.where(raised, smallest, folded), raised

    def unfolded(
        self,
        folded: npt.NDArray[np.float32],
        scale: npt.NDArray[np.float32],
        multiplier: npt.NDArray[np.float32],
        raised: npt.NDArray[np.bool_],
    ) -> npt.NDArray[np.float32]:
        """The trained scales that fold to stored ones, float32 of shape [C]; see `weight_scale` for the arguments."""
        import numpy as np

        changed = (multiplier != 0) if self._narrow else raised
        # The division's rounding alone must not make a scale smaller.
        with np.errstate(divide="ignore", invalid="ignore"):
            final = np.maximum(folded / np.abs(multiplier), scale)
        result: npt.NDArray[np.float32] = np.where(changed, final, scale)
        return result
