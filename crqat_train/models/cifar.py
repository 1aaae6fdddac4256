"""Networks for CIFAR: the ResNets of the original paper and MLPerf Tiny, and ImageNet networks with a smaller stem."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Residual blocks in each of the three stages of a CIFAR ResNet of 6 n + 2 layers.
CIFAR_BLOCKS = {"cifar/resnet20": 3, "cifar/resnet56": 9}


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions with a parameter-free shortcut ("option A" of arXiv 1512.03385).

    Where the resolution halves, the shortcut takes every second pixel and pads the new channels with zeros.

    Args:
        channels: Channels of the input.
        width: Channels of the output.
        stride: 1, or 2 where the resolution halves.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.stride = stride
        self.new_channels = width - channels

    def forward(self, x: Tensor) -> Tensor:
        """Map float32 [B, channels, H, W] to [B, width, ceil(H / stride), ceil(W / stride)]."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + self.skip(x))  # type: ignore[no-any-return]

    def skip(self, x: Tensor) -> Tensor:
        """Return the input in the shape of the output: subsampled, with channels of zeros on both sides."""
        if self.stride == 1:
            return x
        before = self.new_channels // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, self.new_channels - before))


class ProjectedBlock(BasicBlock):
    """Residual block of MLPerf Tiny (github.com/mlcommons/tiny): the shortcut is a 1x1 convolution at stride 2.

    Args:
        channels: Number of input channels.
        width: Number of output channels.
        stride: 1, or 2 where the resolution halves.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__(channels, width, stride)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(channels, width, 1, stride)

    def skip(self, x: Tensor) -> Tensor:
        """Return the input in the shape of the output, projected by a convolution where the shape changes."""
        return self.shortcut(x)  # type: ignore[no-any-return]


class CifarResNet(nn.Module):
    """ResNet for small images of arXiv 1512.03385, section 4.2.

    Attribute names are those of the published CIFAR-10 weights.

    Args:
        blocks: Residual blocks in each of the three stages.
        classes: Number of logits.
        channels: Number of image channels.
        block: Class of the residual blocks.
    """

    def __init__(self, blocks: int, classes: int, channels: int, block: type[BasicBlock] = BasicBlock) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(block, blocks, 16, 16, stride=1)
        self.layer2 = _stage(block, blocks, 16, 32, stride=2)
        self.layer3 = _stage(block, blocks, 32, 64, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, float32 [B, classes], for normalized float32 images [B, channels, H, W]."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(torch.flatten(self.pool(out), 1))  # type: ignore[no-any-return]


def _stage(block: type[BasicBlock], blocks: int, channels: int, width: int, stride: int) -> nn.Sequential:
    first = block(channels, width, stride)
    return nn.Sequential(first, *(block(width, width, 1) for _ in range(blocks - 1)))


def _mlperf_tiny_resnet8(classes: int, channels: int) -> nn.Module:
    """Return MLPerf Tiny's network for image classification: one residual block a stage."""
    return CifarResNet(1, classes, channels, ProjectedBlock)


def _small_resnet18(classes: int, channels: int) -> nn.Module:
    """Return torchvision's ResNet-18 with a stem for small images: 3x3, stride 1, no pooling."""
    from torchvision.models import resnet18  # type: ignore[import-untyped]

    model: nn.Module = resnet18(weights=None, num_classes=classes)
    model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model


def _small_mobilenet_v2(classes: int, channels: int) -> nn.Module:
    """Return torchvision's MobileNetV2 for small images: the stem and the second stage keep the resolution."""
    from torchvision.models import mobilenet_v2

    # Expansion, channels, repetitions, stride of each stage; 224 px networks have stride 2 in the second one too.
    stages = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]]
    model: nn.Module = mobilenet_v2(weights=None, num_classes=classes, inverted_residual_setting=stages)
    stem = nn.Conv2d(channels, 32, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out")
    model.get_submodule("features.0").add_module("0", stem)
    return model


# Other networks for images of about 32 pixels: their own, and torchvision's with the first layers replaced.
CIFAR_NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "cifar/resnet8": _mlperf_tiny_resnet8,
    "cifar/resnet18": _small_resnet18,
    "cifar/mobilenet_v2": _small_mobilenet_v2,
}
