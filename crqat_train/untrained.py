"""Sets parameters of untrained networks for checks: values neither vanish nor explode, and each branch contributes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# A parameter that is constant and smaller than this only switches its branch off, as ConvNeXt's layer scale does.
_SMALL = 1e-3


def sane_bn(network: nn.Module, images: Tensor, seed: int = 0) -> nn.Module:
    """Set gamma and beta of every BatchNorm to random values, and its running statistics to those of the images.

    Args:
        network: Changed in place, and left in eval mode.
        images: Normalized, float32 of shape [N, C, H, W], N >= 2.
        seed: Seed of gamma and beta.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        if not norm.affine:
            continue
        nn.init.uniform_(norm.weight, 0.75, 1.25, generator=generator)
        nn.init.normal_(norm.bias, 0.0, 0.2, generator=generator)
    with torch.no_grad():
        network.train()(images)
    return network.eval()


def awake(network: nn.Module, seed: int = 0) -> nn.Module:
    """Redraw the parameters that are zero or almost zero and have two or more dimensions.

    They are class tokens, heads or layer scales, for example.

    Quantized, they would have the same code everywhere, and a comparison of codes after them would show nothing.

    Args:
        network: Changed in place.
        seed: Seed of the new values.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.ndim > 1 and float(parameter.detach().abs().max()) < _SMALL:
            constant = float(parameter.detach().abs().max()) > 0
            with torch.no_grad():
                if constant:
                    parameter.uniform_(0.1, 0.5, generator=generator)
                else:
                    parameter.normal_(0.0, 0.02, generator=generator)
    return network
