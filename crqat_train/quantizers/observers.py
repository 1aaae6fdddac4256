"""Chooses initial ranges of quantizers, from a weight or from the values of an activation for training images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from crqat.train import distributed
from crqat.train.quantizers.base import MIN_SCALE, Quantizer

# Number of clipping ratios that calibration tries, relative to the largest magnitude.
_CANDIDATES = 80
_SHARES = torch.arange(_CANDIDATES, 0, -1, dtype=torch.float64) / _CANDIDATES
# Number of values processed at a time, so that intermediate results stay in the cache.
_BLOCK = 1 << 19
# Group size: the largest of so many weights bounds the error of a clipped range from below.
_GROUP = 16
# Number of times that the search for an asymmetric range visits both of its ends.
_PASSES = 2
_HISTOGRAM_BINS = 2048
# Percentile of the magnitudes of nonzero values, in per cent.
PERCENTILE = 99.99
# A histogram up to a larger value could not be doubled within float32.
_LARGEST = torch.finfo(torch.float32).max / 2


@torch.no_grad()
def calibrate_weight(quantizer: Quantizer, weight: Tensor, calibration: str = "mse") -> None:
    """Set a weight's initial scales, one for each channel, by the method `calibration`.

    `calibration` is "mse", "minmax" or "percentile"; see `crqat.train.config.QuantizationConfig.calibration`.

    A quantizer with initial scales of its own, such as LSQ+, uses them instead of the method. A channel of zeros gets
    the largest scale of the other channels, or 1 if all channels are zero: any positive scale represents zeros exactly.
    """
    start = quantizer.start_weight(weight.detach())
    per_channel = quantizer.rows(weight.detach())
    low, high = torch.aminmax(per_channel, dim=1)
    largest = torch.maximum(-low, high)
    # No value is clipped; the negative side of a full range holds one code more.
    best = torch.maximum(high / quantizer.qmax, low / quantizer.qmin)
    if start is not None:
        best = start
    elif calibration == "mse":  # a percentile of a filter's few weights would be their largest, or cut it off
        rows = max(1, _BLOCK // per_channel.shape[1])
        blocks = zip(torch.split(per_channel, rows), torch.split(largest, rows), torch.split(best, rows), strict=True)
        best = torch.cat([_least_squares(*block, quantizer.qmin, quantizer.qmax) for block in blocks])
    fallback = best.max().clamp_min(0) if bool(largest.any()) else torch.ones(())
    best = torch.where(largest > 0, best, fallback).clamp_min(MIN_SCALE)
    quantizer.scale.copy_(best.reshape(quantizer.scale.shape))
    quantizer.set_grad_scale(per_channel.shape[1])


def _least_squares(weights: Tensor, largest: Tensor, unclipped: Tensor, qmin: float, qmax: float) -> Tensor:
    """Return the candidate scale with the least squared error for each channel; `unclipped` if no error is finite.

    Args:
        weights: Float of shape [channels, weights of one channel].
        largest: Each channel's largest magnitude, of shape [channels].
        unclipped: Scale at which no value is clipped, of shape [channels].
        qmin: Smallest code.
        qmax: Largest code.
    """
    group = _GROUP if weights.shape[1] >= _GROUP**2 else 1
    groups = weights.shape[1] // group
    # Each is a separate weight, so its clipping error is part of the total error, and grows as scales shrink.
    peaks = weights[:, : groups * group].reshape(-1, group, groups).abs().amax(dim=1)
    best_error, best = torch.full_like(largest, math.inf), unclipped
    steps, codes = torch.empty_like(weights), torch.empty_like(weights)
    for candidate in range(_CANDIDATES, 0, -1):
        scale = (largest * (candidate / _CANDIDATES) / qmax).clamp_min(MIN_SCALE)
        clipped = (peaks - (scale * max(qmax, -qmin))[:, None]).clamp_min_(0).square_().sum(dim=1)
        if not bool((clipped < best_error).any()):
            break
        torch.mul(weights, scale.reciprocal()[:, None], out=steps)
        torch.round(steps, out=codes).clamp_(qmin, qmax)
        error = (torch.linalg.vector_norm(steps.sub_(codes), dim=1) * scale).square()
        better = error < best_error
        best_error, best = torch.where(better, error, best_error), torch.where(better, scale, best)
    return best


class ActivationObserver:
    """Collects a histogram of magnitudes over calibration batches, to choose an activation's scale.

    A batch with larger values widens the histogram by doubling, so one pass over the images is enough. Positive and
    negative values are counted separately: a signed integer range has one more code below zero than above.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2, _HISTOGRAM_BINS, dtype=torch.float64)
        self.limit = 0.0
        self.lowest = self.highest = 0.0
        self.features = 0
        self._begun = False

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add an activation's values for one batch, float of shape [N, ...], to the histogram."""
        self.features = x[0].numel()
        # In the order in which they lie in memory: nothing is copied.
        values = x.permute(sorted(range(x.ndim), key=x.stride, reverse=True)).reshape(-1)
        low, high = torch.stack(torch.aminmax(values)).tolist()
        largest = max(-low, high)
        if not self._begun and distributed.world() > 1:
            # The histograms of all ranks start with the same bins, those of the whole first batch, so that they can be
            # added.
            first = distributed.largest(largest if largest < _LARGEST else math.inf)[0]
            self.limit = max(first, MIN_SCALE) if first < _LARGEST else 0.0
        self._begun = True
        if not largest < _LARGEST:
            return  # the caller's loss is not finite either, and says so
        self.lowest, self.highest = min(self.lowest, low), max(self.highest, high)
        if self.limit == 0.0:
            self.limit = max(largest, MIN_SCALE)
        while self.limit < largest:
            self._double()
        self._count(values.float().cpu())

    def _count(self, values: Tensor) -> None:
        """Count the values of a flat tensor, none above `self.limit` in magnitude; torch.histc takes much longer."""
        bins, counts = _HISTOGRAM_BINS, torch.zeros(2 * _HISTOGRAM_BINS + 1, dtype=torch.int64)
        size = min(len(values), _BLOCK)
        floats, integers = torch.empty(size), torch.empty(size, dtype=torch.int16)
        zeros = len(values)
        for part in torch.split(values, _BLOCK):
            # Rounded down before the shift, so that bins of one limit are parts of the bins of twice that limit.
            place = torch.mul(part, bins / self.limit, out=floats[: len(part)]).floor_().add_(bins)
            counts += torch.bincount(integers[: len(part)].copy_(place), minlength=len(counts))
            zeros -= int(torch.ne(part, 0, out=place).sum())
        counts[-2] += counts[-1]  # the limit itself
        counts[bins] -= zeros  # which are exact on every grid
        self.counts[0] += counts[bins:-1]
        self.counts[1] += counts[:bins].flip(0)

    def reduce(self) -> None:
        """Sum the histograms of all ranks, each of which has seen its share of every batch."""
        if distributed.world() == 1:
            return
        limit, lowest, self.highest = distributed.largest(self.limit, -self.lowest, self.highest)
        self.lowest = -lowest
        while 0.0 < self.limit < limit:
            self._double()
        self.limit = limit
        self.counts = distributed.total(self.counts)

    def _double(self) -> None:
        pairs = self.counts.reshape(2, _HISTOGRAM_BINS // 2, 2).sum(dim=2)
        self.counts = torch.cat([pairs, torch.zeros_like(pairs)], dim=1)
        self.limit *= 2

    @torch.no_grad()
    def calibrate(self, quantizer: Quantizer, calibration: str = "mse") -> None:
        """Set a quantizer's initial scale from the histogram, by "mse", "minmax" or "percentile".

        `crqat.train.config.QuantizationConfig.calibration` describes these methods.
        """
        quantizer.set_grad_scale(self.features)
        if not bool(self.counts.any()):  # nothing but zeros was seen
            quantizer.scale.fill_(1.0)
            return
        if quantizer.asymmetric:
            quantizer.set_range(*self._range(quantizer, calibration))
            return
        search = {"mse": self._least_squares, "minmax": self._minmax, "percentile": self._percentile}
        quantizer.scale.fill_(max(search[calibration](quantizer), MIN_SCALE))

    def _minmax(self, quantizer: Quantizer) -> float:
        low = self.lowest / quantizer.qmin if quantizer.qmin else 0.0
        return max(low, self.highest / quantizer.qmax)

    def _percentile(self, quantizer: Quantizer) -> float:
        return self._magnitude() / quantizer.qmax

    def _magnitude(self) -> float:
        """Return the magnitude that PERCENTILE percent of the values do not exceed, rounded up to a bin's end."""
        shares = self.counts.sum(dim=0).cumsum(dim=0) / self.counts.sum()
        bins = 1 + int(torch.searchsorted(shares, PERCENTILE / 100))
        return min(bins * self.limit / _HISTOGRAM_BINS, max(-self.lowest, self.highest))

    def _least_squares(self, quantizer: Quantizer) -> float:
        values, counts = self._seen()
        largest = float(values.abs().max()) + 0.5 * self.limit / _HISTOGRAM_BINS
        scales = largest * _SHARES / quantizer.qmax
        return float(scales[_best(values, counts, scales, quantizer.qmin, quantizer.qmax)])

    def _seen(self) -> tuple[Tensor, Tensor]:
        """Return the middle of each nonempty bin of the histogram, and its count; both float64."""
        middles = (torch.arange(_HISTOGRAM_BINS, dtype=torch.float64) + 0.5) * (self.limit / _HISTOGRAM_BINS)
        used = self.counts > 0
        return torch.stack([middles, -middles])[used], self.counts[used]

    def _range(self, quantizer: Quantizer, calibration: str) -> tuple[float, float]:
        """Return the smallest and the largest value of an asymmetric range, which contains 0."""
        if calibration == "percentile":
            magnitude = self._magnitude()
            return max(self.lowest, -magnitude), min(self.highest, magnitude)
        if calibration == "minmax":
            return self.lowest, self.highest
        values, counts = self._seen()
        codes = quantizer.qmax - quantizer.qmin

        def best(lows: Tensor, highs: Tensor) -> int:
            scales = ((highs - lows) / codes).clamp_min(MIN_SCALE)
            below = torch.clamp(torch.round(-lows / scales), 0, codes)  # codes below the one of 0.0
            return _best(values, counts, scales, -below[:, None], (codes - below)[:, None])

        low, high = self.lowest, self.highest
        for _ in range(_PASSES):
            high = float(self.highest * _SHARES[best(torch.full_like(_SHARES, low), self.highest * _SHARES)])
            low = float(self.lowest * _SHARES[best(self.lowest * _SHARES, torch.full_like(_SHARES, high))])
        return low, high


def _best(values: Tensor, counts: Tensor, scales: Tensor, qmin: float | Tensor, qmax: float | Tensor) -> int:
    """Return the index of the scale for which rounding the values has the least squared error.

    Args:
        values: Values, of shape [values].
        counts: How often each value occurs, of shape [values].
        scales: Candidates, of shape [scales].
        qmin: Smallest code; one for all scales, or of shape [scales, 1].
        qmax: Largest code, as `qmin`.
    """
    steps = scales[:, None]
    rounded = torch.round(values / steps).clamp_(qmin, qmax).mul_(steps)  # type: ignore[arg-type]
    return int((rounded.sub_(values).square_() @ counts).argmin())
