"""Measures the time of a training step: float, QAT and CR-QAT on CIFAR ResNet-20, and plain QAT of other libraries.

Rounds are interleaved in one process, and augmentation is counted for all modes. Writes bench-out/train.json with the
rows: name, mode, median_seconds, ratio_to_float (of the faster float step), n, interval (of the ratio).

    python -m bench.step_time [--rounds 7] [--cifar10 data/cifar10]
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from crqat.core.progress import quiet
from crqat.core.typed_json import to_json
from crqat.pipeline.console import show_table
from crqat.runtime_eval.machine import host
from crqat.runtime_eval.measure.latency import median_interval
from crqat.train.config import ConsistencyConfig, OptimizerConfig, QuantizationConfig
from crqat.train.data import sources
from crqat.train.data.batches import Batches, Feed, Generators, evaluation_batches
from crqat.train.data.builtin import CIFAR10_PREPROCESSING
from crqat.train.models import build as models
from crqat.train.quantized_model import quantize_model
from crqat.train.quantizers import METHODS
from crqat.train.quantizers.calibration import calibrate
from crqat.train.training import loop
from crqat.train.training.consistency import ConsistencyTraining
from crqat.train.training.optimizer import Fit
from crqat.train.training.resume import SAVE_EVERY, Keeper, Training

BATCH = 128
STEPS = 4  # steps of one mode in a round
SAVES = 9
OUT = Path("bench-out/train.json")
Step = Callable[[], None]


class Bench:
    """Images and float network that all modes of training share; for each mode, a method returns a training step."""

    def __init__(self, cifar10: Path | None) -> None:
        if cifar10 is None:  # noise of the same shape: a step takes the same time
            images = torch.randint(0, 256, (5000, 3, 32, 32), dtype=torch.uint8)
            labels = torch.randint(0, 10, (5000,))
        else:
            dataset = sources.load("cifar10", str(cifar10), False)
            images, labels = dataset.train_images[:5000], dataset.train_labels[:5000]
        cpu = torch.device("cpu")
        self.batches = Batches(images, labels, CIFAR10_PREPROCESSING, BATCH, 4, True, cpu)
        self.calibration = list(evaluation_batches(images[:256], CIFAR10_PREPROCESSING, 256))
        # The trainer's memory layout, for every mode.
        self.network = models.build("cifar/resnet20", 10, 3).to(memory_format=torch.channels_last)

    def endless(self, views: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield batches of augmented images and their labels without end; each image has `views` augmented versions."""
        generator = torch.Generator().manual_seed(0)
        while True:
            yield from self.batches.epoch(generator, views)

    def plain(self, model: nn.Module, forward: Callable[[Tensor], Tensor]) -> Step:
        """Return a function that trains `model` for one step, with SGD on the cross-entropy of `forward`'s logits."""
        optimizer, batches = sgd(model), self.endless(1)
        model.train()

        def step() -> None:
            images, labels = next(batches)
            update(optimizer, functional.cross_entropy(forward(images), labels))

        return step

    def float_step(self, compiled: bool) -> Step:
        """Return a function that trains the float network for one step."""
        model = copy.deepcopy(self.network)
        return self.plain(model, torch.compile(model) if compiled else model)

    def ours_step(self, teacher: str, compiled: bool) -> Step:
        """Return a function that runs one step of QAT (`teacher` "none") or CR-QAT (`teacher` "ema")."""
        float_model = copy.deepcopy(self.network).eval()
        student = quantize_model(
            float_model, self.calibration[0][:2], QuantizationConfig(), ("onnxruntime",), METHODS["lsq"]
        )
        calibrate(student, self.calibration)
        config = ConsistencyConfig(teacher=teacher)  # type: ignore[arg-type]
        training = ConsistencyTraining(student, float_model, config, torch.compile if compiled else lambda m: m)
        optimizer, batches, count = sgd(student), self.endless(training.views), iter(range(1 << 30))
        student.train()

        def step() -> None:
            *images, labels = next(batches)
            update(optimizer, loop.objective(images, labels, training, 1.0))
            training.update_teacher(next(count))

        return step

    def save(self, states: Path) -> Step:
        """Return a function that saves the state of a CR-QAT training once, into the folder `states`.

        The state has three networks, the optimizer's momentum, and the position in the images.
        """
        float_model = copy.deepcopy(self.network).eval()
        student = quantize_model(
            float_model, self.calibration[0][:2], QuantizationConfig(), ("onnxruntime",), METHODS["lsq"]
        )
        cpu, generators = torch.device("cpu"), Generators.of(0, torch.device("cpu"))
        fit = Fit(student, OptimizerConfig(), len(self.batches), "qat", cpu, quiet)
        loop.update(fit, student(self.calibration[0]).sum())
        feed = Feed(self.batches, generators)
        next(feed.epoch())
        networks = {"float": float_model, "student": student, "teacher": copy.deepcopy(student)}
        keeper = Keeper(states, SAVE_EVERY, cpu, quiet)
        with keeper.keep(Training(fit, {"images": feed}, networks, generators, [])):
            return keeper.save

    def nncf_step(self) -> Step:
        """Return a function that runs one step of QAT on a network from nncf.quantize, which cannot be compiled."""
        import nncf

        model = nncf.quantize(copy.deepcopy(self.network).eval(), nncf.Dataset(self.calibration), subset_size=1)
        return self.plain(model, model)

    def modelopt_step(self) -> Step:
        """Return a function that runs one step of QAT with NVIDIA Model-Optimizer's default INT8 configuration."""
        import modelopt.torch.quantization as mtq

        model = mtq.quantize(
            copy.deepcopy(self.network).eval(), mtq.INT8_DEFAULT_CFG, lambda m: [m(b) for b in self.calibration]
        )
        return self.plain(model, model)

    def brevitas_step(self) -> Step:
        """Return a function that runs one step of QAT on a network that Brevitas has quantized layer by layer.

        Its layer-wise API is used because its quantized tensors do not support the slicing in the network's shortcuts.
        """
        from brevitas.graph.calibrate import calibration_mode
        from brevitas.graph.quantize import layerwise_quantize

        model = layerwise_quantize(copy.deepcopy(self.network).eval())
        with torch.no_grad(), calibration_mode(model):
            for batch in self.calibration:
                model(batch)
        return self.plain(model, model)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Return an SGD optimizer with the momentum and weight decay of crqat's training."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4)


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Backpropagate a loss and run one step of the optimizer."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def main() -> None:
    """Measure all modes alternately, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cifar10", type=Path, help="folder with cifar-10-batches-py")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    bench = Bench(arguments.cifar10)
    wanted: dict[tuple[str, str], Callable[[], Step]] = {
        ("float", "eager"): lambda: bench.float_step(False),
        ("float", "compiled"): lambda: bench.float_step(True),
        ("QAT", "eager"): lambda: bench.ours_step("none", False),
        ("QAT", "compiled"): lambda: bench.ours_step("none", True),
        ("CR-QAT", "compiled"): lambda: bench.ours_step("ema", True),
        ("NNCF QAT", "eager"): bench.nncf_step,
        ("Model-Optimizer QAT", "eager"): bench.modelopt_step,
        ("brevitas QAT", "eager"): bench.brevitas_step,
    }
    steps: dict[tuple[str, str], Step] = {}
    for key, make in wanted.items():
        try:
            step = make()
            for _ in range(3):  # compiles, and fills the caches
                step()
        except ImportError as missing:
            print(f"{key[0]}: not run: {missing}", file=sys.stderr)
            continue
        steps[key] = step
        print(f"{' '.join(key)}: ready", file=sys.stderr)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for _ in range(arguments.rounds):
        for key, step in steps.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                step()
            times[key].append((time.perf_counter() - start) / STEPS)
    floats = [key for key in times if key[0] == "float"]
    fastest = min(floats, key=lambda key: float(np.median(times[key])))
    rows: list[dict[str, Any]] = []
    for (name, mode), seconds in times.items():
        ratios = [own / base for own, base in zip(seconds, times[fastest], strict=True)]
        low, high, coverage = median_interval(ratios)
        rows.append(
            {
                "name": name,
                "mode": mode,
                "median_seconds": float(np.median(seconds)),
                "ratio_to_float": float(np.median(ratios)),
                "n": len(seconds),
                "interval": [low, high],
                "coverage": coverage,
            }
        )
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as place:  # on the disk that runs are on
        saving = [_seconds(save) for save in [bench.save(Path(place))] * SAVES]
    middle = float(np.median(saving))
    # Apart from the periodic states, one is saved after each epoch; here an epoch has CIFAR-10's 50,000 images.
    epoch_steps = 50_000 // BATCH
    epoch = epoch_steps * next(row["median_seconds"] for row in rows if row["name"] == "CR-QAT")
    shares = middle / SAVE_EVERY, middle / epoch
    saved = {"median_seconds": middle, "n": SAVES, "every_seconds": SAVE_EVERY, "share": shares[0],
             "epoch_seconds": epoch, "share_of_epoch": shares[1]}  # fmt: skip
    OUT.parent.mkdir(exist_ok=True)
    written = {"device": to_json(host.describe()), "torch": torch.__version__, "rows": rows, "saving": saved}
    OUT.write_text(json.dumps(written, indent=1))
    columns = ("name", "mode", "s / step", "x faster float", "interval", "n")
    show_table(
        f"CIFAR ResNet-20, batch {BATCH}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        columns,
        [
            [r["name"], r["mode"], f"{r['median_seconds']:.4f}", f"{r['ratio_to_float']:.3f}",
             f"[{r['interval'][0]:.3f}, {r['interval'][1]:.3f}]", str(r["n"])]
            for r in rows
        ],
    )  # fmt: skip
    print(
        f"saving a training's state: {middle:.4f} s (median of {SAVES}, largest {max(saving):.4f}), "
        f"every {SAVE_EVERY:.0f} s: {shares[0]:.4%} of the time; at the end of an epoch of {epoch_steps} CR-QAT steps: "
        f"{shares[1]:.4%}"
    )
    print(f"written: {OUT}")


def _seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
