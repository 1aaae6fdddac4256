"""What each width of each layer costs, on the ResNet-20 that knows the digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.special import log_softmax, rel_entr, softmax  # type: ignore[import-untyped]

from crqat.core.progress import quiet
from crqat.core.run_directory import read_manifest
from crqat.export.analysis.bit_width_cost import Divergences, LayerDivergence
from crqat.train.config import QuantizationConfig, TrainConfig
from crqat.train.data import sources
from crqat.train.data.split import split as split_images
from crqat.train.models import build as models
from crqat.train.quantized_model import quantize_model
from crqat.train.quantizers import LSQQuantizer
from crqat.train.quantizers.calibration import calibrate, only

Trained = Callable[..., tuple[Path, TrainConfig]]
IMAGES = 48


@pytest.fixture(scope="module")
def network(trained: Trained) -> Divergences:
    return Divergences(*trained(), IMAGES)


@pytest.fixture(scope="module")
def rows(network: Divergences) -> list[LayerDivergence]:
    return network.one_layer_at_a_time(quiet, (2, 8))


def test_a_row_for_each_layer(network: Divergences, rows: list[LayerDivergence]) -> None:
    assert network.images == IMAGES
    assert [row.layer for row in rows[:3]] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    assert len(rows) == 20 and rows[-1].layer == "linear"
    assert (rows[0].weights, rows[-1].weights) == (1 * 16 * 9, 64 * 10)
    assert all(0 <= row.divergence[8] < row.divergence[2] for row in rows)
    assert sum(row.divergence[8] for row in rows) < 0.05 * sum(row.divergence[2] for row in rows)


def test_one_value_is_that_of_a_network_quantized_the_ordinary_way(
    rows: list[LayerDivergence], trained: Trained
) -> None:
    """The float network of the stage, with calibration from the recipe's images, one layer active."""
    directory, config = trained()
    payload = read_manifest(directory).payload
    model = models.build("cifar/resnet20", 10, 1)
    model.load_state_dict(load_file(directory / "float.safetensors"))
    dataset = sources.load("digits", None, False)
    chosen = split_images(len(dataset.train_labels), config.data.validation, config.seed).train
    images = torch.from_numpy(dataset.preprocessing(dataset.train_images[chosen[:128]].numpy()))
    two = QuantizationConfig(weights=2, activations=2)
    quantized = quantize_model(model.eval(), images[:2], two, config.targets, LSQQuantizer)
    specs = quantized.specs
    calibrate(quantized, list(torch.split(images, 64)))
    weight = next(spec for spec in specs if spec.operation == "layer2.0.conv1" and spec.kind == "weight")
    active = [weight, next(spec for spec in specs if spec.edge == weight.input_edge)]
    with torch.no_grad(), only(quantized, active):
        logits = quantized(images[:IMAGES]).double().numpy()
        reference = model(images[:IMAGES]).double().numpy()
    expected = rel_entr(softmax(reference, axis=1), np.exp(log_softmax(logits, axis=1))).sum(axis=1).mean()
    row = next(row for row in rows if row.layer == "layer2.0.conv1")
    assert row.divergence[2] == pytest.approx(expected, rel=1e-3)
    assert payload["input_shape"] == [1, 8, 8]


def test_together_costs_more_than_each_alone_and_widths_count(
    network: Divergences, rows: list[LayerDivergence]
) -> None:
    names = [row.layer for row in rows]
    two, eight = (network.together(dict.fromkeys(names, bits)) for bits in (2, 8))
    assert two > max(row.divergence[2] for row in rows) / 2
    assert 0 <= eight < 0.01 * two
    one = network.together({**dict.fromkeys(names, 8), "conv1": 2})
    assert one == pytest.approx(rows[0].divergence[2], rel=0.3)


def test_the_students_training_does_not_matter(rows: list[LayerDivergence], trained: Trained) -> None:
    """Nor do the widths that the recipe asks for: it is the float network that is looked at."""
    quantization = QuantizationConfig(weights=4, activations=4, calibration_images=128)
    directory, config = trained(quantization=quantization)
    again = Divergences(directory, replace(config, quantization=quantization), IMAGES)
    assert [row.divergence for row in again.one_layer_at_a_time(quiet, (8,))] == [
        {8: pytest.approx(row.divergence[8], rel=1e-6, abs=1e-12)} for row in rows
    ]
