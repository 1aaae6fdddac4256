"""LSQ+: scale and offset are learned (arXiv 2004.09576)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from crqat.train.placement.quantizer_spec import QuantizerSpec
from crqat.train.quantizers.base import MIN_SCALE
from crqat.train.quantizers.lsq import LSQQuantizer


def _zero_point(scale: Tensor, offset: Tensor, qmin: float, qmax: float) -> Tensor:
    """Return the zero point: -offset / scale, rounded to a code, so that 0.0 is exact, as zero padding needs."""
    return torch.clamp(torch.round(-offset / scale), qmin, qmax)


class _LSQPlus(torch.autograd.Function):
    """Equations 4 to 8 of the paper, except that the offset is rounded to a multiple of the scale.

    The rounding of the offset has a straight-through gradient. With the rounded offset beta = -z s, the paper's
    round(clip((x - beta) / s, qmin, qmax)) s + beta equals round(clip(x / s, qmin - z, qmax - z)) s, which this class
    computes. The two differ only in ties: here round(x / s), without the zero point, is even, as in ONNX.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, offset: Tensor, bounds: tuple[float, float], factors: tuple[float, float]
    ) -> Tensor:
        scale = scale.clamp_min(MIN_SCALE)
        ctx.save_for_backward(x, scale, offset)
        ctx.bounds, ctx.factors = bounds, factors
        zero_point = _zero_point(scale, offset, *bounds)
        low, high = bounds[0] - zero_point, bounds[1] - zero_point
        return torch.round(torch.clamp(x / scale, low, high)) * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, scale, offset = ctx.saved_tensors
        (qmin, qmax), (scale_factor, offset_factor) = ctx.bounds, ctx.factors
        grad = grad_outputs[0]
        zero_point = _zero_point(scale, offset, qmin, qmax)
        v = x / scale
        below, above = v <= qmin - zero_point, v >= qmax - zero_point
        outside, zero = below | above, torch.zeros_like(grad)
        step = torch.where(below, torch.full_like(v, qmin), torch.where(above, torch.full_like(v, qmax), v.round() - v))
        grad_scale = (grad * step).sum_to_size(scale.shape) * scale_factor
        grad_offset = torch.where(outside, grad, zero).sum_to_size(offset.shape) * offset_factor
        return torch.where(outside, zero, grad), grad_scale, grad_offset, None, None


class LSQPlusQuantizer(LSQQuantizer):
    """LSQ with a learned offset for activations of both signs, and its own initial scales for weights.

    Weights have no offset, as the paper recommends. Activations that are never negative have none, either: an offset
    could only assign codes to values that do not occur, and ONNX Runtime absorbs a ReLU only at zero point 0.
    """

    def __init__(self, spec: QuantizerSpec) -> None:
        super().__init__(spec)
        self.asymmetric = spec.kind == "activation" and spec.qmin < 0
        self.offset = nn.Parameter(torch.zeros(1)) if self.asymmetric else None
        self.offset_grad_scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Return the dequantized values of `x`, float32 in its shape, with gradients for scale and offset."""
        if self.offset is None:
            return super().forward(x)
        bounds, factors = (self.qmin, self.qmax), (self.grad_scale, self.offset_grad_scale)
        return _LSQPlus.apply(x.float(), self.scale, self.offset, bounds, factors)  # type: ignore[no-any-return]

    def set_grad_scale(self, elements: int) -> None:
        """Set the factors by which the gradients of scale and offset are multiplied.

        The factor of the scale is 1 / (sqrt(N) qmax), as in LSQ; the factor of the offset is 1 / sqrt(N). N is
        `elements`, the number of values that share the scale; qmax is the largest code.
        """
        super().set_grad_scale(elements)
        self.offset_grad_scale = 1.0 / math.sqrt(max(elements, 1))

    def start_weight(self, weight: Tensor) -> Tensor:
        """Return the paper's initial scales: three standard deviations to either side of each channel's mean."""
        per_channel = self.rows(weight)
        mean, deviation = per_channel.mean(dim=1), per_channel.std(dim=1, correction=0)
        return torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs()) / -self.qmin

    @torch.no_grad()
    def set_range(self, low: float, high: float) -> None:
        """Set initial scale and offset so that the codes cover the range from `low` <= 0 to `high` >= 0."""
        scale = max((high - low) / (self.qmax - self.qmin), MIN_SCALE)
        self.scale.fill_(scale)
        if self.offset is not None:
            self.offset.fill_(-round(self.qmin - low / scale) * scale)

    def zero_point(self) -> int:
        """Return the code of 0.0: it follows from the learned offset, and is 0 without an offset."""
        if self.offset is None:
            return 0
        return int(_zero_point(self.scale.detach().clamp_min(MIN_SCALE), self.offset.detach(), self.qmin, self.qmax))
