"""Noise on input and weights: as strong as it says, the same for all networks, and gone afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from crqat.core.results.analysis import mean_and_deviation
from crqat.core.results.training import TrainingPayload
from crqat.core.run_directory import payload_of, read_manifest
from crqat.export.analysis.perturbation import noisy_batches, noisy_weights, weights_of
from crqat.train.config import TrainConfig
from crqat.train.load_trained import rebuild
from crqat.train.quantized_model import take_float_weights

Trained = Callable[..., tuple[Path, TrainConfig]]


def test_weight_noise_has_its_share_of_each_norm_and_the_same_direction(trained: Trained) -> None:
    directory, config = trained()
    payload = payload_of(TrainingPayload, directory, read_manifest(directory))
    model, other = (rebuild(directory, config, payload, "student") for _ in range(2))
    take_float_weights(other)
    noises = []
    for network in (model, other):
        weights = weights_of(network)
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        with noisy_weights(weights, 0.05, draw=1):
            noises.append({name: (weight - before[name]).detach() for name, weight in weights.items()})
        assert all(torch.equal(weight, before[name]) for name, weight in weights.items())
        for name, noise in noises[-1].items():
            assert float(noise.norm() / before[name].norm()) == pytest.approx(0.05, rel=1e-3)
    assert len(noises[0]) == 20
    for name, noise in noises[0].items():
        cosine = torch.cosine_similarity(noise.flatten(), noises[1][name].flatten(), dim=0)
        assert float(cosine) == pytest.approx(1, abs=1e-3)
    weights = weights_of(model)
    with noisy_weights(weights, 0.05, draw=1):
        first = weights["conv1"].detach().clone()
    with noisy_weights(weights, 0.05, draw=2):
        assert not torch.allclose(weights["conv1"], first)


def test_input_noise_has_its_deviation_and_scales_one_draw() -> None:
    batch = torch.rand(64, 3, 16, 16)
    (weak,), (strong,) = (list(noisy_batches(iter([batch]), level, draw=0)) for level in (0.1, 0.4))
    assert float((weak - batch).std()) == pytest.approx(0.1, rel=0.02)
    assert torch.allclose(4 * (weak - batch), strong - batch, atol=1e-5)
    (again,) = noisy_batches(iter([batch]), 0.1, draw=1)
    assert not torch.allclose(again, weak)


def test_spread_over_draws() -> None:
    assert mean_and_deviation([1.0, 3.0]) == pytest.approx((2.0, 2**0.5))
    assert mean_and_deviation([1.5]) == (1.5, 0.0)
