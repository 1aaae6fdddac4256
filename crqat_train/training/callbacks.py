"""Features of low-bit training, each a callback that a key of the recipe's `qat` section switches on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, fx, nn

from crqat.train.config import QATConfig
from crqat.train.graph.operations import parameter
from crqat.train.placement.insert import weight_node
from crqat.train.placement.quantizer_spec import codes_at
from crqat.train.quantizers import MIN_SCALE, LSQQuantizer, Quantizer
from crqat.train.training.optimizer import Fit

_Compile = Callable[[nn.Module], Callable[..., Tensor]]


class Callback:
    """A feature of a training, called by `crqat.train.training.loop` at fixed points; each method may do nothing.

    No method may wait for the device: no `.item()`, and no Python branch on a tensor's values. `fit.steps_done` of
    `fit.steps` steps are behind it at each call. A callback has no state of its own to save: what it does follows from
    the number of the step, so that a resumed training has the same bits.
    """

    def on_start(self, fit: Fit) -> None:
        """Before the first step, and after a saved state was loaded."""

    def before_step(self, fit: Fit) -> None:
        """Before the forward pass."""

    def add_to_loss(self, loss: Tensor, fit: Fit) -> Tensor:
        """The scalar loss with what the callback adds to it."""
        return loss

    def after_step(self, fit: Fit) -> None:
        """After the optimizer and the teacher."""

    def on_epoch_end(self, fit: Fit) -> None:
        """After an epoch's last step, before the network is evaluated."""


def low_bit_callbacks(
    student: fx.GraphModule, teacher: fx.GraphModule | None, config: QATConfig, compile_model: _Compile
) -> list[Callback]:
    """The features of low-bit training that a recipe's `qat` section switches on.

    Args:
        student: The quantized network.
        teacher: Its average, whose bit widths change with it; None if there is none.
        config: Which features are on.
        compile_model: Makes a module's forward pass faster, or returns it as it is.
    """
    found: list[Callback] = [
        FreezeBatchNorm(student, config.freeze_bn_at),
        ScaleLearningRate(config.scale_lr, config.freeze_ranges_at),
        ProgressiveBits((student,) if teacher is None else (student, teacher), config.progressive_bits),
    ]
    if config.damping:
        found.append(DampenOscillations(compile_model(OscillationDamping(student)), config.damping))
    return found


class FreezeBatchNorm(Callback):
    """From a share of the steps on, BatchNorm uses its running statistics and no longer changes them."""

    def __init__(self, student: nn.Module, at: float) -> None:
        self._norms = [module for module in student.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self._at = at

    def before_step(self, fit: Fit) -> None:
        """Freeze."""
        if fit.steps_done >= self._at * fit.steps:
            for norm in self._norms:
                norm.training = False  # after each `student.train()` anew


class ScaleLearningRate(Callback):
    """The quantizers' own learning rate, as a factor; from a share of the steps on they no longer change."""

    def __init__(self, factor: float, freeze_at: float) -> None:
        self._factor, self._freeze_at = factor, freeze_at

    def before_step(self, fit: Fit) -> None:
        """Set the factor."""
        fit.scale_lr(0.0 if fit.steps_done >= self._freeze_at * fit.steps else self._factor)


class ProgressiveBits(Callback):
    """Descending bit widths, an equal share of the steps each, below which no quantizer is."""

    def __init__(self, models: Sequence[nn.Module], widths: tuple[int, ...]) -> None:
        self._quantizers = [quantizer for model in models for quantizer in quantizers(model)]
        self._widths = widths
        self._width: int | None = None

    def on_start(self, fit: Fit) -> None:
        """In a resumed training: take the bit width of the step before, whose scales were loaded."""
        if fit.steps_done:
            self._set(width_of_step(fit.steps_done - 1, fit.steps, self._widths), fit, keep_range=False)

    def before_step(self, fit: Fit) -> None:
        """Change to the bit width of the step that comes next."""
        self._set(width_of_step(fit.steps_done, fit.steps, self._widths), fit, keep_range=True)

    def _set(self, width: int | None, fit: Fit, keep_range: bool) -> None:
        if width == self._width:
            return
        self._width = width
        for quantizer in self._quantizers:
            set_width(quantizer, max(quantizer.spec.bits, width or 0), keep_range)
            # Steps of momentum were made in units of the old scale.
            momentum = fit.optimizer.state.get(quantizer.scale, {}).get("momentum_buffer")
            if keep_range and momentum is not None:
                momentum.zero_()


class DampenOscillations(Callback):
    """Adds `OscillationDamping` to the loss, with a weight that rises over all steps."""

    def __init__(self, damping: Callable[[], Tensor], largest: float) -> None:
        self._damping, self._largest = damping, largest

    def add_to_loss(self, loss: Tensor, fit: Fit) -> Tensor:
        """The loss with the damping of oscillations, a scalar too."""
        return loss + damping_weight(fit.steps_done, fit.steps, self._largest) * self._damping()


def quantizers(model: nn.Module) -> Iterator[Quantizer]:
    """All quantizers of a quantized network."""
    return cast("Iterator[Quantizer]", model.get_submodule("quantizers").children())


def width_of_step(step: int, steps: int, widths: tuple[int, ...]) -> int | None:
    """The bit width that no quantizer is below in a step; None in the last part of the steps, and without `widths`."""
    part = step * len(widths) // steps
    return widths[part] if part < len(widths) - 1 else None


@torch.no_grad()
def set_width(quantizer: Quantizer, bits: int, keep_range: bool = True) -> None:
    """Give a quantizer the codes of another bit width.

    Args:
        quantizer: Its `spec`, which says what it ends as, stays.
        bits: The bit width.
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
