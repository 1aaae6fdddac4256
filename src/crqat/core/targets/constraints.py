"""The constraints that one network must meet to run on several targets: it must meet those of every target."""

from __future__ import annotations

from dataclasses import dataclass

from crqat.core.targets.base import Residual, Target, activation_codes, weight_codes

_RESIDUALS: tuple[Residual, ...] = ("none", "skip", "both")


@dataclass(frozen=True)
class Constraints:
    """The constraints of several targets at once.

    Attributes:
        targets: The targets, at least one.
    """

    targets: tuple[Target, ...]

    @property
    def residual(self) -> Residual:
        """Return which inputs of a residual Add carry quantizers: as many as the most demanding target needs."""
        return max((target.residual for target in self.targets), key=_RESIDUALS.index)

    @property
    def quantize_before_activation(self) -> bool:
        """Return whether any target needs a quantizer between a convolution and an activation that it does not fuse."""
        return any(target.quantize_before_activation for target in self.targets)

    @property
    def without_zero_points(self) -> Target | None:
        """Return a target that allows only the zero point 0; None if all targets allow any."""
        return next((target for target in self.targets if not target.zero_points), None)

    def activation_codes(self, bits: int, nonnegative: bool) -> tuple[int, int]:
        """Return the smallest and the largest code that all targets allow for an activation.

        At 8 bits, an activation without negative values has the codes 0 to 255 if all targets can store them; the file
        then needs no Clip after a ReLU. If a target has only signed codes and no zero points, it has the codes 0 to
        127.

        Args:
            bits: Bit width.
            nonnegative: Whether the activation has no negative values.
        """
        qmin, qmax = activation_codes(bits, nonnegative)
        if nonnegative:
            qmax = min(qmax, *(target.largest_nonnegative for target in self.targets))
        return qmin, qmax

    def weight_bits(self, bits: int, input_codes: int | None, depthwise: bool) -> tuple[int, str]:
        """Return the bit width at which a weight's sums do not saturate, and why it differs from the requested one.

        Args:
            bits: Requested bit width.
            input_codes: Largest code that the weight's input can have, before its zero point is subtracted; None if the
                input is not quantized.
            depthwise: Whether the layer is depthwise; see `is_depthwise`.

        Returns:
            The bit width and a reason, empty if nothing changes.
        """
        asked, reason = bits, ""
        for target in self.targets if input_codes is not None else ():
            fitting = target.largest_weight(input_codes or 0, depthwise)
            while fitting is not None and weight_codes(bits)[1] > fitting:
                bits -= 1
                reason = f"{asked} bits could saturate {target.title}'s 16-bit sums of products of weight and input"
        return bits, reason
