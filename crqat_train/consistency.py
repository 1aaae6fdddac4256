"""The consistency term of CR-QAT (arXiv 2402.13497), its teacher and its schedule.

L = CE(f(A1(x)), y) + lambda(t) mean KL(softmax(f'(A2(x)) / T) || softmax(f(A1(x)) / T)) T^2
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from crqat_train.config import ConsistencyConfig


def consistency_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of softened predictions, averaged over the batch, times the temperature squared.

    Args:
        student: Logits of shape [N, classes] that get the gradient.
        teacher: Logits of the same images under another augmentation; no gradient flows into them.
        temperature: Of both softmaxes.

    Returns:
        A scalar. The factor T^2 keeps the gradient's size independent of T.
    """
    target = functional.log_softmax(teacher.detach() / temperature, dim=1)
    prediction = functional.log_softmax(student / temperature, dim=1)
    return functional.kl_div(prediction, target, reduction="batchmean", log_target=True) * temperature**2


def consistency_weight(step: int, steps: int, config: ConsistencyConfig) -> float:
    """lambda(t): sigmoid-shaped ramp-up to `weight` over the first `ramp_up` share of the steps, then constant."""
    ramp = config.ramp_up * steps
    if step >= ramp:
        return config.weight
    return config.weight * math.exp(-5.0 * (1.0 - step / ramp) ** 2)


def ema_alpha(step: int, decay: float) -> float:
    """The teacher's alpha after step `step` (from 0): min(1 - 1/(t+1), decay), an average at first."""
    return min(1.0 - 1.0 / (step + 1), decay)


class EMATeacher:
    """theta' <- alpha theta' + (1 - alpha) theta, matched by name.

    Weights, BN affine parameters and quantizer scales are averaged. BN running statistics are averages already and are
    copied; left alone they would ruin a mean teacher. Integer buffers are copied.

    Raises:
        ValueError: The networks' tensors differ in name or shape.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        self._average: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._copy: tuple[list[Tensor], list[Tensor]] = ([], [])
        parameters = dict(teacher.named_parameters()), dict(student.named_parameters())
        buffers = dict(teacher.named_buffers()), dict(student.named_buffers())
        for (own, others), pairs in ((parameters, self._average), (buffers, self._copy)):
            shapes = [{(name, tensor.shape) for name, tensor in side.items()} for side in (own, others)]
            if shapes[0] != shapes[1]:
                msg = f"teacher and student differ: {sorted({name for name, _ in shapes[0] ^ shapes[1]})[:3]}"
                raise ValueError(msg)
            for name, tensor in own.items():
                pairs[0].append(tensor.detach())
                pairs[1].append(others[name].detach())

    @torch.no_grad()
    def update(self, alpha: float) -> None:
        """Move the teacher; two fused calls over all tensors, no host synchronization."""
        torch._foreach_lerp_(self._average[0], self._average[1], 1.0 - alpha)
        torch._foreach_copy_(self._copy[0], self._copy[1])
