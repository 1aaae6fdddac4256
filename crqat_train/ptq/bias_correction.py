"""Bias correction: moves the mean of each output channel to that of the float network (1906.04721)."""

from __future__ import annotations

from torch import Tensor, fx

from crqat.train.graph.operations import parameter
from crqat.train.ptq.shared import is_shared
from crqat.train.ptq.walk import Output


def correct(model: fx.GraphModule, output: Output) -> bool:
    """Correct a layer so that the mean of each output channel equals that of the float network.

    The layer's bias, or the mean of the BatchNorm after it, is changed in place.

    If the bias is corrected, the quantized network's values in `output` change with it, so that later layers are
    corrected for the inputs that they will get.

    Args:
        model: The quantized network.
        output: Outputs of the layer in both networks.

    Returns:
        Whether the layer has a bias or BatchNorm that can be corrected.
    """
    own, quantized = output.outputs
    channel = own.ndim - 1 if output.layer.weight.ndim == 2 else 1
    others = [axis for axis in range(own.ndim) if axis != channel]
    shift = quantized.double().mean(others) - own.double().mean(others)
    target = place(model, output.layer.node, output.layer.spec.bn)
    if target is None:
        return False
    values, sign = target
    values += sign * shift.to(values.dtype)
    if sign < 0:
        quantized -= shift.to(quantized.dtype).reshape([-1 if axis == channel else 1 for axis in range(own.ndim)])
    return True


def place(model: fx.GraphModule, node: fx.Node, bn: str | None) -> tuple[Tensor, float] | None:
    """Find the tensor that can shift a layer's outputs: its bias, or the mean of the BatchNorm after it.

    Returns:
        The tensor and the sign of the shift; None if the layer has neither, or shares it with other layers.
    """
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    if isinstance(bias, fx.Node) and bias.op == "get_attr":
        if is_shared(model, bias):
            return None
        return parameter(model, bias).data, -1.0
    norm = next((user for user in node.users if str(user.target) == bn), None)
    if bn is not None and norm is not None and not is_shared(model, norm):
        mean = model.get_submodule(bn).running_mean
        return (mean, 1.0) if isinstance(mean, Tensor) else None
    return None
