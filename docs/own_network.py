"""A network of one's own, with what hand-written forwards contain; `model.name: docs.own_network:build` in a recipe."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class OwnNetwork(nn.Module):
    """A functional ReLU, `+=`, one ReLU that is called more than once, a concatenation, a shortcut that pads channels.

    Args:
        classes: Number of logits.
        channels: Of the images.
    """

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, stride=2, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(16)
        self.left = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.left_bn = nn.BatchNorm2d(16)
        self.right = nn.Conv2d(16, 16, 1)
        self.down = nn.Conv2d(32, 48, 3, stride=2, padding=1, bias=False)
        self.down_bn = nn.BatchNorm2d(48)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(48, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, float32 [B, classes], of normalized float32 images [B, channels, H, W]."""
        x = functional.relu(self.stem_bn(self.stem(x)))
        branch = self.left_bn(self.left(x))
        branch += x
        branch = self.relu(branch)
        x = torch.cat([branch, self.relu(self.right(x))], dim=1)
        shortcut = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
        x = self.relu(self.down_bn(self.down(x)) + shortcut)
        x = self.dropout(x.mean((2, 3)))
        return self.classifier(x)  # type: ignore[no-any-return]


def build(classes: int, channels: int) -> nn.Module:
    """What `model.name` names: a function of the data's number of classes and channels."""
    return OwnNetwork(classes, channels)
