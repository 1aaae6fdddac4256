"""Moves trained scales onto values that every target can store, before the delivered model is evaluated.

After this the lowering to each target is exact: what torch evaluated is what the files contain. Two limits matter.
TensorRT's float16 files hold scales in float16, and what a file holds of a weight is the scale after BN folding,
s |gamma / sigma|. ONNX Runtime holds a bias as int32 in units of s_x s_w; a smaller product overflows silently.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from artifacts.errors import UsageError
from crqat_train.fit import is_step
from crqat_train.graph import parameter
from crqat_train.layout import QuantizerSpec, quantizer_node
from crqat_train.methods import quantizer_of

# |bias| / (s_x s_w) stays below this, half of int32's range.
BIAS_LIMIT = 2.0**30
# float16's smallest positive number, and the spacing of its numbers below 2^-14, where scales so get coarse; the codes
# follow.
_FLOAT16_TINY = 2.0**-24
_FLOAT16_MAX = 65504.0
_STATISTICS = ("running_mean", "running_var")


def fold_multiplier(bn: torch.nn.modules.batchnorm._BatchNorm) -> Tensor:
    """What BN multiplies each channel of a convolution by: gamma / sqrt(running_var + eps), float32 of shape [C]."""
    gamma = bn.weight if bn.weight is not None else torch.ones_like(_running(bn.running_var))
    return gamma.detach() / torch.sqrt(_running(bn.running_var) + bn.eps)


def _running(statistics: Tensor | None) -> Tensor:
    if statistics is None:
        msg = "a BatchNorm without running statistics cannot be folded"
        raise ValueError(msg)
    return statistics


@torch.no_grad()
def make_representable(
    model: fx.GraphModule, specs: Sequence[QuantizerSpec], targets: Sequence[str], trained: bool = True
) -> list[str]:
    """Round the scales of a quantized model in place; call it before the final evaluation.

    Scales are rounded up, so that nothing that fitted is clipped. The change is below one part in a thousand for scales
    that float16 holds as normal numbers.

    Args:
        model: The quantized GraphModule in its final state.
        specs: Its quantizers.
        targets: "onnxruntime", "tensorrt" or both.
        trained: Whether it was trained after calibration; for messages.

    Returns:
        One line for each weight some of whose channels had to be raised to a larger scale.

    Raises:
        UsageError: A BatchNorm or a scale holds what no network can compute with, or a scale is larger than float16's
            largest number, with TensorRT in the targets.
    """
    why = "training diverged; lower qat.lr" if trained else "and nothing was trained: look at weights and images"
    check_values(model, "the network", why)
    scales = {spec.edge: quantizer_of(model, spec).scale for spec in specs}
    for spec in specs:
        if not bool(scales[spec.edge].isfinite().all()):
            msg = f"{spec.operation}: the scale of its {spec.kind} is infinite or no number: {why}"
            raise UsageError(msg)
    for spec in specs:
        if spec.kind == "activation" and "tensorrt" in targets:
            scales[spec.edge].copy_(_up_to_float16(scales[spec.edge], spec, why))
    notes = []
    for spec in specs:
        if spec.kind != "weight":
            continue
        scale = scales[spec.edge]
        multiplier, bias = _folded(model, spec, scale)
        folded = scale.reshape(-1) * multiplier.abs()
        smallest = torch.full_like(folded, _FLOAT16_TINY if "tensorrt" in targets else 0.0)
        if "onnxruntime" in targets and spec.input_edge is not None:
            smallest = torch.maximum(smallest, bias.abs() / BIAS_LIMIT / scales[spec.input_edge])
        # A channel that BN multiplies by 0 has codes 0 whatever its scale; it keeps the one it has.
        raised = (folded < smallest) & (multiplier != 0)
        folded = torch.where(raised, smallest, folded)
        if "tensorrt" in targets:
            folded = _up_to_float16(folded, spec, why)
        changed = (multiplier != 0) if "tensorrt" in targets else raised
        # The division's rounding alone must not make a scale smaller.
        final = torch.maximum(folded / multiplier.abs(), scale.reshape(-1))
        scale.copy_(torch.where(changed, final, scale.reshape(-1)).reshape(scale.shape))
        if bool(raised.any()):
            notes.append(
                f"{spec.operation}: scale of {int(raised.sum())} channels raised to what the targets can store"
            )
    return notes


def _folded(model: fx.GraphModule, spec: QuantizerSpec, scale: Tensor) -> tuple[Tensor, Tensor]:
    """BN's multiplier and the folded bias of the operation that a weight belongs to, both of shape [channels]."""
    operation = next(iter(quantizer_node(model, spec).users))
    argument = operation.args[2] if len(operation.args) > 2 else operation.kwargs.get("bias")
    bias = torch.zeros(scale.numel(), device=scale.device)
    if isinstance(argument, fx.Node):
        bias = parameter(model, argument).detach()
    if spec.bn is None:
        return torch.ones_like(bias), bias
    bn = model.get_submodule(spec.bn)
    if not isinstance(bn, torch.nn.modules.batchnorm._BatchNorm):
        msg = f"{spec.bn}: {type(bn).__name__} cannot be folded"
        raise TypeError(msg)
    multiplier = fold_multiplier(bn)
    shift = bn.bias.detach() if bn.bias is not None else torch.zeros_like(multiplier)
    return multiplier, shift + (bias - _running(bn.running_mean)) * multiplier


def check_values(model: torch.nn.Module, source: str, why: str = "the file is damaged") -> None:
    """See that a network's weights and statistics are numbers, and that no BatchNorm takes the root of a negative one.

    Quantizers' steps and buffers of other kinds, such as a mask of infinities, are not looked at.

    Args:
        model: In any state.
        source: Where its values come from, for the message.
        why: What to say of values that are no numbers.

    Raises:
        UsageError: The message names the first tensor, by its module, and what is wrong with it.
    """
    values: list[tuple[str, Tensor]] = [
        (name, tensor) for name, tensor in model.named_parameters() if not is_step(name)
    ]
    values += [(name, tensor) for name, tensor in model.named_buffers() if name.endswith(_STATISTICS)]
    for name, tensor in values:
        wrong = int((~tensor.isfinite()).sum())
        if wrong:
            msg = f"{source} holds values that are infinite or no number: {wrong} of {tensor.numel()} in {name}; {why}"
            raise UsageError(msg)
    for name, variance in values:
        if name.endswith("running_var") and bool((variance < 0).any()):
            channels, least = int((variance < 0).sum()), float(variance.min())
            msg = (
                f"{source}: {name} is negative in {channels} of {variance.numel()} channels (down to {least:g}), which "
                "no variance is; the weights are damaged, or not this network's"
            )
            raise UsageError(msg)


def _up_to_float16(scale: Tensor, spec: QuantizerSpec, why: str) -> Tensor:
    """The smallest float16 that is not below `scale`, as float32; at least float16's smallest number."""
    largest = float(scale.amax())
    if not largest <= _FLOAT16_MAX:
        msg = (
            f"{spec.operation}: a scale of {largest:g} is more than TensorRT's float16 holds: {why}, "
            "or take tensorrt out of `targets`"
        )
        raise UsageError(msg)
    rounded = scale.half()
    below = rounded.float() < scale
    return torch.where(below, torch.nextafter(rounded, torch.full_like(rounded, torch.inf)), rounded).float()
