"""How a quantizer learns its Grid. Every method is a module that fake-quantizes and ends as a `Grid`.

Fake quantization gives, in float32, the value of the nearest code: ``clip(rint(x / s), qmin, qmax) * s``. The division
is a true division: a multiplication by the reciprocal is off by one unit in the last place and flips roundings.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from artifacts.grid import Grid
from crqat_train.layout import QuantizerSpec

# No scale gets smaller: ONNX Runtime's int32 bias overflows near 1e-10, and a scale of 0 is no Grid.
MIN_SCALE = 1e-8
# Ratios of a range to the largest magnitude that calibration tries.
_CANDIDATES = 80
_HISTOGRAM_BINS = 2048
# Of the magnitudes of the values that are not 0, in per cent.
PERCENTILE = 99.99
# A histogram up to a larger value could not be doubled within float32.
_LARGEST = torch.finfo(torch.float32).max / 2


class _LSQ(torch.autograd.Function):
    """Learned step size quantization, arXiv 1902.08153, equations 1 to 3, with its gradient for the step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qmin: float, qmax: float, grad_scale: float) -> Tensor:
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


class Quantizer(nn.Module):
    """What every method is: a module that fake-quantizes in float32 and ends as a Grid with zero point 0.

    Attributes:
        scale: The step, float32 of shape [1], or of full rank with the channels on axis 0; a Parameter where it is
            learned, else a buffer.
        spec: The place and codes of the quantizer.
    """

    scale: Tensor

    def __init__(self, spec: QuantizerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.qmin, self.qmax = float(spec.qmin), float(spec.qmax)

    def initial_scale(self) -> Tensor:
        """Ones of the scale's shape; calibration sets the values."""
        channels, ndim = self.spec.channels, self.spec.ndim
        return torch.ones([1] if channels is None else [channels] + [1] * (ndim - 1))

    def forward(self, x: Tensor) -> Tensor:
        """Values of the nearest codes, of the shape of `x`; float32, also where `x` is of a smaller type."""
        raise NotImplementedError

    def set_grad_scale(self, elements: int) -> None:
        """Told by calibration how many values share a scale: a scale's weights, or a sample's features."""

    def grid(self) -> Grid:
        """The Grid that training arrived at."""
        scale = self.scale.detach().cpu().numpy().astype(np.float32).reshape(-1)
        return Grid(scale, 0, self.spec.qmin, self.spec.qmax, None if self.spec.channels is None else 0)


class LSQQuantizer(Quantizer):
    """Fake-quantizes with a learned step (LSQ)."""

    scale: nn.Parameter

    def __init__(self, spec: QuantizerSpec) -> None:
        super().__init__(spec)
        self.scale = nn.Parameter(self.initial_scale())
        # Known once calibration has seen the tensor.
        self.grad_scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """See `Quantizer.forward`."""
        return _LSQ.apply(x.float(), self.scale, self.qmin, self.qmax, self.grad_scale)  # type: ignore[no-any-return]

    def set_grad_scale(self, elements: int) -> None:
        """Scale the step's gradient by 1 / (sqrt(N) qmax), N = `elements`: a scale's weights, or a sample's features.

        The paper's factor is 1 / sqrt(N qmax). It balances steps that start at 2 mean|x| / sqrt(qmax); ours start where
        the rounding error is smallest, at 8 bits several times lower, and each channel has its own. With the paper's
        factor one epoch of W8A8 took a CIFAR-10 ResNet-20 from 99.7 to 67.8 % on its training images: steps of single
        channels grew up to 898-fold.
        """
        self.grad_scale = 1.0 / (math.sqrt(max(elements, 1)) * self.qmax)


class MinMaxQuantizer(Quantizer):
    """Fake-quantizes within the range that calibration found, which stays; a straight-through gradient for the rest."""

    def __init__(self, spec: QuantizerSpec) -> None:
        super().__init__(spec)
        self.register_buffer("scale", self.initial_scale())

    def forward(self, x: Tensor) -> Tensor:
        """See `Quantizer.forward`."""
        return _StraightThrough.apply(x.float(), self.scale, self.qmin, self.qmax)  # type: ignore[no-any-return]


METHODS: dict[str, type[Quantizer]] = {"lsq": LSQQuantizer, "minmax": MinMaxQuantizer}


def quantizer_of(model: nn.Module, spec: QuantizerSpec) -> Quantizer:
    """The quantizer of an edge inside a quantized network."""
    quantizer = model.get_submodule(f"quantizers.{spec.module_name}")
    if not isinstance(quantizer, Quantizer):
        msg = f"{spec.edge}: not a quantizer"
        raise TypeError(msg)
    return quantizer


@torch.no_grad()
def calibrate_weight(quantizer: Quantizer, weight: Tensor, calibration: str = "mse") -> None:
    """Start each channel's step of a weight: see `crqat_train.config.QuantizationConfig.calibration`.

    A channel of zeros gets the largest channel's step, or 1 if all are zero: any positive step represents it.
    """
    per_channel = weight.detach().reshape(quantizer.scale.numel(), -1)
    largest = per_channel.abs().amax(dim=1)
    best_error = torch.full_like(largest, math.inf)
    # No value is clipped; the negative side of a full range holds one code more.
    best = torch.maximum(per_channel.amax(dim=1) / quantizer.qmax, per_channel.amin(dim=1) / quantizer.qmin)
    # A percentile of a filter's few weights would be their largest, or cut it off.
    for candidate in range(_CANDIDATES, 0, -1) if calibration == "mse" else ():
        scale = (largest * (candidate / _CANDIDATES) / quantizer.qmax).clamp_min(MIN_SCALE)[:, None]
        rounded = torch.clamp(torch.round(per_channel / scale), quantizer.qmin, quantizer.qmax) * scale
        error = (rounded - per_channel).square().sum(dim=1)
        better = error < best_error
        best_error, best = torch.where(better, error, best_error), torch.where(better, scale[:, 0], best)
    fallback = best.max().clamp_min(0) if bool(largest.any()) else torch.ones(())
    best = torch.where(largest > 0, best, fallback).clamp_min(MIN_SCALE)
    quantizer.scale.copy_(best.reshape(quantizer.scale.shape))
    quantizer.set_grad_scale(per_channel.shape[1])


class ActivationObserver:
    """Collects a histogram of magnitudes over calibration batches, to choose an activation's step.

    A batch with larger values widens the histogram by doubling, so one pass over the images is enough. Positive and
    negative values are counted apart: the signed range reaches further down.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2, _HISTOGRAM_BINS, dtype=torch.float64)
        self.limit = 0.0
        self.lowest = self.highest = 0.0
        self.features = 0

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Count the values of a batch of shape [N, ...]."""
        self.features = x[0].numel()
        largest = float(x.abs().amax())
        if not largest < _LARGEST:
            return  # the caller's loss is not finite either, and says so
        self.lowest, self.highest = min(self.lowest, float(x.amin())), max(self.highest, float(x.amax()))
        if self.limit == 0.0:
            self.limit = max(largest, MIN_SCALE)
        while self.limit < largest:
            pairs = self.counts.reshape(2, _HISTOGRAM_BINS // 2, 2).sum(dim=2)
            self.counts = torch.cat([pairs, torch.zeros_like(pairs)], dim=1)
            self.limit *= 2
        for row, values in enumerate((x[x > 0], -x[x < 0])):
            self.counts[row] += torch.histc(values.float().cpu(), _HISTOGRAM_BINS, 0.0, self.limit).double()

    @torch.no_grad()
    def calibrate(self, quantizer: Quantizer, calibration: str = "mse") -> None:
        """Start an activation's step: see `crqat_train.config.QuantizationConfig.calibration`."""
        quantizer.set_grad_scale(self.features)
        if not bool(self.counts.any()):  # nothing but zeros was seen
            quantizer.scale.fill_(1.0)
            return
        search = {"mse": self._least_squares, "minmax": self._minmax, "percentile": self._percentile}
        quantizer.scale.fill_(max(search[calibration](quantizer), MIN_SCALE))

    def _minmax(self, quantizer: Quantizer) -> float:
        low = self.lowest / quantizer.qmin if quantizer.qmin else 0.0
        return max(low, self.highest / quantizer.qmax)

    def _percentile(self, quantizer: Quantizer) -> float:
        """The magnitude that PERCENTILE of the values do not exceed, to one part in 2048 of the largest."""
        shares = self.counts.sum(dim=0).cumsum(dim=0) / self.counts.sum()
        bins = 1 + int(torch.searchsorted(shares, PERCENTILE / 100))
        magnitude = min(bins * self.limit / _HISTOGRAM_BINS, max(-self.lowest, self.highest))
        return magnitude / quantizer.qmax

    def _least_squares(self, quantizer: Quantizer) -> float:
        used = torch.nonzero(self.counts.sum(dim=0)).flatten()
        centres = (torch.arange(_HISTOGRAM_BINS, dtype=torch.float64) + 0.5) * (self.limit / _HISTOGRAM_BINS)
        values = torch.stack([centres, -centres])
        largest = float(centres[used[-1]]) + 0.5 * self.limit / _HISTOGRAM_BINS
        best_error, best = math.inf, largest / quantizer.qmax
        for candidate in range(_CANDIDATES, 0, -1):
            scale = largest * candidate / _CANDIDATES / quantizer.qmax
            rounded = torch.clamp(torch.round(values / scale), quantizer.qmin, quantizer.qmax) * scale
            error = float((self.counts * (rounded - values).square()).sum())
            if error < best_error:
                best_error, best = error, scale
        return best
