"""A training script of the usual torchvision shape, quantized: its models, schedule, weight average, mixup, smoothing.

A line that ends in `# crqat` was added for quantization; one that ends in `# crqat, was: ...` replaces what it names.
There are five; without them it is a script that trains a float network.

    python examples/torchvision_reference.py --data-path data/images --resume float.pth --output-dir runs/int8
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, default_collate
from torchvision import datasets, models
from torchvision.transforms import v2

import crqat  # crqat

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The script's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-path", type=Path, required=True, help="folder with train/CLASS/* and val/CLASS/*")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--resume", type=Path, help="state dict of the trained float network")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/reference"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--warmup-epochs", type=int, default=1)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--mixup-alpha", type=float, default=0.2)
    parser.add_argument("--ema-decay", type=float, default=0.99)
    return parser.parse_args(arguments)


def train_one_epoch(
    model: nn.Module,
    average: AveragedModel,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: DataLoader,
) -> float:
    """One pass over the training images; gives the mean loss."""
    model.train()
    total = 0.0
    for image, target in batches:
        loss = criterion(model(image), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
        total += loss.item()
    return total / len(batches)


@torch.inference_mode()
def evaluate(model: nn.Module, batches: DataLoader) -> float:
    """Share of the images that are answered rightly."""
    model.eval()
    right = [(model(image).argmax(1) == target).float() for image, target in batches]
    return float(torch.cat(right).mean())


def main(arguments: list[str] | None = None) -> Path:
    """Train and evaluate; gives the folder of the results."""
    args = parse(arguments)
    out: Path = args.output_dir
    out.mkdir(parents=True, exist_ok=True)
    to_bytes = v2.Compose([v2.Resize(args.size, antialias=True), v2.CenterCrop(args.size), v2.PILToTensor()])
    augment = v2.Compose([v2.RandomResizedCrop(args.size, (0.5, 1.0)), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    dataset = datasets.ImageFolder(str(args.data_path / "train"), v2.Compose([augment, normalize]))
    dataset_test = datasets.ImageFolder(str(args.data_path / "val"), v2.Compose([to_bytes, normalize]))
    mixup = v2.MixUp(alpha=args.mixup_alpha, num_classes=len(dataset.classes))
    data_loader = DataLoader(
        dataset, args.batch_size, shuffle=True, drop_last=True, collate_fn=lambda batch: mixup(*default_collate(batch))
    )
    data_loader_test = DataLoader(dataset_test, args.batch_size)

    model = models.get_model(args.model, num_classes=len(dataset.classes))
    if args.resume is not None:
        model.load_state_dict(torch.load(args.resume, weights_only=True))
    model = crqat.quantize(model.eval(), calibration=DataLoader(dataset, 64, shuffle=True))  # crqat
    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    parameters = crqat.parameter_groups(model, args.weight_decay)  # crqat, was: parameters = model.parameters()
    optimizer = torch.optim.SGD(parameters, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=args.warmup_epochs)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, args.epochs - args.warmup_epochs))
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [args.warmup_epochs])
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay), use_buffers=True)

    for epoch in range(args.epochs):
        loss = train_one_epoch(model, average, criterion, optimizer, data_loader)
        scheduler.step()
        print(f"epoch {epoch}: loss {loss:.4f}, top-1 of the average {evaluate(average, data_loader_test):.2%}")
        torch.save(average.module.state_dict(), out / "average.pth")
    held_out = torch.stack([to_bytes(dataset.loader(path)) for path, _ in dataset.samples[:32]])  # crqat
    crqat.export(average.module, out / "int8", images=held_out, preprocessing=crqat.Preprocessing(MEAN, STD))  # crqat
    return out


if __name__ == "__main__":
    main()
