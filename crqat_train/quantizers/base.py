"""What every method is: a module that fake-quantizes and ends as a Grid."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, fx, nn

from crqat.core.grid import Grid
from crqat.train.placement.quantizer_spec import QuantizerSpec

# No scale gets smaller: ONNX Runtime's int32 bias overflows near 1e-10, and a scale of 0 is no Grid. Each method clamps
# the scale where it uses it and lets the gradient through, so that any optimizer may step beyond and come back.
MIN_SCALE = 1e-8


class Quantizer(nn.Module):
    """What every method is: a module that fake-quantizes in float32 and ends as a Grid, here with zero point 0.

    Attributes:
        scale: The step, float32 of shape [1], or of full rank with the channels on the spec's axis; a Parameter where
            it is learned, else a buffer.
        spec: The place and codes of the quantizer.
        decays_scale: Whether the recipe's weight decay is on `scale`, too.
        asymmetric: Whether calibration sets a range by `set_range`, not a scale.
        for_weights: Whether a recipe may choose the method for weights.
        for_activations: Likewise for activations.
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
        """Ones of the scale's shape; calibration sets the values."""
        if self.spec.channels is None:
            return torch.ones([1])
        shape = [1] * self.spec.ndim
        shape[self.spec.axis] = self.spec.channels
        return torch.ones(shape)

    def rows(self, weight: Tensor) -> Tensor:
        """A weight with the values that share a scale in one row, of shape [scales, values of one scale]."""
        if self.spec.channels is None:
            return weight.reshape(1, -1)
        return weight.movedim(self.spec.axis, 0).reshape(self.spec.channels, -1)

    def forward(self, x: Tensor) -> Tensor:
        """Values of the nearest codes, of the shape of `x`; float32, also where `x` is of a smaller type."""
        raise NotImplementedError

    def values(self, x: Tensor) -> Tensor:
        """What the Grid rounds, float32 of the shape of `x`: `x` itself unless the method transforms it first."""
        return x.float()

    def set_grad_scale(self, elements: int) -> None:
        """Told by calibration how many values share a scale: a scale's weights, or a sample's features."""

    def start_weight(self, weight: Tensor) -> Tensor | None:
        """The method's own first scales of a weight, float32 of shape [scales]; None leaves them to calibration."""
        return None

    def set_range(self, low: float, high: float) -> None:
        """Start at the range from `low` <= 0 to `high` >= 0; only where `asymmetric`."""
        raise NotImplementedError

    def zero_point(self) -> int:
        """The code of 0.0."""
        return 0

    def grid(self) -> Grid:
        """The Grid that training arrived at."""
        scale = self.scale.detach().clamp_min(MIN_SCALE).cpu().numpy().astype(np.float32).reshape(-1)
        axis = None if self.spec.channels is None else self.spec.axis
        return Grid(scale, self.zero_point(), self.spec.qmin, self.spec.qmax, axis)


def specs_of(model: fx.GraphModule) -> list[QuantizerSpec]:
    """The specs of a quantized network's quantizers, in the order of NNCF's layout."""
    return list(model.meta.get("specs", ()))  # a network that was only traced has none


def quantizer_of(model: nn.Module, spec: QuantizerSpec) -> Quantizer:
    """The quantizer of an edge inside a quantized network."""
    quantizer = model.get_submodule(f"quantizers.{spec.module_name}")
    if not isinstance(quantizer, Quantizer):
        msg = f"{spec.edge}: not a quantizer"
        raise TypeError(msg)
    return quantizer


def is_step(name: str) -> bool:
    """Whether a parameter's name is that of a quantizer's; a network may have a `scale` of its own."""
    return name.startswith("quantizers.")
