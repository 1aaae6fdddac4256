"""Measures the signal-to-noise ratio of each quantizer on real images."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from crqat.train.quantizers import Quantizer, specs_of
from crqat.train.quantizers.calibration import Hook, hooked


def quantizer_noise(model: fx.GraphModule, images: npt.NDArray[np.float32]) -> dict[str, float | None]:
    """Return 10 log10(sum x^2 / sum (x - q(x))^2) in dB for each quantizer of the quantized network, by edge name.

    Args:
        model: Quantized network on the CPU in eval mode.
        images: Normalized, float32 of shape [N, C, H, W].

    Returns:
        The SQNR in dB by edge name; None if quantization is lossless or the signal is zero.
    """
    specs = specs_of(model)
    sums: dict[str, list[float]] = {spec.edge: [0.0, 0.0] for spec in specs}

    def counted(own: list[float]) -> Hook:
        def count(quantizer: Quantizer, inputs: tuple[Tensor], output: Tensor) -> None:
            x = quantizer.values(inputs[0]).double()
            own[0] += float(x.square().sum())
            own[1] += float((x - output).square().sum())

        return count

    with torch.no_grad(), hooked(model, [(spec, counted(sums[spec.edge])) for spec in specs]):
        model(torch.from_numpy(images))
    return {
        edge: 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None
        for edge, (signal, noise) in sums.items()
    }
