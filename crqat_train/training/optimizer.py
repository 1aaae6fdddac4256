"""Sets up the optimizer and the learning rate of a training run and records its loss, without waits for the device."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from crqat.core.errors import UsageError
from crqat.core.progress import Progress
from crqat.train import distributed
from crqat.train.config import OptimizerConfig
from crqat.train.quantizers import Quantizer
from crqat.train.quantizers.base import is_step

_WARM_UP = 0.05


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups for any torch optimizer.

    Convolution and linear weights have weight decay; biases, BatchNorm parameters and the quantizers' scales have none.
    PACT's clipping levels are decayed, as in its paper (arXiv 1805.06085).

    Args:
        model: A float or quantized network.
        weight_decay: Weight decay of the decayed groups.

    Returns:
        Four groups, some of which may be empty: the network's weights, its other parameters, the quantizers' parameters
        and PACT's levels.
    """
    model = distributed.unwrapped(model)
    levels = {f"{n}.scale" for n, m in model.named_modules() if isinstance(m, Quantizer) and m.decays_scale}
    network = [p for n, p in model.named_parameters() if not is_step(n)]
    quantizers = [(n, p) for n, p in model.named_parameters() if is_step(n)]
    groups = [
        (weight_decay, [p for p in network if p.ndim > 1]),
        (0.0, [p for p in network if p.ndim <= 1]),
        (0.0, [p for n, p in quantizers if n not in levels]),
        (weight_decay, [p for n, p in quantizers if n in levels]),
    ]
    return [{"params": params, "weight_decay": decay} for decay, params in groups]


class Fit:
    """Optimizer and learning rate of one training run: linear warm-up over 5 % of the steps, then cosine to zero."""

    def __init__(
        self,
        model: nn.Module,
        section: OptimizerConfig,
        steps_per_epoch: int,
        name: str,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.model, self.section, self.name, self.device, self.progress = model, section, name, device, progress
        self.steps, self.steps_done, self.epochs_done = section.epochs * steps_per_epoch, 0, 0
        groups = [{**group, "factor": 1.0} for group in parameter_groups(model, section.weight_decay)]
        self.optimizer = torch.optim.SGD(groups, lr=section.lr, momentum=0.9, nesterov=True)
        self.loss_sum = torch.zeros((), device=device)
        self.steps_in_epoch, self.epoch_started = 0, time.monotonic()

    def epochs(self) -> Iterator[int]:
        """Yield epoch numbers from 1, or from that of a loaded state; each epoch must end with `end_of_epoch`."""
        while self.epochs_done < self.section.epochs:
            if self.steps_in_epoch == 0:
                self.loss_sum.zero_()
                self.epoch_started = time.monotonic()
            yield self.epochs_done + 1

    def scale_lr(self, factor: float) -> None:
        """Set the quantizers' learning rate to `factor` times the network's from now on; 0 freezes the quantizers."""
        for group in self.optimizer.param_groups[2:]:  # the groups after the network's own
            group["factor"] = factor

    def autocast(self) -> torch.autocast:
        """Return the autocast context of a forward pass and its loss."""
        bfloat16 = self.section.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16)

    def learning_rate(self, step: int) -> float:
        """Return the network's learning rate in a step, counted from 0; the quantizers' rate is a factor of it."""
        warm_up = max(1.0, _WARM_UP * self.steps)
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.section.lr * min(1.0, (step + 1) / warm_up) * cosine

    def set_learning_rate(self) -> None:
        """Set the learning rate of the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.steps_done) * group["factor"]

    def count(self, loss: Tensor) -> None:
        """Count a finished step and add its loss to the epoch's sum, without waiting for the device."""
        self.loss_sum += loss.detach()
        self.steps_done += 1
        self.steps_in_epoch += 1

    def end_of_epoch(self, epoch: int, **row: float) -> dict[str, Any]:
        """Return one row of history. Loss and weights are checked here, once an epoch, not in every step.

        Raises:
            UsageError: The loss or a weight is not finite.
        """
        loss = float(distributed.mean(self.loss_sum)) / self.steps_in_epoch
        if not (math.isfinite(loss) and finite(self.model)):
            what = "weights are not finite" if math.isfinite(loss) else f"the loss is {loss}"
            msg = f"{self.name}.lr: {what} in epoch {epoch}; lower {self.name}.lr (now {self.section.lr:g})"
            raise UsageError(msg)
        seconds = time.monotonic() - self.epoch_started
        self.epochs_done, self.steps_in_epoch = epoch, 0
        shown = " ".join(f"{key} {value:.4f}" for key, value in {"loss": loss, **row}.items())
        self.progress(f"{self.name} epochs", epoch, self.section.epochs, f"{shown} ({seconds:.1f} s)")
        lr = self.learning_rate(self.steps_done - 1)
        return {"phase": self.name, "epoch": epoch, "loss": loss, **row, "lr": lr, "seconds": round(seconds, 3)}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return optimizer and progress state as tensors and JSON values; the network is saved separately."""
        tensors = {"loss_sum": self.loss_sum}
        values: dict[str, Any] = {"optimizer": {}}
        for index, parameter in enumerate(self._parameters()):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                name = f"optimizer.{index}.{key}"
                (tensors if isinstance(value, Tensor) else values["optimizer"])[name] = value
        for name in ("steps_done", "epochs_done", "steps_in_epoch"):
            values[name] = getattr(self, name)
        return tensors, {**values, "epoch_seconds": time.monotonic() - self.epoch_started}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Load a state that `state` returned in another process."""
        self.loss_sum.copy_(tensors["loss_sum"])
        for name in ("steps_done", "epochs_done", "steps_in_epoch"):
            setattr(self, name, values[name])
        self.epoch_started = time.monotonic() - values["epoch_seconds"]
        parameters = self._parameters()
        for name, value in {**tensors, **values["optimizer"]}.items():
            kind, _, rest = name.partition(".")
            if kind != "optimizer":
                continue
            index, _, key = rest.partition(".")
            parameter = parameters[int(index)]
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                # In the parameter's original memory layout: another layout selects other kernels.
                value = torch.empty_like(parameter, requires_grad=False).copy_(value)
            self.optimizer.state[parameter][key] = value

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def is_scale(name: str) -> bool:
    """Whether a parameter of this name is a quantizer's scale, which must stay positive; an offset need not."""
    return is_step(name) and name.endswith(".scale")


def finite(model: nn.Module) -> bool:
    """Whether all values of a network's state are finite."""
    return bool(torch.stack([tensor.isfinite().all() for tensor in model.state_dict().values()]).all())
