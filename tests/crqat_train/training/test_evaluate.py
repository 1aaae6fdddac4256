"""Accuracy in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from crqat.train import distributed
from crqat.train.data import sources
from crqat.train.training.evaluate import accuracy, batch_size


def test_accuracy_counts_every_image_and_restores_the_mode() -> None:
    digits = sources.load("digits", None, False)
    images, labels = digits.train_images, digits.train_labels  # 1,000: two batches

    class Knows(nn.Module):
        """Right for a share of the images, and only in eval mode."""

        def __init__(self, right: int) -> None:
            super().__init__()
            self.right, self.position = right, 0

        def forward(self, x: Tensor) -> Tensor:
            assert not self.training and not torch.is_grad_enabled()
            here = torch.arange(self.position, self.position + len(x))
            self.position += len(x)
            return functional.one_hot((labels[here] + (here >= self.right)) % 10, 10).float()

    for right in (0, 1, 499, 777, 1000):
        for mode in (True, False):
            model = Knows(right).train(mode)
            assert accuracy(model, images, labels, digits.preprocessing) == right / 1000
            assert model.training is mode
    assert accuracy(Knows(3), images[:7], labels[:7], digits.preprocessing) == 3 / 7


def test_large_images_are_evaluated_in_small_batches_on_a_cpu_that_every_process_shares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def images(side: int, device: str = "cpu") -> Tensor:
        return torch.empty(1, 3, side, side, dtype=torch.uint8, device=device)

    assert [batch_size(images(side)) for side in (8, 32, 224, 1024)] == [500, 500, 10, 8]
    assert batch_size(images(224, "meta")) == batch_size(images(224), torch.device("cuda")) == 500
    monkeypatch.setattr(distributed, "world", lambda: 16)  # the others would wait forever for a process without images
    assert [batch_size(images(side)) for side in (32, 224)] == [500, 16]
