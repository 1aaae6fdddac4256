"""What data-parallel processes tell each other in a step: their gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients of one step: of every parameter that is trained, quantizers' steps included."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


class Exchange:
    """Averages the gradients over the processes, in one message, while it is `on`."""

    def __init__(self) -> None:
        self.on = True

    def __call__(self, model: nn.Module) -> None:
        """Between the backward pass and the update."""
        if not self.on:
            return
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
