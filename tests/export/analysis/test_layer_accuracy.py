"""Accuracy with one layer at a time quantized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from crqat.core.results.training import TrainingPayload
from crqat.core.run_directory import MANIFEST, payload_of, read_manifest, write_stage
from crqat.export.analysis.layer_accuracy import accuracy_of_each_layer
from crqat.train.config import TrainConfig
from crqat.train.load_trained import rebuild
from crqat.train.quantizers import quantizer_of
from crqat.train.quantizers.calibration import only

Trained = Callable[..., tuple[Path, TrainConfig]]
SPOILED = "pre_hooks.conv1/conv2d/0__1.0"


@pytest.fixture
def spoiled(trained: Trained, tmp_path: Path) -> tuple[Path, TrainConfig]:
    """The trained network with one weight whose scale is 100 times too large: its codes are all 0."""
    directory, config = trained()
    with write_stage(tmp_path, replace(read_manifest(directory))) as out:
        for path in directory.iterdir():
            if path.name != MANIFEST:
                (out / path.name).write_bytes(path.read_bytes())
        state = load_file(out / "student.safetensors")
        state[f"quantizers.{SPOILED.replace('/', '_').replace('.', '_')}.scale"] *= 100
        save_file(state, out / "student.safetensors")
    return tmp_path / "train", config


def test_the_layer_that_costs_the_accuracy_comes_first(spoiled: tuple[Path, TrainConfig]) -> None:
    seen: list[str] = []
    rows = accuracy_of_each_layer(*spoiled, "student", lambda *args: seen.append(args[3]))
    accuracies = {row.layer: row.accuracy for row in rows}
    assert [row.layer for row in rows[:3]] == ["none", "all", "conv1"]
    assert rows[2].bits == "7/8"
    assert accuracies["none"] > 0.8
    assert accuracies["conv1"] < accuracies["none"] - 0.1
    assert accuracies["all"] < accuracies["none"] - 0.1
    others = [value for layer, value in accuracies.items() if layer not in ("all", "conv1")]
    assert len(others) == 20 and min(others) > accuracies["none"] - 0.05
    assert len(seen) == len(rows) == 22 and seen[0].startswith("none: ")


def test_only_the_active_quantizers_round(trained: Trained) -> None:
    directory, config = trained()
    model = rebuild(directory, config, payload_of(TrainingPayload, directory, read_manifest(directory)), "student")
    specs = model.specs
    weight = next(spec for spec in specs if spec.edge == SPOILED)
    other = next(spec for spec in specs if spec.kind == "weight" and spec is not weight)
    weights = [model.get_parameter(f"{spec.operation}.weight").detach() for spec in (weight, other)]
    rounded = [quantizer_of(model, spec)(w) for spec, w in zip((weight, other), weights, strict=True)]
    assert not any(torch.equal(a, b) for a, b in zip(weights, rounded, strict=True))
    with only(model, [weight]):
        assert torch.equal(quantizer_of(model, weight)(weights[0]), rounded[0])
        assert torch.equal(quantizer_of(model, other)(weights[1]), weights[1])
    assert torch.equal(quantizer_of(model, other)(weights[1]), rounded[1])
