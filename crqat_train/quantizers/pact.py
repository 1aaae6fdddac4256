"""PACT: the clipping level of an activation is learned (arXiv 1805.06085)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from crqat.train.placement.quantizer_spec import QuantizerSpec
from crqat.train.quantizers.base import MIN_SCALE, Quantizer


class _PACT(torch.autograd.Function):
    """Rounds clip(x, 0, alpha); the gradient is 1 for x within [0, alpha) and 1 for alpha where x >= alpha.

    The parameter is scale = alpha / qmax. Its gradient is set to alpha's gradient divided by qmax, so that an SGD step
    moves alpha as if alpha were the parameter. With signed codes x is clipped to [-alpha, alpha], and the gradient for
    alpha is -1 where x < -alpha.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qmin: float, qmax: float) -> Tensor:
        scale = scale.clamp_min(MIN_SCALE)
        ctx.save_for_backward(x, scale)
        ctx.bounds = (qmin, qmax)
        return torch.round(torch.clamp(x / scale, qmin, qmax)) * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, scale = ctx.saved_tensors
        qmin, qmax = ctx.bounds
        grad = grad_outputs[0]
        v = x / scale
        below, above = v < qmin, v >= qmax
        zero = torch.zeros_like(grad)
        level = torch.where(above, grad, torch.where(below, -grad, zero) if qmin < 0 else zero)
        return torch.where(below | above, zero, grad), level.sum_to_size(scale.shape) / qmax, None, None


class PACTQuantizer(Quantizer):
    """Fake-quantizes an activation below a learned clipping level, alpha = qmax * scale, with weight decay on it."""

    scale: nn.Parameter
    decays_scale = True
    for_weights = False

    def __init__(self, spec: QuantizerSpec) -> None:
        super().__init__(spec)
        self.scale = nn.Parameter(self.initial_scale())

    def forward(self, x: Tensor) -> Tensor:
        """Return the dequantized values of the activation `x`, float32 in its shape."""
        return _PACT.apply(x.float(), self.scale, self.qmin, self.qmax)  # type: ignore[no-any-return]
