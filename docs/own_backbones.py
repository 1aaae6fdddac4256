"""Small backbones of one's own, shaped as U-Net and as YOLO; `model.name: docs.own_backbones:unet` in a recipe."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm and SiLU, as YOLO's blocks have them."""
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()]
    return nn.Sequential(*layers)


def double(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions with BatchNorm and ReLU, a stage of U-Net."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Stages down and up again, joined by concatenation; one way up is learned, the other interpolates.

    Args:
        classes: Number of logits.
        channels: Of the images.
    """

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = double(channels, 16), double(16, 32), double(32, 64)
        self.pool = nn.MaxPool2d(2)
        self.up2 = nn.ConvTranspose2d(64, 32, 2, stride=2)
        self.merge2, self.merge1 = double(64, 32), double(48, 16)
        self.head = nn.Conv2d(16, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, float32 [B, classes]: the mean of each class's map, of float32 images [B, channels, H, W]."""
        wide = self.down1(x)
        middle = self.down2(self.pool(wide))
        x = self.up2(self.bottom(self.pool(middle)))
        x = self.merge2(torch.cat([x, middle], dim=1))
        x = functional.interpolate(x, size=wide.shape[2:], mode="bilinear", align_corners=False)
        x = self.merge1(torch.cat([x, wide], dim=1))
        return self.head(x).mean((2, 3))  # type: ignore[no-any-return]


class C2f(nn.Module):
    """YOLO's block: the halves of a convolution and what follows from the second of them, all concatenated.

    Args:
        inputs: Channels.
        outputs: Channels, even.
        depth: How many residual pairs of convolutions.
        shortcut: Whether these have their shortcut.
    """

    def __init__(self, inputs: int, outputs: int, depth: int, shortcut: bool) -> None:
        super().__init__()
        half = outputs // 2
        self.first = convolution(inputs, outputs, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(convolution(half, half), convolution(half, half)) for _ in range(depth)
        )
        self.last = convolution((2 + depth) * half, outputs, 1)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Float32 [B, inputs, H, W] to [B, outputs, H, W]."""
        parts = list(self.first(x).chunk(2, dim=1))
        for block in self.blocks:
            following = block(parts[-1])
            parts.append(parts[-1] + following if self.shortcut else following)
        return self.last(torch.cat(parts, dim=1))  # type: ignore[no-any-return]


class SPPF(nn.Module):
    """Three poolings of five pixels behind each other, concatenated with their input.

    Args:
        channels: Of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.last = convolution(channels, channels // 2, 1), convolution(2 * channels, channels, 1)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Float32 [B, channels, H, W], input and output."""
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.last(torch.cat(parts, dim=1))  # type: ignore[no-any-return]


class YOLO(nn.Module):
    """Backbone of C2f blocks, a neck up and down again, and a classifier on the pooled levels.

    Args:
        classes: Number of logits.
        channels: Of the images.
    """

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(convolution(channels, 16, stride=2), convolution(16, 32, stride=2))
        self.fine = nn.Sequential(C2f(32, 32, 1, True), convolution(32, 64, stride=2), C2f(64, 64, 2, True))
        self.coarse = nn.Sequential(convolution(64, 128, stride=2), C2f(128, 128, 1, True), SPPF(128))
        self.up, self.neck_up = nn.Upsample(scale_factor=2), C2f(192, 64, 1, False)
        self.down, self.neck_down = convolution(64, 64, stride=2), C2f(192, 128, 1, False)
        self.classifier = nn.Linear(192, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, float32 [B, classes], of normalized float32 images [B, channels, H, W]."""
        fine = self.fine(self.stem(x))
        coarse = self.coarse(fine)
        fine = self.neck_up(torch.cat([self.up(coarse), fine], dim=1))
        coarse = self.neck_down(torch.cat([self.down(fine), coarse], dim=1))
        pooled = [level.mean((2, 3)) for level in (fine, coarse)]
        return self.classifier(torch.cat(pooled, dim=1))  # type: ignore[no-any-return]


def unet(classes: int, channels: int) -> nn.Module:
    """A U-Net of three levels."""
    return UNet(classes, channels)


def yolo(classes: int, channels: int) -> nn.Module:
    """A YOLO-shaped backbone with its neck."""
    return YOLO(classes, channels)
