"""Rounds trained scales to values that every target can store, before the delivered model is evaluated.

After this step the conversion for each target is exact: the files contain what torch evaluated. Scales have two limits.
A target may store scales in float16; the scale that a file stores for a weight is the one after BN folding,
s |gamma / sigma|. A target may also store the bias as int32 in units of s_x s_w: if this product is too small, the bias
overflows silently. `crqat.core.targets` says which limits each target has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from crqat.core import targets as runtimes
from crqat.core.errors import UsageError
from crqat.core.targets.scale_rounding import folded_scale, round_up, too_large, unfolded
from crqat.train.graph import fold_batchnorm
from crqat.train.graph.operations import parameter
from crqat.train.placement.insert import quantizer_node
from crqat.train.placement.quantizer_spec import QuantizerSpec
from crqat.train.quantizers import MIN_SCALE, quantizer_of, specs_of
from crqat.train.quantizers.base import is_step

_STATISTICS = ("running_mean", "running_var")


@torch.no_grad()
def make_representable(model: fx.GraphModule, targets: Sequence[str], trained: bool = True) -> list[str]:
    """Round the scales of a quantized model in place; call it before the final evaluation.

    Scales are rounded up, so that no value is clipped that was not before. The change is below one part in a thousand
    for scales that float16 holds as normal numbers. A weight's scale is raised further if it is below the smallest
    value that a target can store, or if the int32 bias would overflow.

    Args:
        model: The quantized GraphModule in its final state.
        targets: Names of the target runtimes; see `crqat.core.targets`.
        trained: Whether the model was trained after calibration; used in messages only.

    Returns:
        One line for each weight with channels whose scale was raised further; rounding up is not reported.

    Raises:
        UsageError: A BatchNorm or a scale holds values that are not finite or not valid, or a scale is larger than a
            target can store.
    """
    why = "training diverged; lower qat.lr" if trained else "nothing was trained, so check the weights and the images"
    check_values(model, "the network", why)
    constraints = runtimes.union(targets)
    specs = specs_of(model)
    torch._foreach_clamp_min_([quantizer_of(model, spec).scale for spec in specs], MIN_SCALE)
    scales = {spec.edge: quantizer_of(model, spec).scale for spec in specs}
    for spec in specs:
        if not bool(scales[spec.edge].isfinite().all()):
            msg = f"{spec.operation}: the scale of its {spec.kind} is infinite or NaN: {why}"
            raise UsageError(msg)
    if _representable(model, scales, constraints):
        return []
    for spec in specs:
        if spec.kind == "activation":
            scale = scales[spec.edge]
            scale.copy_(_like(scale, _stored(constraints, _numbers(scale), spec, why)))
    notes = []
    for spec in specs:
        if spec.kind != "weight":
            continue
        scale = scales[spec.edge]
        asked = _numbers(scale).reshape(-1)
        multiplier, bias = _folded(model, spec, scale.numel())
        fed = None if spec.input_edge is None else np.float32(scales[spec.input_edge].item())
        folded, raised = folded_scale(asked, multiplier, bias, fed, constraints.targets)
        folded = _stored(constraints, folded, spec, why)
        scale.copy_(_like(scale, unfolded(folded, asked, multiplier, raised, constraints.targets)))
        if raised.any():
            notes.append(
                f"{spec.operation}: scale of {int(raised.sum())} channels raised to what the targets can store"
            )
    return notes


def _representable(model: fx.GraphModule, scales: Mapping[str, Tensor], constraints: runtimes.Constraints) -> bool:
    """Whether all scales have been rounded to storable values before, so that rounding again must change nothing.

    Folding BN into a scale and dividing it out again leaves a rounding error. Without this test, rounding up a second
    time could therefore move a scale to the next larger storable value. All scales of a network are tested together: a
    single trained scale may be that close to a storable value by chance.
    """
    for spec in specs_of(model):
        scale = scales[spec.edge]
        values, rounding = _numbers(scale).reshape(-1), np.float32(0.0)
        if spec.kind == "weight":
            rounding = np.float32(2.0**-22)
            multiplier, bias = _folded(model, spec, scale.numel())
            fed = None if spec.input_edge is None else np.float32(scales[spec.input_edge].item())
            if folded_scale(values * (1 + rounding), multiplier, bias, fed, constraints.targets)[1].any():
                return False
            values = (values * np.abs(multiplier))[multiplier != 0]
        with np.errstate(over="ignore"):
            if (round_up(values * (1 - rounding), constraints.targets) > values * (1 + rounding)).any():
                return False
    return True


def _folded(
    model: fx.GraphModule, spec: QuantizerSpec, channels: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return BN's multiplier and the folded bias of the operation that a weight belongs to, both of shape [scales]."""
    operation = next(iter(quantizer_node(model, spec).users))
    argument = operation.args[2] if len(operation.args) > 2 else operation.kwargs.get("bias")
    bias = np.zeros(channels, np.float32)
    if isinstance(argument, fx.Node):
        bias = _numbers(parameter(model, argument))
    if spec.channels is None:  # one scale for all channels: the largest bias needs most of it
        bias = np.abs(bias).max(keepdims=True)
    if spec.bn is None:
        return np.ones_like(bias), bias
    bn = model.get_submodule(spec.bn)
    if not isinstance(bn, torch.nn.modules.batchnorm._BatchNorm):
        msg = f"{spec.bn}: {type(bn).__name__} cannot be folded into a convolution"
        raise TypeError(msg)
    return fold_batchnorm.of_module(bn, bias)


