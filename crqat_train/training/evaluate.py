"""Computes the predictions and the accuracy of a network in torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crqat.core.preprocessing import Preprocessing
from crqat.train import distributed
from crqat.train.data.batches import Images, evaluation_batches, subset

# Largest number of images in a batch.
_MOST = 500
# On a CPU, a batch of more than _FEWEST images has at most _PIXELS pixels, because activations of a small batch stay in
# the caches: ResNet-50 takes a third less time with 10 images of 224 px in a batch than with 80.
_FEWEST, _PIXELS = 8, 1 << 19


def batch_size(images: Images, device: torch.device | None = None) -> int:
    """Return the number of images in a batch for evaluation and calibration.

    The number depends on the size of the images alone, and is at least that of the processes, which share a batch.

    Args:
        images: Images of shape [N, C, H, W].
        device: Device that evaluates them; None is the images' device.
    """
    if (device or images.device).type != "cpu":
        return _MOST
    fitting = _PIXELS // (images.shape[2] * images.shape[3])
    return max(_FEWEST, distributed.world(), min(_MOST, fitting))


@torch.no_grad()
def answers(
    model: nn.Module, images: Images, preprocessing: Preprocessing, device: torch.device | None = None
) -> Tensor:
    """Return the predicted class of each image, int64 of shape [N] on the CPU.

    Args:
        model: Network in eval mode that maps normalized float32 [N, C, H, W] to logits [N, classes].
        images: uint8 tensor of shape [N, C, H, W], or `StoredImages`, which are decoded on demand.
        preprocessing: Preprocessing of the network's input.
        device: Device of the network; None is the CPU.
    """
    batches = evaluation_batches(images, preprocessing, batch_size(images, device))
    return torch.cat([model(batch.to(device or batch.device)).argmax(1).cpu() for batch in batches])


@torch.no_grad()
def accuracy(model: nn.Module, images: Images, labels: Tensor, preprocessing: Preprocessing) -> float:
    """Return top-1 accuracy, in 0..1, of a network in eval mode; its previous mode is restored.

    Args:
        model: Maps normalized float32 [N, C, H, W] to logits [N, classes].
        images: uint8 tensor of shape [N, C, H, W], or `StoredImages`, which are decoded on demand.
        labels: int64 of shape [N].
        preprocessing: Preprocessing of the network's input.
    """
    was_training, count = model.training, len(labels)
    model.eval()
    if distributed.world() > 1:
        own = distributed.share(torch.arange(count))
        images, labels = subset(images, own), labels[own]
    correct = torch.zeros((), dtype=torch.int64, device=images.device)
    size = batch_size(images)
    for number, batch in enumerate(evaluation_batches(images, preprocessing, size)):
        expected = labels[number * size :][: len(batch)]
        correct += (model(batch).argmax(dim=1) == expected).sum()
    model.train(was_training)
    return int(distributed.total(correct.cpu())) / count
