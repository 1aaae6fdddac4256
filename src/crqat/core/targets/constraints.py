"""What one network must keep to when a recipe names several targets: the union of their constraints."""

from __future__ import annotations

from dataclasses import dataclass

from crqat.core.targets.base import Residual, Target, activation_codes, weight_codes

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
