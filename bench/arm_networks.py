"""Networks for `bench.arm_codes`: one for each operation that ONNX Runtime fuses, and crqat's CIFAR networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from crqat.train.config import QuantizationConfig
from crqat.train.models import build as models


class Branches(nn.Module):
    """Network of two convolutions of the same input whose results `join` combines, such as by an addition."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor], width: int = 8, pooled: bool = False) -> None:
        super().__init__()
        self.first, self.second = _conv(3, width), _conv(3, width, pooled=pooled)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        """Return the joined results of both branches."""
        joined: Tensor = self.join(self.first(x), self.second(x))
        return joined


class Attention(nn.Module):
    """Network that multiplies two computed matrices, as attention does, so that both operands are quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.keys, self.values = _conv(3, 16), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the dot products of the 16 key channels with the 16 value channels, [N, 1, 16, 16]."""
        x = self.features(x)
        keys, values = self.keys(x).flatten(2), self.values(x).flatten(2)
        alike: Tensor = keys @ values.transpose(1, 2)
        return alike.unsqueeze(1)


def _conv(
    inputs: int, outputs: int, groups: int = 1, activation: nn.Module | None = None, pooled: bool = False
) -> nn.Module:
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(outputs)]
    layers += [activation or nn.ReLU(), *([nn.AdaptiveAvgPool2d(1)] if pooled else [])]
    return nn.Sequential(*layers)


def _classified(*layers: nn.Module, channels: int = 8) -> nn.Module:
    """Return the layers followed by a global mean and a linear layer."""
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def cases() -> Iterator[tuple[str, Callable[[], nn.Module], QuantizationConfig]]:
    """Yield each case's name, its network for RGB images of 32 x 32 pixels, and its quantization settings."""
    plain, four = QuantizationConfig(), QuantizationConfig(weights=4, activations=4)
    offset = QuantizationConfig(activation_method="lsq+")
    for name in ("resnet20", "resnet56", "resnet18", "mobilenet_v2"):
        yield f"cifar/{name}", lambda name=name: models.build(f"cifar/{name}", 10, 3), plain  # type: ignore[misc]
    yield "cifar/resnet20, 4 bits", lambda: models.build("cifar/resnet20", 10, 3), four
    yield "cifar/resnet20, offsets", lambda: models.build("cifar/resnet20", 10, 3), offset
    yield "Conv", lambda: _classified(_conv(3, 8), _conv(8, 8)), plain
    yield "Conv, 4 bits", lambda: _classified(_conv(3, 8), _conv(8, 8)), four
    yield "Conv, offsets", lambda: _classified(_conv(3, 8), _conv(8, 8, activation=nn.Identity()), _conv(8, 8)), offset
    yield "Conv, depthwise", lambda: _classified(_conv(3, 16), _conv(16, 16, groups=16), channels=16), plain
    yield "Conv, grouped", lambda: _classified(_conv(3, 16), _conv(16, 16, groups=4), channels=16), plain
    yield (
        "Conv, strides and dilation",
        lambda: _classified(
            _conv(3, 8), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, dilation=2), nn.ReLU()
        ),
        plain,
    )
    yield (
        "Gemm",
        lambda: nn.Sequential(
            _conv(3, 4), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
        ),
        plain,
    )
    yield "Add", lambda: _classified(Branches(torch.add), _conv(8, 8)), plain
    yield "Add, Relu", lambda: _classified(Branches(torch.add), nn.ReLU(), _conv(8, 8)), plain
    yield "Add, broadcast", lambda: _classified(Branches(torch.add, pooled=True), _conv(8, 8)), plain
    yield "Mul", lambda: _classified(Branches(torch.mul), _conv(8, 8)), plain
    yield "Mul, broadcast", lambda: _classified(Branches(torch.mul, pooled=True), _conv(8, 8)), plain
    yield "Concat", lambda: _classified(Branches(lambda a, b: torch.cat([a, b], 1)), _conv(16, 8)), plain
    yield "MaxPool", lambda: _classified(_conv(3, 8), nn.MaxPool2d(2), _conv(8, 8)), plain
    yield "AveragePool", lambda: _classified(_conv(3, 8), nn.AvgPool2d(3, 2, 1), _conv(8, 8)), plain
    yield "MatMul", lambda: nn.Sequential(Attention(), nn.Flatten(), nn.Linear(256, 10)), plain
    for kind in (nn.ReLU6, nn.Hardswish, nn.Sigmoid, nn.SiLU, nn.LeakyReLU, nn.GELU):
        name = kind.__name__
        yield name, lambda kind=kind: _classified(_conv(3, 8, activation=kind()), _conv(8, 8)), plain  # type: ignore[misc]
