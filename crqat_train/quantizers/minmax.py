"""Min-max: the calibrated range stays fixed; the straight-through gradient trains the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crqat.train.placement.quantizer_spec import QuantizerSpec
from crqat.train.quantizers.base import Quantizer


class _StraightThrough(torch.autograd.Function):
    """Fake quantization whose gradient is 1 within the range, its ends included, and 0 outside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qmin: float, qmax: float) -> Tensor:
        v = x / scale
        ctx.save_for_backward((v >= qmin) & (v <= qmax))
        return torch.round(torch.clamp(v, qmin, qmax)) * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return torch.where(inside, grad_outputs[0], torch.zeros_like(grad_outputs[0])), None, None, None


class MinMaxQuantizer(Quantizer):
    """Fake-quantizes within the fixed range that calibration found, with a straight-through gradient."""

    def __init__(self, spec: QuantizerSpec) -> None:
        super().__init__(spec)
        self.register_buffer("scale", self.initial_scale())

    def forward(self, x: Tensor) -> Tensor:
        """Return the dequantized values of `x`, float32 in its shape, with a straight-through gradient."""
        return _StraightThrough.apply(x.float(), self.scale, self.qmin, self.qmax)  # type: ignore[no-any-return]
