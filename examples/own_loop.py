"""Consistency-regularized quantization-aware training in a loop of your own, from a folder of images to verified files.

The folder holds train/CLASS/* and val/CLASS/*, as torchvision's ImageFolder reads them:

    python examples/own_loop.py data/images --weights float.pth --out int8
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import datasets, models
from torchvision.transforms import v2

import crqat

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
weak_view = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(32, padding=4)])
strong_view = v2.Compose([weak_view, v2.RandAugment(2, 9)])


def read(folder: Path) -> tuple[Tensor, Tensor]:
    """All images of a folder as bytes, uint8 of shape [N, 3, 32, 32], and their labels, int64 of shape [N]."""
    to_bytes = v2.Compose([v2.PILToTensor(), v2.Resize(32, antialias=True), v2.CenterCrop(32)])
    images, labels = zip(*datasets.ImageFolder(str(folder), to_bytes), strict=True)
    return torch.stack(images), torch.tensor(labels)


def batches_of(images: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """One epoch: a strongly and a weakly changed view of the same images, normalized, and the labels."""
    for chosen in torch.randperm(len(images)).split(size):
        yield normalize(strong_view(images[chosen])), normalize(weak_view(images[chosen])), labels[chosen]


def main(arguments: list[str] | None = None) -> crqat.Benchmark:
    """Quantize, train, export and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="resnet18", help="of torchvision's")
    parser.add_argument("--weights", type=Path, help="state dict of the float network")
    parser.add_argument("--out", type=Path, default=Path("int8"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--latency-seconds", type=float, default=5.0)
    options = parser.parse_args(arguments)

    images, labels = read(options.data / "train")
    test_images, test_labels = read(options.data / "val")
    held_out, images, labels = images[:32], images[32:], labels[32:]
    net: nn.Module = models.get_model(options.model, num_classes=len(labels.unique()))
    if options.weights is not None:
        net.load_state_dict(torch.load(options.weights, weights_only=True))

    calibration = [normalize(part) for part in images[torch.randperm(len(images))[:512]].split(64)]
    model = crqat.quantize(net.eval(), calibration=calibration, weights=4, activations=4)
    teacher = crqat.EMATeacher(model, decay=0.99)
    optimizer = torch.optim.SGD(crqat.parameter_groups(model, weight_decay=5e-4), lr=0.01, momentum=0.9)
    model.train()
    for _ in range(options.epochs):
        for strong, weak, classes in batches_of(images, labels, options.batch_size):
            logits = model(strong)
            loss = F.cross_entropy(logits, classes) + crqat.consistency_loss(logits, teacher(weak))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            teacher.update()
    files = crqat.export(teacher.model, options.out, images=held_out, preprocessing=crqat.Preprocessing(MEAN, STD))
    measured = crqat.benchmark(files, test_images, test_labels, latency_seconds=options.latency_seconds)
    print(measured)
    print(crqat.gate(measured, min_int8_coverage=None))
    return measured


if __name__ == "__main__":
    main()
