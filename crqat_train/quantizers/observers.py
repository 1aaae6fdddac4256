"""Where a quantizer's range starts: from a weight, or from what an edge carries for training images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from crqat.train import distributed
from crqat.train.quantizers.base import MIN_SCALE, Quantizer

# Ratios of a range to the largest magnitude that calibration tries.
_CANDIDATES = 80
# Times that the search for an asymmetric range goes over both of its ends.
_PASSES = 2
_HISTOGRAM_BINS = 2048
# Of the magnitudes of the values that are not 0, in per cent.
PERCENTILE = 99.99
# A histogram up to a larger value could not be doubled within float32.
_LARGEST = torch.finfo(torch.float32).max / 2


@torch.no_grad()
def calibrate_weight(quantizer: Quantizer, weight: Tensor, calibration: str = "mse") -> None:
    """Start each channel's step of a weight: see `crqat.train.config.QuantizationConfig.calibration`.

    A method with a start of its own takes that. A channel of zeros gets the largest channel's step, or 1 if all are
    zero: any positive step represents it.
    """
    start = quantizer.start_weight(weight.detach())
    per_channel = quantizer.rows(weight.detach())
    largest = per_channel.abs().amax(dim=1)
    best_error = torch.full_like(largest, math.inf)
    # No value is clipped; the negative side of a full range holds one code more.
    best = torch.maximum(per_channel.amax(dim=1) / quantizer.qmax, per_channel.amin(dim=1) / quantizer.qmin)
    # A percentile of a filter's few weights would be their largest, or cut it off.
    for candidate in range(_CANDIDATES, 0, -1) if calibration == "mse" and start is None else ():
        scale = (largest * (candidate / _CANDIDATES) / quantizer.qmax).clamp_min(MIN_SCALE)[:, None]
        rounded = torch.clamp(torch.round(per_channel / scale), quantizer.qmin, quantizer.qmax) * scale
        error = (rounded - per_channel).square().sum(dim=1)
        better = error < best_error
        best_error, best = torch.where(better, error, best_error), torch.where(better, scale[:, 0], best)
    best = best if start is None else start
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
        self._begun = False

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Count the values of a batch of shape [N, ...]."""
        self.features = x[0].numel()
        largest = float(x.abs().amax())
        if not self._begun and distributed.world() > 1:
            # All ranks' histograms begin with the same bins, those of the whole first batch, so that they can be added.
            first = distributed.largest(largest if largest < _LARGEST else math.inf)[0]
            self.limit = max(first, MIN_SCALE) if first < _LARGEST else 0.0
        self._begun = True
        if not largest < _LARGEST:
            return  # the caller's loss is not finite either, and says so
        self.lowest, self.highest = min(self.lowest, float(x.amin())), max(self.highest, float(x.amax()))
        if self.limit == 0.0:
            self.limit = max(largest, MIN_SCALE)
        while self.limit < largest:
            self._double()
        for row, values in enumerate((x[x > 0], -x[x < 0])):
            self.counts[row] += torch.histc(values.float().cpu(), _HISTOGRAM_BINS, 0.0, self.limit).double()

    def reduce(self) -> None:
        """Take in what all ranks have seen; from then on they hold the same. Each has seen its share of each batch."""
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
        """Start an activation's step: see `crqat.train.config.QuantizationConfig.calibration`."""
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
        """What PERCENTILE of the magnitudes do not exceed, to one part in 2048 of the largest."""
        shares = self.counts.sum(dim=0).cumsum(dim=0) / self.counts.sum()
        bins = 1 + int(torch.searchsorted(shares, PERCENTILE / 100))
        return min(bins * self.limit / _HISTOGRAM_BINS, max(-self.lowest, self.highest))

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

    def _range(self, quantizer: Quantizer, calibration: str) -> tuple[float, float]:
        """Both ends of an asymmetric range; it contains 0."""
        if calibration == "percentile":
            magnitude = self._magnitude()
            return max(self.lowest, -magnitude), min(self.highest, magnitude)
        if calibration == "minmax":
            return self.lowest, self.highest
        used = self.counts > 0
        centres = (torch.arange(_HISTOGRAM_BINS, dtype=torch.float64) + 0.5) * (self.limit / _HISTOGRAM_BINS)
        values, counts = torch.stack([centres, -centres])[used], self.counts[used]
        codes = quantizer.qmax - quantizer.qmin

        def error(low: float, high: float) -> float:
            scale = max((high - low) / codes, MIN_SCALE)
            below = min(max(round(-low / scale), 0), codes)  # codes below the one of 0.0
            rounded = torch.clamp(torch.round(values / scale), -below, codes - below) * scale
            return float((counts * (rounded - values).square()).sum())

        shares = [candidate / _CANDIDATES for candidate in range(_CANDIDATES, 0, -1)]
        low, high = self.lowest, self.highest
        for _ in range(_PASSES):
            high = min((self.highest * share for share in shares), key=lambda end: error(low, end))
            low = min((self.lowest * share for share in shares), key=lambda end: error(end, high))
        return low, high
