"""Cross-layer equalization (arXiv 1906.04721, section 4.1) of two layers with at most a ReLU between them.

Each channel between the two layers is divided by a factor of its own, and the second layer's weights that consume the
channel are multiplied by this factor. The network's function does not change, and the activation's scale, which all
channels share, fits each channel better. The first layer's weights have a scale for each output channel, so their
ranges do not matter: the factors balance each channel's range against the second layer's weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from crqat.train.graph.operations import convolution_groups, is_batch_norm, is_linear, is_transposed, parameter
from crqat.train.placement.insert import quantizer_node
from crqat.train.placement.quantizer_spec import QuantizerSpec
from crqat.train.ptq.shared import is_shared
from crqat.train.quantizers import specs_of
from crqat.train.quantizers.calibration import Hook, hooked, only

# Largest factor, so that a channel that is hardly used is not blown up.
_LARGEST_FACTOR = 64.0
# max(0, s x) = s max(0, x), and pooling likewise; a ReLU6 or a sigmoid does not have this property.
_HOMOGENEOUS = (nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Identity, nn.modules.dropout._DropoutNd)
_FUNCTIONS = {functional.relu, torch.relu, "relu", "relu_"}


@dataclass(frozen=True)
class Pair:
    """Two layers, and the activation between them.

    Attributes:
        first: Operation that computes the channels.
        norm: The BatchNorm after `first`; None if there is none.
        second: The only operation that consumes the channels.
        between: Spec of the activation's quantizer, whose input is observed.
    """

    first: fx.Node
    norm: nn.modules.batchnorm._BatchNorm | None
    second: fx.Node
    between: QuantizerSpec


@torch.no_grad()
def equalize(model: fx.GraphModule, batches: list[Tensor]) -> int:
    """Equalize the channel ranges of pairs of layers, in place.

    Weights and BatchNorms change only where that leaves the float network's function unchanged.

    Args:
        model: Quantized network in eval mode, not calibrated yet.
        batches: Normalized images, float32 of shape [N, C, H, W] each.

    Returns:
        The number of pairs of layers that were equalized.
    """
    found = pairs(model)
    peaks: dict[str, Tensor] = {}

    def look_at(spec: QuantizerSpec) -> Hook:
        def look(_: nn.Module, inputs: tuple[Tensor], __: Tensor) -> None:
            x = inputs[0].abs()
            peak = x.amax([axis for axis in range(x.ndim) if axis != 1])
            peaks[spec.edge] = torch.maximum(peaks.get(spec.edge, torch.zeros_like(peak)), peak)

        return look

    with only(model, []), hooked(model, [(pair.between, look_at(pair.between)) for pair in found]):
        for batch in batches:
            model(batch)
    for pair in found:
        _equalize(model, pair, peaks[pair.between.edge])
    return len(found)


def _equalize(model: fx.GraphModule, pair: Pair, peak: Tensor) -> None:
    reader = _weight(model, pair.second)
    if convolution_groups(pair.second) == 1:
        # The weights have scales for output channels, but share them over input channels.
        by_channel = reader.reshape(len(reader), len(peak), -1).abs().amax((0, 2))
        factor = (peak / by_channel.clamp_min(1e-12)).sqrt()
    else:
        factor = peak.clone()  # each channel's weights have their own scale, so any factor fits them
    used = (peak > 0) & (factor > 0)
    if not bool(used.any()):
        return
    factor = (factor / factor[used].log().mean().exp()).clamp(1 / _LARGEST_FACTOR, _LARGEST_FACTOR)
    factor = torch.where(used, factor, torch.ones_like(factor))
    shape = [-1, *[1] * (reader.ndim - 1)]
    if convolution_groups(pair.second) == 1:
        reader.mul_(factor.reshape(1, *shape[:-1]))
    else:
        reader.mul_(factor.reshape(shape))
    if pair.norm is not None:
        pair.norm.weight.div_(factor)
        pair.norm.bias.div_(factor)
        return
    writer = _weight(model, pair.first)
    writer.div_(factor.reshape(-1, *[1] * (writer.ndim - 1)))
    bias = pair.first.args[2] if len(pair.first.args) > 2 else None
    if isinstance(bias, fx.Node):
        parameter(model, bias).div_(factor)


def pairs(model: fx.GraphModule) -> list[Pair]:
    """Return all pairs of layers between which equalization is exact, in the order of the graph."""
    found = []
    by_module = {f"quantizers.{spec.module_name}": spec for spec in specs_of(model)}
    calls: dict[str, int] = {}
    for node in model.graph.nodes:
        calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    for spec in specs_of(model):
        if spec.kind != "weight":
            continue
        second = next(iter(quantizer_node(model, spec).users))
        pair = _pair(model, second, by_module, calls)
        if pair is not None:
            found.append(pair)
    return found


def _pair(
    model: fx.GraphModule, second: fx.Node, by_module: dict[str, QuantizerSpec], calls: dict[str, int]
) -> Pair | None:
    """Return the pair that ends with a layer; None if no layer before it allows exact equalization."""
    # A linear layer works on the last axis, which need not be that of the channels.
    if is_linear(second) or is_transposed(second) or not _own_weight(model, second, calls):
        return None
    between, norm = None, None
    source = second.args[0]
    while isinstance(source, fx.Node) and len(source.users) == 1:
        if norm is None and source.op == "call_function" and _is_layer(source):
            writes = _weight(model, source)
            same = writes.shape[0] == _channels_read(model, second)
            usable = between is not None and same and not is_linear(source) and not is_transposed(source)
            bias = source.args[2] if len(source.args) > 2 else None
            usable = usable and not (isinstance(bias, fx.Node) and is_shared(model, bias))
            return Pair(source, None, second, between) if usable and _own_weight(model, source, calls) else None  # type: ignore[arg-type]
        if source.op == "call_module" and str(source.target) in by_module:
            if calls[str(source.target)] > 1:
                return None
            between = between or by_module[str(source.target)]
        elif is_batch_norm(model, source):
            module = model.get_submodule(str(source.target))
            before = source.args[0]
            usable = (
                between is not None
                and isinstance(module, nn.modules.batchnorm._BatchNorm)
                and module.weight is not None
                and not is_shared(model, source)
                and module.num_features == _channels_read(model, second)
                and isinstance(before, fx.Node)
                and _is_layer(before)
                and len(before.users) == 1
            )
            return Pair(before, module, second, between) if usable else None  # type: ignore[arg-type]
        elif not _homogeneous(model, source):
            return None
        source = source.args[0]
    return None


def _homogeneous(model: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(model.get_submodule(str(node.target)), _HOMOGENEOUS)
    return node.target in _FUNCTIONS


def _is_layer(node: fx.Node) -> bool:
    return str(getattr(node.target, "__name__", "")) in {"conv2d", "linear"}


def _own_weight(model: fx.GraphModule, node: fx.Node, calls: dict[str, int]) -> bool:
    """Whether a layer's weight is quantized, and no other operation uses the weight or its quantizer."""
    if not _is_layer(node) or len(node.args) < 2 or not isinstance(node.args[1], fx.Node):
        return False
    rounding = node.args[1]
    stored = rounding.args[0] if rounding.op == "call_module" else None
    return (
        isinstance(stored, fx.Node)
        and stored.op == "get_attr"
        and calls[str(stored.target)] == calls[str(rounding.target)] == 1
        and len(rounding.users) == len(stored.users) == 1
    )


def _weight(model: fx.GraphModule, node: fx.Node) -> Tensor:
    """Return the latent weight of a layer whose weight is quantized."""
    return parameter(model, node.args[1].args[0]).data  # type: ignore[union-attr,arg-type]


def _channels_read(model: fx.GraphModule, node: fx.Node) -> int:
    weight, groups = _weight(model, node), convolution_groups(node)
    if groups == 1:
        return int(weight.shape[1])
    # In other groupings the weights that consume a channel share scales with those of other channels.
    return int(weight.shape[0]) if weight.shape[1] == 1 and groups == weight.shape[0] else -1
