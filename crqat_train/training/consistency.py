"""Consistency term of CR-QAT (arXiv 2402.13497), its teacher and its schedule.

L = CE(f(A1(x)), y) + lambda(t) mean KL(softmax(f'(A2(x)) / T) || softmax(f(A1(x)) / T)) T^2

f is the student, f' the teacher, A1 and A2 are random augmentations of the images x with labels y, and T is the
temperature; lambda(t) is the weight in step t.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from crqat.train.config import ConsistencyConfig
from crqat.train.distributed import unwrapped
from crqat.train.quantized_model import QuantizedModel


def consistency_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(teacher || student) of softened predictions, averaged over the batch, times the temperature squared.

    Args:
        student: Logits of shape [N, classes]; the gradient flows into them.
        teacher: Logits of the same images under another augmentation; no gradient flows into them.
        temperature: Softmax temperature of student and teacher.

    Returns:
        A scalar. The factor T^2 keeps the gradient's size independent of T.
    """
    target = functional.log_softmax(teacher.detach() / temperature, dim=1)
    prediction = functional.log_softmax(student / temperature, dim=1)
    return functional.kl_div(prediction, target, reduction="batchmean", log_target=True) * temperature**2


def consistency_weight(step: int, steps: int, config: ConsistencyConfig) -> float:
    """Return lambda(t): a sigmoid-shaped ramp-up to `weight` over the `ramp_up` share of the steps, then constant."""
    ramp = config.ramp_up * steps
    if step >= ramp:
        return config.weight
    return config.weight * math.exp(-5.0 * (1.0 - step / ramp) ** 2)


def ema_alpha(step: int, decay: float) -> float:
    """Return alpha of the moving average after step t = `step`, counted from 0: min(1 - 1/(t+1), decay).

    While it is below `decay`, the teacher is the plain average of the student after each step.
    """
    return min(1.0 - 1.0 / (step + 1), decay)


class WeightAverage:
    """Averages the student's tensors into the teacher, by name: theta' <- alpha theta' + (1 - alpha) theta.

    Weights, BN affine parameters, quantizer scales and floating-point buffers are averaged. BN running statistics are
    among them, because averaged weights do not fit the statistics of the student's last steps. Integer buffers are
    copied, and so is a buffer that holds infinity, as a mask does: its average would be NaN.

    Raises:
        ValueError: The networks' tensors differ in name or shape.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        self._average: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._copy: tuple[list[Tensor], list[Tensor]] = ([], [])
        parameters = dict(teacher.named_parameters()), dict(student.named_parameters())
        buffers = dict(teacher.named_buffers()), dict(student.named_buffers())
        for own, others in (parameters, buffers):
            shapes = [{(name, tensor.shape) for name, tensor in side.items()} for side in (own, others)]
            if shapes[0] != shapes[1]:
                msg = f"teacher and student differ: {sorted({name for name, _ in shapes[0] ^ shapes[1]})[:3]}"
                raise ValueError(msg)
            for name, tensor in own.items():
                averaged = own is parameters[0] or (tensor.is_floating_point() and bool(tensor.isfinite().all()))
                pairs = self._average if averaged else self._copy
                pairs[0].append(tensor.detach())
                pairs[1].append(others[name].detach())

    @torch.no_grad()
    def update(self, alpha: float) -> None:
        """Update the teacher by two fused calls over all tensors, without host synchronization."""
        torch._foreach_lerp_(self._average[0], self._average[1], 1.0 - alpha)
        if self._copy[0]:  # a network without BN has no buffers
            torch._foreach_copy_(self._copy[0], self._copy[1])


class EMATeacher:
    """A copy of a network whose tensors follow the network's as an exponential moving average.

    Call it on the weakly augmented view of a batch, and `update` after each optimizer step. It counts its own steps:
    step t uses alpha = min(1 - 1/(t + 1), decay), so the first update copies the student.

    Args:
        student: The network that is trained; DistributedDataParallel and torch.compile wrappers are unwrapped.
        decay: Largest alpha of theta' <- alpha theta' + (1 - alpha) theta.

    Attributes:
        model: The teacher's network, in eval mode, without gradients. Export this one.
        steps: Number of updates so far; set it when a training run is resumed.

    Raises:
        ValueError: `decay` is not in [0, 1).
    """

    def __init__(self, student: nn.Module, decay: float = 0.99) -> None:
        if not 0 <= decay < 1:
            msg = f"decay is {decay:g}, not in [0, 1)"
            raise ValueError(msg)
        inner = unwrapped(student)
        self.model: Any = copy.deepcopy(inner).eval().requires_grad_(False)
        self.decay, self.steps = decay, 0
        self._average = WeightAverage(self.model, inner)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the teacher's logits of shape [N, classes], without gradient, for images of shape [N, C, H, W]."""
        with torch.no_grad():
            logits: Tensor = self.model(images)
        return logits

    def update(self) -> None:
        """Move the teacher towards the student, without waiting for the device."""
        self._average.update(ema_alpha(self.steps, self.decay))
        self.steps += 1


class ConsistencyTraining:
    """Networks of a training step: the student, and the teacher if there is one; plain QAT has none.

    Args:
        student: The network that is trained: the quantized network, or the float network in its own training.
        float_model: The float network that the student was quantized from, or the student itself if it is float.
        config: Settings of the teacher and of the consistency term.
        compile_model: Applies `torch.compile`, or returns the network unchanged.

    Attributes:
        student: The student's compiled forward pass: images to logits.
        teacher: The EMA teacher, None unless the recipe asks for one.
        views: Number of augmented views of each image that a step needs.
        pseudo_labels: Whether pseudo-labels of the float network replace a teacher.
    """

    def __init__(
        self,
        student: nn.Module,
        float_model: nn.Module,
        config: ConsistencyConfig,
        compile_model: Callable[[nn.Module], Callable[[Tensor], Tensor]],
    ) -> None:
        self.config = config
        self.student = compile_model(student)
        self.teacher: QuantizedModel | None = None
        self._teach: Callable[[Tensor], Tensor] | None = None
        if config.teacher == "ema":
            self._average = EMATeacher(student, config.ema_decay)
            self.teacher = self._average.model
        # With weight 0 the teacher is only an average of the student's weights: it costs no forward pass.
        if self.teacher is not None and config.weight > 0:
            self._teach = compile_model(self.teacher)
        elif config.teacher == "float" and config.weight > 0:
            self._teach = compile_model(copy.deepcopy(float_model).eval().requires_grad_(False))
        self.views = 1 if self._teach is None else 2
        self.pseudo_labels = config.teacher == "pseudo-label" and config.weight > 0

    def weight(self, step: int, steps: int) -> float:
        """Return lambda(t) of step `step` of `steps`; 0 without a teacher."""
        if self._teach is None and not self.pseudo_labels:
            return 0.0
        return consistency_weight(step, steps, self.config)

    def target(self, images: Tensor) -> Tensor:
        """Return the teacher's logits for the second view of the images, without gradient.

        Raises:
            ValueError: There is no teacher: `views` is 1.
        """
        if self._teach is None:
            msg = "this training has no teacher"
            raise ValueError(msg)
        with torch.no_grad():
            return self._teach(images)

    def update_teacher(self, step: int) -> None:
        """Update the teacher after optimizer step `step`, counted from 0."""
        if self.teacher is not None:
            self._average.steps = step  # a resumed training counts on
            self._average.update()
