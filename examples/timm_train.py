"""A training script of the usual timm shape, quantized: its models, loader, optimizer, schedule, EMA and Mixup.

A line that ends in `# crqat` was added for quantization; one that ends in `# crqat, was: ...` replaces what it names.
There are five; without them it is a script that trains a float network.

    python examples/timm_train.py --data-dir data/images --initial-checkpoint float.pth --output int8
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from timm.data import Mixup, create_dataset, create_loader, resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy
from torch import nn

import crqat  # crqat


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The script's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with train/CLASS/* and val/CLASS/*")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--initial-checkpoint", default="", help="weights of the trained float network")
    parser.add_argument("--output", type=Path, default=Path("int8"))
    parser.add_argument("--num-classes", type=int, default=10)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--opt", default="adamw")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--mixup", type=float, default=0.2)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--model-ema-decay", type=float, default=0.99)
    return parser.parse_args(arguments)


@torch.inference_mode()
def validate(model: nn.Module, loader: object) -> float:
    """Top-1 accuracy in percent."""
    model.eval()
    top1 = AverageMeter()
    for images, target in loader:
        top1.update(accuracy(model(images), target)[0].item(), len(images))
    return top1.avg


def main(arguments: list[str] | None = None) -> nn.Module:
    """Train and validate; gives the averaged network."""
    args = parse(arguments)
    model = timm.create_model(args.model, num_classes=args.num_classes, checkpoint_path=args.initial_checkpoint)
    config = resolve_data_config({"img_size": args.img_size}, model=model)
    mean, std = config["mean"], config["std"]
    shared = {"input_size": config["input_size"], "batch_size": args.batch_size, "mean": mean, "std": std}
    shared |= {"num_workers": args.workers, "persistent_workers": False, "device": torch.device(args.device)}
    train_set, val_set = (create_dataset("", root=str(args.data_dir), split=split) for split in ("train", "val"))
    loader = create_loader(train_set, is_training=True, **shared)
    loader_eval = create_loader(val_set, crop_pct=config["crop_pct"], **shared)
    mixup = Mixup(mixup_alpha=args.mixup, label_smoothing=args.smoothing, num_classes=args.num_classes)

    model.to(args.device)
    model = crqat.quantize(model.eval(), calibration=loader)  # crqat
    parameters = crqat.parameter_groups(model, args.weight_decay)  # crqat, was: parameters = model
    optimizer = create_optimizer_v2(parameters, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay)
    scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=args.epochs)
    average = ModelEmaV3(model, decay=args.model_ema_decay)
    criterion = SoftTargetCrossEntropy()

    for epoch in range(epochs):
        model.train()
        for images, target in loader:
            images, target = mixup(images, target)
            loss = criterion(model(images), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(model)
        scheduler.step(epoch + 1)
        print(f"epoch {epoch}: loss {loss.item():.4f}, top-1 of the average {validate(average, loader_eval):.2f} %")
    held_out = next(iter(loader.loader))[0]  # crqat
    crqat.export(average.module, args.output, images=held_out, preprocessing=crqat.Preprocessing(mean, std))  # crqat
    return average.module


if __name__ == "__main__":
    main()
