"""Base class of all quantization methods."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, fx, nn

from crqat.core.grid import Grid
from crqat.train.placement.quantizer_spec import QuantizerSpec

# Smallest scale. ONNX Runtime's int32 bias overflows near 1e-10, and a scale of 0 is not valid. Each method clamps the
# scale where it uses it and lets the gradient through, so that an optimizer may step below and come back.
MIN_SCALE = 1e-8


class Quantizer(nn.Module):
    """Base class of all methods: a module that fake-quantizes in float32, and whose `grid` method returns its Grid.

    The zero point is 0 unless a method overrides `zero_point`.

    Attributes:
        scale: The quantization scale, float32 of shape [1], or of full rank with the channels on the spec's axis; a
            Parameter where it is learned, otherwise a buffer.
        spec: The quantizer's edge, codes and bit width.
        decays_scale: Whether the recipe's weight decay applies to `scale`, too.
        asymmetric: Whether calibration sets a range by `set_range` instead of a scale.
        for_weights: Whether a recipe may choose the method for weights.
        for_activations: Whether a recipe may choose the method for activations.
    """

    scale: Tensor
    decays_scale = False
    asymmetric = False
    for_weights = True
    for_activations = True

    def __init__(self, spec: QuantizerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.qmin, self.qmax = float(spec.qmin), float(spec.qmax)

    def initial_scale(self) -> Tensor:
        """Return ones of the scale's shape; calibration sets the values."""
        if self.spec.channels is None:
            return torch.ones([1])
        shape = [1] * self.spec.ndim
        shape[self.spec.axis] = self.spec.channels
        return torch.ones(shape)

    def rows(self, weight: Tensor) -> Tensor:
        """Return a weight as [scales, values of one scale]: the values that share a scale are in one row."""
        if self.spec.channels is None:
            return weight.reshape(1, -1)
        return weight.movedim(self.spec.axis, 0).reshape(self.spec.channels, -1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the dequantized values of `x`, in its shape; float32 even if `x` has a smaller type."""
        raise NotImplementedError

    def values(self, x: Tensor) -> Tensor:
        """Return the values to round, float32 in the shape of `x`: `x` itself unless the method transforms it."""
        return x.float()

    def set_grad_scale(self, elements: int) -> None:
        """Set the factor by which the scale's gradient is multiplied; this base class sets none.

        Calibration calls it once for each quantizer. Methods that do not scale the gradient ignore it.

        Args:
            elements: Number of values that share the scale: weights of a channel or a tensor, or features of one image.
        """

    def start_weight(self, weight: Tensor) -> Tensor | None:
        """Return the method's own initial scales of a weight, float32 [scales]; None leaves them to calibration."""
        return None

    def set_range(self, low: float, high: float) -> None:
        """Set the initial range from `low` <= 0 to `high` >= 0; called only if `asymmetric`."""
        raise NotImplementedError

    def zero_point(self) -> int:
        """Return the code of 0.0."""
        return 0

    def grid(self) -> Grid:
        """Return the present scale, zero point and integer range as a Grid."""
        scale = self.scale.detach().clamp_min(MIN_SCALE).cpu().numpy().astype(np.float32).reshape(-1)
        axis = None if self.spec.channels is None else self.spec.axis
        return Grid(scale, self.zero_point(), self.spec.qmin, self.spec.qmax, axis)


def specs_of(model: fx.GraphModule) -> list[QuantizerSpec]:
    """Return the specs of a quantized network's quantizers, in NNCF's order."""
    return list(model.meta.get("specs", ()))  # a network that was only traced has none


def quantizer_of(model: nn.Module, spec: QuantizerSpec) -> Quantizer:
    """Return the quantizer of an edge of a quantized network."""
    quantizer = model.get_submodule(f"quantizers.{spec.module_name}")
    if not isinstance(quantizer, Quantizer):
        msg = f"{spec.edge}: the module there is not a quantizer"
        raise TypeError(msg)
    return quantizer


def is_step(name: str) -> bool:
    """Whether a name is that of a quantizer's parameter: it begins with `quantizers.`.

    The ending `.scale` does not decide, because layers, too, may have a parameter called `scale`.
    """
    return name.startswith("quantizers.")
