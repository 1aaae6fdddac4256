"""Adaptive rounding: chooses codes so that a layer's outputs, not its weights, come closest to the float network's.

The problem is AdaRound's (arXiv 2004.10568): minimize, for each layer, the squared error of its outputs against the
float network's, where the quantized layers before it compute its inputs. The error is quadratic in a channel's weights,
so only second moments of the inputs are kept. It is minimized by cyclic coordinate descent on the codes (QuantEase,
arXiv 2309.01885) instead of by gradients of a relaxed rounding. The descent has no learning rate and draws no random
numbers, and a code may end more than one scale away from its weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from crqat.core.errors import UsageError
from crqat.train.graph.operations import convolution_groups, is_linear, is_transposed
from crqat.train.ptq.walk import Layer
from crqat.train.quantizers import Quantizer

# Share of the mean diagonal that is added to a layer's second moments: the weight of a parameter's own error relative
# to that of the outputs on these images.
_DAMPING = 0.01
_SWEEPS = 20
# Largest number of patch values held in memory at a time.
_BLOCK = 1 << 24
# Number of positions, over all images, used for a layer's moments; neighbouring positions are similar.
_POSITIONS = 1 << 16


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer's inputs, mean over images and positions; float32.

    Attributes:
        quantized: Moments of the quantized network's inputs, shape [groups, K, K], where K is the number of
            weights of one output channel.
        mixed: Moments of the float network's inputs (rows) with the quantized network's (columns), same shape.
        damping: Factor, of shape [groups], by which the squared rounding error of the weights is added to the squared
            error of the outputs, so that the sum has one minimum even if inputs are linearly dependent.
    """

    quantized: Tensor
    mixed: Tensor
    damping: Tensor


def can_round(layer: Layer) -> bool:
    """Whether adaptive rounding supports a layer: a linear layer, or a 2D convolution with constant padding."""
    node = layer.node
    if is_linear(node):
        return True
    padding = node.kwargs.get("padding", node.args[4] if len(node.args) > 4 else 0)
    return layer.weight.ndim == 4 and not is_transposed(node) and not isinstance(padding, str)


