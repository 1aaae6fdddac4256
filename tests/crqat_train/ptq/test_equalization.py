"""Equalization changes weights and nothing that the float network computes, and only where that is so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from crqat.train.config import QuantizationConfig
from crqat.train.ptq import equalization
from crqat.train.quantized_model import QuantizedModel, quantize_model
from crqat.train.quantizers.calibration import only
from tests.crqat_train.ptq.conftest import network


def uncalibrated(net: nn.Module, images: Tensor) -> QuantizedModel:
    """With quantizers, whose ranges nobody has set."""
    return quantize_model(net, images[:2], QuantizationConfig(weights=4), ("onnxruntime", "tensorrt"))


def test_the_float_network_computes_the_same(images: Tensor) -> None:
    """Through BatchNorm, bias, depthwise layers and pools; a depthwise layer's input has channels of one range."""
    model = uncalibrated(network(), images)
    with torch.no_grad(), only(model, []):
        before = model(images)
        assert equalization.equalize(model, [images]) == 2
        torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-4)
        changed = network()
        changed.load_state_dict(model.state_dict(), strict=False)
        peaks = [net[:3](images).amax((0, 2, 3)) for net in (network(), changed)]
    # A channel that is always 0 is left alone.
    apart, together = (float(peak.max() / peak[peak > 0].min()) for peak in peaks)
    assert together < 1.01 < 2 < apart


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.Hardswish, nn.Sigmoid])
def test_only_a_relu_lets_a_factor_through(images: Tensor, activation: type[nn.Module]) -> None:
    """A bound or a curve does not scale with its input."""
    model = uncalibrated(network(activation), images)
    assert equalization.pairs(model) == []


def test_a_second_reader_stands_in_the_way(images: Tensor) -> None:
    """What a residual connection adds must keep its values."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            x = torch.relu(x + self.second(x))
            return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]

    assert equalization.pairs(uncalibrated(Block().eval(), images)) == []


def test_what_is_shared_or_read_along_another_axis_stays(images: Tensor) -> None:
    """A bias or BatchNorm parameters of two layers, and a linear layer that reads rows of pixels."""

    class Shared(nn.Module):
        def __init__(self, norm: bool) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
            self.norms = nn.ModuleList(nn.BatchNorm2d(3) if norm else nn.Identity() for _ in range(2))
            if norm:
                self.norms[1].weight, self.norms[1].bias = self.norms[0].weight, self.norms[0].bias
            self.second.bias = self.first.bias
            self.head = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.norms[0](self.first(x)))
            x = torch.relu(self.norms[1](self.second(x)))
            return self.head(self.third(x).mean((2, 3)))  # type: ignore[no-any-return]

    for norm in (True, False):
        assert equalization.pairs(uncalibrated(Shared(norm).eval(), images)) == []
    rows = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Linear(16, 4), nn.Flatten(), nn.Linear(1024, 3))
    assert equalization.pairs(uncalibrated(rows.eval(), images)) == []
