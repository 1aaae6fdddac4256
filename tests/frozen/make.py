"""Makes a complete run, as small as one can be, to be kept: what this version wrote, later versions must still read.

``python -m tests.frozen.make VERSION`` writes tests/frozen/VERSION; an existing one is never made again.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from crqat.core.preprocessing import Preprocessing
from crqat.runtime_eval.trt import plan_file
from crqat.train.data.dataset import Dataset

FOLDER = Path(__file__).parent
# The command, on a machine without a name.
CRQAT = "import platform; platform.node = lambda: 'frozen'; from crqat.pipeline.cli import main; main()"
RECIPE = """
name: frozen
compile: never
data: {source: "tests.frozen.make:images", crop_padding: 0, flip: false}
model: {name: "tests.frozen.make:network"}
float: {epochs: 20, batch_size: 32, lr: 0.05}
quantization: {calibration_images: 64}
qat: {epochs: 1, batch_size: 32, lr: 0.005}
export: {verify_images: 4}
benchmark: {latency_rounds: 6, latency_seconds: 0.06, warm_up_seconds: 0.0}
gate: {max_accuracy_drop: 20.0}
"""


def images() -> Dataset:
    """Some of scikit-learn's digits: 256 to train with, 32 to test with."""
    data = load_digits()
    pictures = torch.tensor(data.images[:288] * 15, dtype=torch.uint8)[:, None]
    labels = torch.tensor(data.target[:288], dtype=torch.int64)
    names = tuple(str(digit) for digit in range(10))
    return Dataset(pictures[:256], labels[:256], pictures[256:], labels[256:], names, Preprocessing((0.3,), (0.4,)))


def network(classes: int, channels: int) -> nn.Module:
    """One convolution with BN, and a classifier."""
    layers = [nn.Conv2d(channels, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 16, classes))


def main() -> None:
    """Run the recipe and keep what it wrote, each stage as a plain folder."""
    target = FOLDER / sys.argv[1]
    target.mkdir()
    recipe = target / "recipe.yaml"
    recipe.write_text(RECIPE.lstrip())
    with tempfile.TemporaryDirectory() as scratch:
        bundle = ("bundle", f"{scratch}/frozen", "--out", str(target / "bundle.tar.gz"))
        for command in (("run", str(recipe), "--runs", scratch), bundle):
            subprocess.run([sys.executable, "-c", CRQAT, *command], check=True)
        for stage in ("train", "export", "benchmark"):
            shutil.copytree(f"{scratch}/frozen/{stage}", target / "frozen" / stage)
    plan_file.save(
        target / "model.plan",
        b"no real plan",
        builder="tensorrt",
        version="10.3.0",
        compute_capability="8.7",
        precision="int8",
        metadata={"crqat.target": "tensorrt"},
    )


if __name__ == "__main__":
    main()
