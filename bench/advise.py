"""Tests `crqat advise`: is its choice the cheapest step that passes, and does the result hold on test images?

Runs every step at W8A8, W4A8 and W4A4 for two CIFAR-10 networks:

    resnet20   published weights that have seen all training images: 5,000 test images, drawn by seed, judge, and the
               other 5,000 are the test images; all 50,000 training images calibrate and train
    resnet8    recipes/cifar10_resnet8.yaml, whose float network is trained once, at the first bit widths: a held-back
               tenth of the training images judges

Runs are stored in bench-out/advise and resume after an interruption. Writes bench-out/advise.json.

    python -m bench.advise WEIGHTS --cifar10 DIR [--networks resnet20,resnet8] [--bits 8/8,4/8,4/4]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from crqat.core.typed_json import text
from crqat.train.data import sources

ROOT = Path(__file__).parents[1]
OUT = Path("bench-out/advise")
# Permitted loss in percentage points, by the bit widths of weights and activations.
LIMITS = {"8/8": 0.5, "4/8": 1.0, "4/4": 2.0}
AGREEMENT = {"8/8": 0.95, "4/8": 0.93, "4/4": 0.90}
_JUDGES = 5000


def folders(cifar10: str, seed: int, out: Path) -> None:
    """Write CIFAR-10's images into class folders below `out`: train, test and judge.

    The test images are divided between test and judge, at random by `seed`.
    """
    if (out / "done").is_file():
        return
    dataset = sources.load("cifar10", cifar10, False)
    order = torch.randperm(len(dataset.test_labels), generator=torch.Generator().manual_seed(seed))
    parts = {
        "train": (dataset.train_images, dataset.train_labels),
        "judge": (dataset.test_images[order[:_JUDGES]], dataset.test_labels[order[:_JUDGES]]),
        "test": (dataset.test_images[order[_JUDGES:]], dataset.test_labels[order[_JUDGES:]]),
    }
    for part, (images, labels) in parts.items():
        for name in dataset.class_names:
            (out / part / name).mkdir(parents=True, exist_ok=True)
        for place, label in enumerate(labels.tolist()):
            file = out / part / dataset.class_names[label] / f"{place:05d}.png"
            Image.fromarray(images[place : place + 1][0].permute(1, 2, 0).numpy()).save(file)
    (out / "done").touch()


def crqat(*arguments: str) -> int:
    """Run a crqat command and return its exit code; its output is not captured."""
    return subprocess.run([sys.executable, "-m", "crqat", *arguments], check=False).returncode


def name_of(network: str, bits: str) -> str:
    """Return the recipe's name for a network and its bit widths, such as "resnet8_w4a8" for "resnet8" and "4/8"."""
    return f"{network}_w{bits.replace('/', 'a')}"


def settings(network: str, bits: str, given: argparse.Namespace) -> list[str]:
    """Return the arguments of `crqat advise` for a network and its bit widths: the recipe and --set options."""
    weights, activations = bits.split("/")
    common = {
        "name": name_of(network, bits),
        "quantization.weights": weights,
        "quantization.activations": activations,
        "gate.max_accuracy_drop": LIMITS[bits],
        "gate.min_agreement": AGREEMENT[bits],
    }
    if network == "resnet20":
        file = ROOT / "recipes" / "cifar10_resnet20_w4a4.yaml"
        further = {"model.weights": given.weights.resolve(), "data.source": "imagefolder",
                   "data.root": (OUT / "images").resolve(), "data.download": "false", "data.size": 32,
                   "data.crop": 32, "data.mean": "[0.485,0.456,0.406]", "data.std": "[0.229,0.224,0.225]"}  # fmt: skip
    else:
        file = ROOT / "recipes" / "cifar10_resnet8.yaml"
        further = {"data.root": given.cifar10, "data.download": "false"}
        first = given.bits.split(",")[0]
        trained = OUT / "runs" / f"{name_of(network, first)}-advise-calibration-minmax" / "train" / "float.safetensors"
        if bits != first and trained.is_file():
            # The held-back images are the same, so this network has not seen them, although advise cannot know that.
            further["model.weights"] = trained.resolve()
    return [str(file), *(part for key, value in {**common, **further}.items() for part in ("--set", f"{key}={value}"))]


def main() -> None:
    """Run every network at all bit widths, and print each row when it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="of the ResNet-20")
    parser.add_argument("--cifar10", required=True)
    parser.add_argument("--networks", default="resnet20,resnet8")
    parser.add_argument("--bits", default=",".join(LIMITS))
    parser.add_argument("--seed", type=int, default=0, help="of the draw of the judging images")
    given = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    runs = OUT / "runs"
    for network in given.networks.split(","):
        judge = []
        if network == "resnet20":
            folders(given.cifar10, given.seed, OUT / "images")
            judge = ["--judge", str(OUT / "images" / "judge")]
        for bits in given.bits.split(","):
            asked = settings(network, bits, given)
            code = crqat("advise", *asked, "--runs", str(runs), "--all", *judge)
            row = {"network": network, "bits": bits, "limit": LIMITS[bits], "exit_code": code}
            advice = runs / f"{name_of(network, bits)}-advise" / "advice.json"
            if advice.is_file():
                row["advice"] = json.loads(advice.read_text())
            add(row)


def add(row: dict[str, Any]) -> None:
    """Add the result of a network at some bit widths to the JSON file, in place of an older one, and print it."""
    path = OUT.with_suffix(".json")
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    rows = [old for old in rows if (old["network"], old["bits"]) != (row["network"], row["bits"])]
    path.write_text(text({"rows": [*rows, row]}))
    print(json.dumps({key: value for key, value in row.items() if key != "advice"}), flush=True)


if __name__ == "__main__":
    main()
