"""Post-training quantization: a trained network of torchvision's and a folder of images in, verified INT8 files out.

    python examples/post_training.py data/images --model resnet18 --weights float.pth --out int8

The five lines that do it are in `main`; what stands before them reads network and images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision import datasets, models
from torchvision.transforms import v2

import crqat

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main(arguments: list[str] | None = None) -> crqat.Export:
    """Calibrate, export and verify."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with one folder of images per class")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--weights", type=Path, help="state dict of the float network")
    parser.add_argument("--out", type=Path, default=Path("int8"))
    parser.add_argument("--size", type=int, default=224)
    options = parser.parse_args(arguments)
    to_bytes = v2.Compose([v2.PILToTensor(), v2.Resize(options.size, antialias=True), v2.CenterCrop(options.size)])
    to_float = v2.Compose([to_bytes, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    pixels, images = (datasets.ImageFolder(str(options.data), how) for how in (to_bytes, to_float))
    net = models.get_model(options.model, num_classes=len(images.classes)).eval()
    if options.weights is not None:
        net.load_state_dict(torch.load(options.weights, weights_only=True))

    torch.manual_seed(0)
    held_out, _ = next(iter(DataLoader(pixels, batch_size=32, shuffle=True)))
    model = crqat.quantize(net, calibration=DataLoader(images, batch_size=64, shuffle=True))
    files = crqat.export(model, options.out, images=held_out, preprocessing=crqat.Preprocessing(MEAN, STD))
    print(files)
    return files


if __name__ == "__main__":
    main()
