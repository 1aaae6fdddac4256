"""A small network with every kind of layer that the steps treat, trained by nobody."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn


def network(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Convolutions with and without bias, grouped and depthwise, strided and dilated, and a linear layer."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), activation(),
        nn.Conv2d(8, 8, 3, stride=2, padding=2, dilation=2, groups=8), activation(),
        nn.Conv2d(8, 12, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(12), activation(),
        nn.Conv2d(12, 16, 1), activation(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.get_buffer("running_mean"))
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 2.0)
            module.weight.data.uniform_(0.2, 3.0)
            module.bias.data.normal_()
    net.eval()
    return net


@pytest.fixture(scope="session")
def images() -> Tensor:
    """Smooth pictures, so that neighbouring pixels are alike as in real ones; float32 of shape [48, 3, 16, 16]."""
    coarse = torch.randn(48, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, size=16, mode="bilinear")
