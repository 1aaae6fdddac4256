"""Folds BatchNorm into the convolution before it, numerically; the export uses it to rewrite graphs.

y = gamma (conv(x, w) + b - mean) / sigma + beta = conv(x, m w) + beta + (b - mean) m, with m = gamma / sigma.

All arrays are float32. The caller passes sigma, computed by torch's square root, because `quantizers.finalize` chose
the scales of the exported files with that sigma. numpy's square root may differ from it in the last place: on some CPUs
torch uses a vector library that does not round correctly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Floats = npt.NDArray[np.float32]


def multiplier(gamma: Floats, sigma: Floats) -> Floats:
    """Return BatchNorm's factor of each channel: m = gamma / sigma, with sigma = sqrt(variance + epsilon); all [C]."""
    result: Floats = (gamma / sigma).astype(np.float32)
    return result


def folded_bias(bias: Floats, beta: Floats, mean: Floats, factor: Floats) -> Floats:
    """Return the convolution's bias after folding, of shape [C]; `factor` is `multiplier`'s result."""
    result: Floats = (beta + (bias - mean) * factor).astype(np.float32)
    return result


def folded_weight(weight: Floats, factor: Floats) -> Floats:
    """Return the convolution's weight after folding, of shape [C, ...]."""
    result: Floats = weight * per_channel(factor, weight.ndim)
    return result


def folded_codes(codes: npt.NDArray[np.int32], scale: Floats, factor: Floats) -> tuple[npt.NDArray[np.int32], Floats]:
    """Return a quantized weight after folding, without rounding its codes again.

    A channel's scale is multiplied by |m|, its codes change sign where m < 0, and become 0 where m = 0.

    Args:
        codes: Integer weight, int32 of shape [C, ...].
        scale: Scale of the weight, of shape [1] or [C].
        factor: `multiplier`'s result, of shape [C].

    Returns:
        Codes and scales, of shape [C].
    """
    sign = np.sign(factor).astype(np.int32)
    folded: Floats = np.broadcast_to(scale, factor.shape).astype(np.float32) * np.abs(factor)
    return codes * per_channel(sign, codes.ndim), folded


def per_channel(values: npt.NDArray[Any], ndim: int) -> npt.NDArray[Any]:
    """Reshape one value per channel to broadcast over a weight of `ndim` dimensions."""
    return values.reshape(-1, *[1] * (ndim - 1))


def of_module(bn: nn.modules.batchnorm._BatchNorm, bias: Floats) -> tuple[Floats, Floats]:
    """Return a BatchNorm module's multiplier and the folded bias of the convolution before it, both of shape [C].

    Args:
        bn: Module in eval mode, on any device.
        bias: The convolution's own bias; zeros if it has none.

    Raises:
        ValueError: The module has no running statistics.
    """
    if bn.running_mean is None or bn.running_var is None:
        msg = "a BatchNorm without running statistics cannot be folded"
        raise ValueError(msg)
    mean, sigma = _numbers(bn.running_mean), _numbers(torch.sqrt(bn.running_var + bn.eps))
    gamma = np.ones_like(mean) if bn.weight is None else _numbers(bn.weight)
    beta = np.zeros_like(mean) if bn.bias is None else _numbers(bn.bias)
    factor = multiplier(gamma, sigma)
    return factor, folded_bias(bias, beta, mean, factor)


def _numbers(tensor: Tensor) -> Floats:
    numbers: Floats = tensor.detach().cpu().numpy()
    return numbers
