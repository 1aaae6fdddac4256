"""DoReFa: weights are squeezed by tanh before they are rounded (arXiv 1606.06160)."""

from __future__ import annotations

import torch
from torch import Tensor

from crqat.train.placement.quantizer_spec import QuantizerSpec
from crqat.train.quantizers.minmax import MinMaxQuantizer

_TINY = torch.finfo(torch.float32).tiny


class DoReFaQuantizer(MinMaxQuantizer):
    """Transforms weights to limit * tanh(w) / max|tanh(w)| before rounding; rounds activations in a calibrated range.

    Attributes:
        limit: Largest magnitude of the weights at calibration, float32 of shape [1]; training does not change it. In
            the paper the limit is 1; here transformed weights keep their magnitude, which layers without BN need.
            Quantizers of activations have no `limit`.
    """

    limit: Tensor

    def __init__(self, spec: QuantizerSpec) -> None:
        super().__init__(spec)
        if spec.kind == "weight":
            self.register_buffer("limit", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the dequantized values of `x`, float32 in its shape; weights are transformed by tanh first."""
        return super().forward(self.values(x))

    def values(self, x: Tensor) -> Tensor:
        """Return the values to round, float32 in the shape of `x`: tanh-transformed weights, unchanged activations."""
        if self.spec.kind != "weight":
            return x.float()
        squeezed = torch.tanh(x.float())
        return squeezed * (self.limit / squeezed.abs().amax().clamp_min(_TINY))

    def start_weight(self, weight: Tensor) -> Tensor:
        """Return one scale for all channels, which maps the largest weight to the largest code."""
        self.limit.fill_(weight.abs().amax())
        return (self.limit / self.qmax).expand(self.scale.numel())
