"""LSQ: the scale is learned (arXiv 1902.08153)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from crqat.train.placement.quantizer_spec import QuantizerSpec
from crqat.train.quantizers.base import MIN_SCALE, Quantizer


class _LSQ(torch.autograd.Function):
    """Learned step size quantization, arXiv 1902.08153, equations 1 to 3, with its gradient for the scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qmin: float, qmax: float, grad_scale: float) -> Tensor:
        scale = scale.clamp_min(MIN_SCALE)
        ctx.save_for_backward(x, scale)
        ctx.bounds = (qmin, qmax, grad_scale)
        return torch.round(torch.clamp(x / scale, qmin, qmax)) * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, scale = ctx.saved_tensors
        qmin, qmax, grad_scale = ctx.bounds
        grad = grad_outputs[0]
        v = x / scale
        below, above = v <= qmin, v >= qmax
        grad_x = torch.where(below | above, torch.zeros_like(grad), grad)
        step = torch.where(below, torch.full_like(v, qmin), torch.where(above, torch.full_like(v, qmax), v.round() - v))
        return grad_x, (grad * step).sum_to_size(scale.shape) * grad_scale, None, None, None


class LSQQuantizer(Quantizer):
    """Fake-quantizes with a learned scale (LSQ)."""

    scale: nn.Parameter

    def __init__(self, spec: QuantizerSpec) -> None:
        super().__init__(spec)
        self.scale = nn.Parameter(self.initial_scale())
        # Set by calibration, which sees the tensor.
        self.grad_scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Return the dequantized values of `x`, float32 in its shape, with a gradient for the scale."""
        return _LSQ.apply(x.float(), self.scale, self.qmin, self.qmax, self.grad_scale)  # type: ignore[no-any-return]

    def set_grad_scale(self, elements: int) -> None:
        """Set the factor by which the scale's gradient is multiplied: 1 / (sqrt(N) qmax).

        N is `elements`, the number of values that share the scale; qmax is the largest code.

        The paper's factor is 1 / sqrt(N qmax). It balances scales that start at 2 mean|x| / sqrt(qmax). Here each
        channel has a scale of its own, which starts where the rounding error is smallest; with 8 bits, this is several
        times below the paper's initial scale. With the paper's factor, one epoch of W8A8 reduced the accuracy of a
        CIFAR-10 ResNet-20 on its training images from 99.7 to 67.8 %: scales of single channels grew up to 898-fold.
        """
        self.grad_scale = 1.0 / (math.sqrt(max(elements, 1)) * self.qmax)
