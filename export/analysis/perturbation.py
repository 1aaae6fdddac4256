"""Measures the robustness of a run's networks to noise on input and weights, with the same noise for each network."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from crqat.core.progress import Progress
from crqat.core.results.analysis import NoiseLevel, NoisyNetwork, Perturbation
from crqat.core.results.training import TrainingPayload
from crqat.core.run_directory import payload_of, verify_stage
from crqat.train.config import TrainConfig
from crqat.train.data import sources
from crqat.train.data.batches import evaluation_batches, subset
from crqat.train.data.split import split_of
from crqat.train.load_trained import rebuild
from crqat.train.models import published
from crqat.train.quantized_model import QuantizedModel, take_float_weights
from crqat.train.quantizers.calibration import only, weight_of
from crqat.train.training.evaluate import batch_size

INPUT_LEVELS = (0.0, 0.05, 0.1, 0.2, 0.4)
WEIGHT_LEVELS = (0.0, 0.01, 0.02, 0.05, 0.1)


def under_noise(
    train_dir: Path, config: TrainConfig, run: str, progress: Progress, draws: int, images: int | None = None
) -> Perturbation:
    """Return accuracy and loss on validation images under Gaussian noise, for the float network and every candidate.

    A draw of input noise depends only on its number and the images' shape; a draw of weight noise depends only on its
    number and on the layer's name and shape. All networks therefore get the same noise, and each level scales the same
    draws. Weight noise is added to the latent weights, and the quantizers are not changed. The float network gets
    weight noise on the same layers.

    Args:
        train_dir: A finished train stage; its hashes are verified first.
        config: The training configuration in the recipe of that stage.
        run: Name of the run.
        progress: Reports noise levels.
        draws: Number of draws of each kind of noise.
        images: Largest number of validation images; None takes all.
    """
    trained = payload_of(TrainingPayload, train_dir, verify_stage(train_dir))
    dataset = sources.of_recipe(published.data_section(config))
    chosen = split_of(dataset.train_labels, config.data, config.seed).validation[:images]
    pixels, labels = subset(dataset.train_images, chosen), dataset.train_labels[chosen]
    # Without training the calibrated network is the only candidate.
    candidates: dict[str, str] = {
        name: name for name in ("calibrated", "student", "teacher") if name in trained.candidates
    }
    if config.qat.epochs == 0:
        candidates = {"calibrated": "student"}
    of_each = len(INPUT_LEVELS) + len(WEIGHT_LEVELS)
    networks: list[NoisyNetwork] = []
    for name in ("float", *candidates):
        model = rebuild(train_dir, config, trained, candidates.get(name, "student"))
        active = model.specs
        if name == "float":
            take_float_weights(model)
            active = []
        weights = weights_of(model)
        levels: dict[str, list[NoiseLevel]] = {"input": [], "weights": []}
        with only(model, active):
            for kind, level in [("input", x) for x in INPUT_LEVELS] + [("weights", x) for x in WEIGHT_LEVELS]:
                found = []
                for draw in range(draws if level else 1):
                    batches = evaluation_batches(pixels, dataset.preprocessing, batch_size(pixels))
                    if kind == "input":
                        found.append(_quality(model, noisy_batches(batches, level, draw), labels))
                    else:
                        with noisy_weights(weights, level, draw):
                            found.append(_quality(model, batches, labels))
                accuracies, losses = zip(*found, strict=True)
                levels[kind].append(NoiseLevel(level, list(accuracies), list(losses)))
                done = len(networks) * of_each + sum(map(len, levels.values()))
                progress("noise", done, of_each * (1 + len(candidates)), f"{name}, {level:g} on the {kind}")
        networks.append(NoisyNetwork(name, levels["input"], levels["weights"]))  # type: ignore[arg-type]
    return Perturbation(run, len(labels), draws, networks)


def weights_of(model: QuantizedModel) -> dict[str, Tensor]:
    """Return the latent weights of each quantized layer by layer name; shared weights are listed once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for spec in model.specs:
        if spec.kind == "weight":
            weight = weight_of(model, spec)
            found.setdefault(id(weight), (spec.operation, weight))
    return dict(found.values())


@contextmanager
def noisy_weights(weights: Mapping[str, Tensor], level: float, draw: int) -> Iterator[None]:
    """Within the context, each layer's weights carry noise whose norm is `level` times their own."""
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{draw} {name}".encode()))
            noise = torch.randn(weight.shape, generator=generator)
            weight.data += noise * (level * weight.data.norm() / noise.norm())
        yield
    finally:
        for name, weight in weights.items():
            weight.data.copy_(before[name])


def noisy_batches(batches: Iterator[Tensor], level: float, draw: int) -> Iterator[Tensor]:
    """Yield the batches with Gaussian noise of standard deviation `level` on each value."""
    generator = torch.Generator().manual_seed(draw)
    for batch in batches:
        yield batch + level * torch.randn(batch.shape, generator=generator)


@torch.no_grad()
def _quality(model: nn.Module, batches: Iterator[Tensor], labels: Tensor) -> tuple[float, float]:
    """Return the top-1 accuracy in 0..1 and the mean cross-entropy of a network on the batches."""
    logits = torch.cat([model(batch) for batch in batches]).double()
    correct = int((logits.argmax(dim=1) == labels).sum())
    return correct / len(labels), float(functional.cross_entropy(logits, labels))
