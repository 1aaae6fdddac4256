"""What training at few bits needs, each a switch of the recipe's `qat` section; all of it follows from the step number.

Nothing in here waits for the device: Python branches on the number of the step alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, fx, nn

from crqat.train.config import QATConfig
from crqat.train.graph.operations import parameter
from crqat.train.placement.insert import codes_at, weight_node
from crqat.train.quantizers import MIN_SCALE, LSQQuantizer, Quantizer
from crqat.train.training.optimizer import Fit

_Compile = Callable[[nn.Module], Callable[..., Tensor]]


class LowBitTraining:
    """The switches in one training: `before_step` before each of its steps, `penalized` on each loss.

    Args:
        student: The quantized network.
        teacher: Its average, whose widths change with it; None if there is none.
        config: Which switches are on.
        fit: The training's optimizer, which knows the step.
        compile_model: Makes a module's forward pass faster, or returns it as it is.
    """

    def __init__(
        self,
        student: fx.GraphModule,
        teacher: fx.GraphModule | None,
        config: QATConfig,
        fit: Fit,
        compile_model: _Compile,
    ) -> None:
        self.config, self._fit = config, fit
        self._norms = [module for module in student.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self._quantizers = [q for model in (student, teacher) if model is not None for q in quantizers(model)]
        self._damping = compile_model(OscillationDamping(student)) if config.damping else None
        self._width: int | None = None
        self._begun = False

    def before_step(self) -> None:
        """Set what holds for the step that comes next."""
        step, steps, config = self._fit.steps_done, self._fit.steps, self.config
        if step >= config.freeze_bn_at * steps:
            for norm in self._norms:
                norm.training = False  # after each `student.train()` anew
        self._fit.scale_lr(0.0 if step >= config.freeze_ranges_at * steps else config.scale_lr)
        self.go_on()
        self._set_width(width_of_step(step, steps, config.progressive_bits), keep_range=True)

    def go_on(self) -> None:
        """Of a training that was interrupted: take on the width of the step before, whose scales were loaded."""
        step = self._fit.steps_done
        if not self._begun and step:
            width = width_of_step(step - 1, self._fit.steps, self.config.progressive_bits)
            self._set_width(width, keep_range=False)
        self._begun = True

    def penalized(self, loss: Tensor) -> Tensor:
        """The loss with the damping of oscillations, a scalar too."""
        if self._damping is None:
            return loss
        return loss + damping_weight(self._fit.steps_done, self._fit.steps, self.config.damping) * self._damping()

    def _set_width(self, width: int | None, keep_range: bool) -> None:
        if width == self._width:
            return
        self._width = width
        for quantizer in self._quantizers:
            set_width(quantizer, max(quantizer.spec.bits, width or 0), keep_range)
            # Steps of momentum were made in units of the old scale.
            momentum = self._fit.optimizer.state.get(quantizer.scale, {}).get("momentum_buffer")
            if keep_range and momentum is not None:
                momentum.zero_()


def quantizers(model: nn.Module) -> Iterator[Quantizer]:
    """All quantizers of a quantized network."""
    return cast("Iterator[Quantizer]", model.get_submodule("quantizers").children())


def width_of_step(step: int, steps: int, widths: tuple[int, ...]) -> int | None:
    """The width that no quantizer is below in a step; None in the last part of the steps, and without `widths`."""
    part = step * len(widths) // steps
    return widths[part] if part < len(widths) - 1 else None


@torch.no_grad()
def set_width(quantizer: Quantizer, bits: int, keep_range: bool = True) -> None:
    """Give a quantizer the codes of another width.

    Args:
        quantizer: Its `spec`, which says what it ends as, stays.
        bits: The width.
        keep_range: Change the scale so that the largest code stands for the same value as before.
    """
    qmin, qmax = codes_at(quantizer.spec, bits)
    factor = quantizer.qmax / qmax
    if factor != 1 and keep_range:
        quantizer.scale.mul_(factor)
    if isinstance(quantizer, LSQQuantizer):
        quantizer.grad_scale *= factor  # it is in proportion to 1 / qmax
    quantizer.qmin, quantizer.qmax = float(qmin), float(qmax)


def damping_weight(step: int, steps: int, largest: float) -> float:
    """lambda(t) of the damping: from 0 to `largest` as half a cosine."""
    return largest * 0.5 * (1.0 - math.cos(math.pi * step / steps))


class OscillationDamping(nn.Module):
    """Pulls latent weights to the centres of their bins, arXiv 2203.11086: sum of (w_hat - clip(w, s qmin, s qmax))^2.

    No gradient flows into the centres or the scales, and none into weights beyond the range, so that those stay free to
    come back.
    """

    def __init__(self, student: fx.GraphModule) -> None:
        super().__init__()
        weights = [quantizer for quantizer in quantizers(student) if quantizer.spec.kind == "weight"]
        # In a plain list: they are the student's, and no modules of this one.
        self._pairs = [(parameter(student, weight_node(student, q.spec)), q) for q in weights]

    def forward(self) -> Tensor:
        """The sum over all quantized weights, a scalar."""
        terms = []
        for weight, quantizer in self._pairs:
            scale = quantizer.scale.detach().clamp_min(MIN_SCALE)
            inside = torch.clamp(quantizer.values(weight), scale * quantizer.qmin, scale * quantizer.qmax)
            terms.append((quantizer(weight.detach()).detach() - inside).square().sum())
        return torch.stack(terms).sum()