def round_weight(layer: Layer, quantizer: Quantizer, centered: bool) -> None:
    """Round a layer's latent weight to its Grid, in place, so that its outputs come closest to the float network's.

    Args:
        layer: Layer that `walk` yielded.
        quantizer: Calibrated quantizer of its weight.
        centered: Ignore the mean of each output channel, because bias correction will fix it.

    Raises:
        UsageError: The weight's method transforms the weight before rounding.
    """
    weight = layer.weight.detach()
    if not torch.equal(quantizer.values(weight), weight.float()):
        msg = (
            f"ptq.adaround: {layer.spec.operation}: {type(quantizer).__name__} does not round the weight itself; use "
            "quantization.weight_method lsq, lsq+ or minmax"
        )
        raise UsageError(msg)
    groups = 1 if is_linear(layer.node) else convolution_groups(layer.node)
    found = moments(layer, groups, centered)
    steps = quantizer.scale.detach().reshape(-1).expand(weight.shape[0]).reshape(groups, -1, 1)
    asked = weight.float().reshape(groups, weight.shape[0] // groups, -1)
    codes = coordinate_descent(asked / steps, found, quantizer.qmin, quantizer.qmax)
    layer.weight.copy_((codes * steps).reshape(weight.shape))


def moments(layer: Layer, groups: int, centered: bool) -> Moments:
    """Return the second moments of a layer's inputs, with the damping that follows from them; see `Moments`.

    Args:
        layer: Layer with its inputs in the float network and in the quantized one.
        groups: Groups of the convolution; 1 for a linear layer.
        centered: Subtract the mean of each input.
    """
    original, quantized = layer.inputs
    size = layer.weight[0].numel()
    inner, outer = (original.new_zeros(groups, size, size, dtype=torch.float64) for _ in range(2))
    means = [original.new_zeros(groups, 1, size, dtype=torch.float64) for _ in range(2)]
    count = 0
    generator = torch.Generator().manual_seed(0)
    _, positions, values = _patches(layer, original[:1], groups, None).shape
    kept = min(positions, -(-max(_POSITIONS, 16 * size) // len(original)))
    images = max(1, _BLOCK // (groups * positions * values))
    for before, after in zip(torch.split(original, images), torch.split(quantized, images), strict=True):
        chosen = None if kept == positions else torch.randperm(positions, generator=generator)[:kept]
        x, y = _patches(layer, before, groups, chosen), _patches(layer, after, groups, chosen)
        inner += y.transpose(1, 2) @ y
        outer += x.transpose(1, 2) @ y
        means[0] += y.sum(1, keepdim=True)
        means[1] += x.sum(1, keepdim=True)
        count += y.shape[1]
    inner, outer = inner / count, outer / count
    # From the uncentered moments in all cases: with identical images, centered ones would be zero.
    damping = (_DAMPING * inner.diagonal(dim1=1, dim2=2).mean(1)).clamp_min(1e-12)
    if centered:
        of_quantized, of_float = (total / count for total in means)
        inner = inner - of_quantized.transpose(1, 2) @ of_quantized
        outer = outer - of_float.transpose(1, 2) @ of_quantized
    return Moments(inner.float(), outer.float(), damping.float())


def _patches(layer: Layer, x: Tensor, groups: int, chosen: Tensor | None) -> Tensor:
    """Return the input patches that meet the weights, float32 of shape [groups, positions of all images, K].

    Args:
        layer: Layer that defines the geometry.
        x: Inputs of shape [N, ...].
        groups: Groups of the convolution.
        chosen: Positions to use in each image, int64; None uses all.
    """
    node = layer.node
    if is_linear(node):
        rows = x.reshape(len(x), -1, x.shape[-1])
        return (rows if chosen is None else rows[:, chosen]).reshape(1, -1, x.shape[-1])
    stride, padding, dilation = (_pair(node, index, key, usual) for index, key, usual in _GEOMETRY)
    kernel = layer.weight.shape[2:]
    unfolded = functional.unfold(x, kernel, dilation, padding, stride)  # [N, C * kernel, positions]
    if chosen is not None:
        unfolded = unfolded[:, :, chosen]
    apart = unfolded.reshape(len(x), groups, -1, unfolded.shape[-1]).permute(1, 0, 3, 2)
    return apart.reshape(groups, -1, apart.shape[-1])


_GEOMETRY = ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))


def _pair(node: fx.Node, index: int, key: str, usual: int) -> tuple[int, int]:
    given: Any = node.kwargs.get(key, node.args[index] if len(node.args) > index else usual)
    return (given, given) if isinstance(given, int) else (given[0], given[-1])


def coordinate_descent(asked: Tensor, found: Moments, qmin: float, qmax: float) -> Tensor:
    """Return codes for weights so that a layer's outputs come closest to those of the unrounded weights `asked`.

    One code at a time is changed, until no change reduces the error or a limit of passes is reached.

    Args:
        asked: Target weights in units of their scale, float32 of shape [groups, channels of a group, K].
        found: Second moments of the inputs.
        qmin: Smallest code.
        qmax: Largest code.

    Returns:
        Integer codes, in the shape of `asked`.
    """
    damping = found.damping[:, None]
    size = asked.shape[2]
    inner = found.quantized + damping[:, :, None] * torch.eye(size, device=asked.device)
    codes = asked.round().clamp(qmin, qmax)
    # Half the gradient of the squared error with respect to each code.
    gradient = codes @ inner - asked @ found.mixed - damping[:, :, None] * asked
    curvature = inner.diagonal(dim1=1, dim2=2)
    for _ in range(_SWEEPS):
        changed = False
        for index in range(size):
            old = codes[:, :, index]
            new = (old - gradient[:, :, index] / curvature[:, index, None]).round().clamp(qmin, qmax)
            step = new - old
            if bool(step.any()):
                changed = True
                codes[:, :, index] = new
                gradient += step[:, :, None] * inner[:, None, index]
        if not changed:
            break
    return codes