def check_values(model: torch.nn.Module, source: str, why: str = "the file is damaged") -> None:
    """Check that a network's weights and statistics are finite, and that no BatchNorm has a negative variance.

    Not checked are the quantizers' scales, and buffers other than statistics, such as a mask that holds infinity.

    Args:
        model: Network in any state.
        source: Where its values come from; used in the message.
        why: The likely cause of values that are not finite; used in the message.

    Raises:
        UsageError: A value is not valid; the message names the tensor and what is wrong with it.
    """
    values: list[tuple[str, Tensor]] = [
        (name, tensor) for name, tensor in model.named_parameters() if not is_step(name)
    ]
    values += [(name, tensor) for name, tensor in model.named_buffers() if name.endswith(_STATISTICS)]
    for name, tensor in values:
        wrong = int((~tensor.isfinite()).sum())
        if wrong:
            msg = f"{source} holds values that are infinite or NaN: {wrong} of {tensor.numel()} in {name}; {why}"
            raise UsageError(msg)
    for name, variance in values:
        if name.endswith("running_var") and bool((variance < 0).any()):
            channels, least = int((variance < 0).sum()), float(variance.min())
            msg = (
                f"{source}: {name} is negative in {channels} of {variance.numel()} channels (down to {least:g}), but "
                "it is a variance; the weights are damaged, or belong to another network"
            )
            raise UsageError(msg)


def _stored(
    constraints: runtimes.Constraints, scale: npt.NDArray[np.float32], spec: QuantizerSpec, why: str
) -> npt.NDArray[np.float32]:
    """Return the smallest scales that all targets store and that are not below `scale`."""
    target = too_large(scale, constraints.targets)
    if target is not None:
        msg = (
            f"{spec.operation}: a scale of {scale.max():g} is more than {target.title}'s "
            f"{target.scale_type} holds: {why}, or take {target.name} out of `targets`"
        )
        raise UsageError(msg)
    return round_up(scale, constraints.targets)


def _numbers(tensor: Tensor) -> npt.NDArray[np.float32]:
    numbers: npt.NDArray[np.float32] = tensor.detach().cpu().numpy()
    return numbers


def _like(tensor: Tensor, numbers: npt.NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(numbers).to(tensor.device).reshape(tensor.shape)
