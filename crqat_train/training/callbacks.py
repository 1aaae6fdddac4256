"""Features of low-bit training: callbacks that keys of the recipe's `qat` section switch on."""

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
    """Base class for a feature of a training run; `crqat.train.training.loop` calls its methods at fixed points.

    The methods of this base class do nothing.

    No method may wait for the device: no `.item()`, and no Python branch on a tensor's values. At each call,
    `fit.steps_done` of `fit.steps` steps are done. A callback must not keep state: what it does depends on the number
    of the step alone, so that a resumed training run has the same bits.
    """

    def on_start(self, fit: Fit) -> None:
        """Called before the first step, and after a saved state was loaded."""

    def before_step(self, fit: Fit) -> None:
        """Called before the forward pass of each step."""

    def add_to_loss(self, loss: Tensor, fit: Fit) -> Tensor:
        """Return the scalar loss plus the callback's own term."""
        return loss

    def after_step(self, fit: Fit) -> None:
        """Called after each step, when network and teacher are updated."""

    def on_epoch_end(self, fit: Fit) -> None:
        """Called after an epoch's last step, before the network is evaluated."""


def low_bit_callbacks(
    student: fx.GraphModule, teacher: fx.GraphModule | None, config: QATConfig, compile_model: _Compile
) -> list[Callback]:
    """Return the callbacks of low-bit training that a recipe's `qat` section switches on.

    Args:
        student: The quantized network.
        teacher: Moving average of the student, whose bit widths change with it; None if there is none.
        config: Which features are switched on.
        compile_model: Applies `torch.compile`, or returns the module unchanged.
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
    """Freezes BatchNorm's running statistics after a given share of the steps, and normalizes with them."""

    def __init__(self, student: nn.Module, at: float) -> None:
        self._norms = [module for module in student.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self._at = at

    def before_step(self, fit: Fit) -> None:
        """Switch BatchNorm to its running statistics for the rest of the training, once enough steps are done."""
        if fit.steps_done >= self._at * fit.steps:
            for norm in self._norms:
                norm.training = False  # again after each `student.train()`


class ScaleLearningRate(Callback):
    """Sets the quantizers' learning rate to a multiple of the network's, and to 0 after a given share of the steps."""

    def __init__(self, factor: float, freeze_at: float) -> None:
        self._factor, self._freeze_at = factor, freeze_at

    def before_step(self, fit: Fit) -> None:
        """Set the factor of the quantizers' learning rate for the next step."""
        fit.scale_lr(0.0 if fit.steps_done >= self._freeze_at * fit.steps else self._factor)


class ProgressiveBits(Callback):
    """Lowers the bit widths step by step: each lower bound on them holds for an equal share of the training steps."""

    def __init__(self, models: Sequence[nn.Module], widths: tuple[int, ...]) -> None:
        self._quantizers = [quantizer for model in models for quantizer in quantizers(model)]
        self._widths = widths
        self._width: int | None = None

    def on_start(self, fit: Fit) -> None:
        """On resuming, set the bit width of the previous step, to which the loaded scales belong."""
        if fit.steps_done:
            self._set(width_of_step(fit.steps_done - 1, fit.steps, self._widths), fit, keep_range=False)

    def before_step(self, fit: Fit) -> None:
        """Set the lower bound on all bit widths for the next step."""
        self._set(width_of_step(fit.steps_done, fit.steps, self._widths), fit, keep_range=True)

    def _set(self, width: int | None, fit: Fit, keep_range: bool) -> None:
        if width == self._width:
            return
        self._width = width
        for quantizer in self._quantizers:
            set_width(quantizer, max(quantizer.spec.bits, width or 0), keep_range)
            # The momentum was accumulated in units of the old scale.
            momentum = fit.optimizer.state.get(quantizer.scale, {}).get("momentum_buffer")
            if keep_range and momentum is not None:
                momentum.zero_()


class DampenOscillations(Callback):
    """Adds `OscillationDamping` to the loss, with a weight that rises over all steps."""

    def __init__(self, damping: Callable[[], Tensor], largest: float) -> None:
        self._damping, self._largest = damping, largest

    def add_to_loss(self, loss: Tensor, fit: Fit) -> Tensor:
        """Return the scalar loss plus the weighted `OscillationDamping`."""
        return loss + damping_weight(fit.steps_done, fit.steps, self._largest) * self._damping()


def quantizers(model: nn.Module) -> Iterator[Quantizer]:
    """Yield all quantizers of a quantized network."""
    return cast("Iterator[Quantizer]", model.get_submodule("quantizers").children())


def width_of_step(step: int, steps: int, widths: tuple[int, ...]) -> int | None:
    """Return the lower bound on all bit widths in a step, one of `widths`; None where there is no bound.

    Each entry of `widths` holds for an equal share of the steps. There is no bound in the last share, or if `widths` is
    empty.
    """
    part = step * len(widths) // steps
    return widths[part] if part < len(widths) - 1 else None


@torch.no_grad()
def set_width(quantizer: Quantizer, bits: int, keep_range: bool = True) -> None:
    """Change the bit width of a quantizer.

    Args:
        quantizer: The quantizer. Its `spec`, which states its final bit width, is not changed.
        bits: The new bit width.
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
    """Return the weight of the dampening loss in a step: it rises from 0 to `largest` as half a cosine."""
    return largest * 0.5 * (1.0 - math.cos(math.pi * step / steps))


class OscillationDamping(nn.Module):
    """Dampening loss (arXiv 2203.11086), which pulls latent weights to the centres of their bins.

    It is the sum of (w_hat - clip(w, s qmin, s qmax))^2, with latent weight w, quantized weight w_hat and scale s.

    No gradient flows into w_hat and s. For weights beyond the range the gradient is 0 as well, so that the dampening
    does not keep them there.
    """

    def __init__(self, student: fx.GraphModule) -> None:
        super().__init__()
        weights = [quantizer for quantizer in quantizers(student) if quantizer.spec.kind == "weight"]
        # In a plain list, so that they are not registered as modules here: they belong to the student.
        self._pairs = [(parameter(student, weight_node(student, q.spec)), q) for q in weights]

    def forward(self) -> Tensor:
        """Return the dampening loss, summed over all quantized weights: a scalar."""
        terms = []
        for weight, quantizer in self._pairs:
            scale = quantizer.scale.detach().clamp_min(MIN_SCALE)
            inside = torch.clamp(quantizer.values(weight), scale * quantizer.qmin, scale * quantizer.qmax)
            terms.append((quantizer(weight.detach()).detach() - inside).square().sum())
        return torch.stack(terms).sum()
