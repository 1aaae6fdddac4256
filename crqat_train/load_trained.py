"""Rebuilds the networks of a finished train stage."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from crqat.core.errors import UsageError
from crqat.core.results.training import TrainingPayload
from crqat.train.checkpoint import read_tensors
from crqat.train.config import TrainConfig
from crqat.train.models import build as models
from crqat.train.quantized_model import QuantizedModel, keep_float_weights, quantize_model


def rebuild(train_dir: Path, config: TrainConfig, payload: TrainingPayload, candidate: str) -> QuantizedModel:
    """Return a quantized network of a finished train stage, on the CPU in eval mode, with the float weights in `meta`.

    Args:
        train_dir: A verified train directory.
        config: The training configuration in the recipe of that stage.
        payload: Payload of the stage's manifest.
        candidate: The network to return: "student", "teacher" or "calibrated".

    Raises:
        UsageError: The checkpoint does not fit the recipe's network.
    """
    model = models.build(config.model.name, len(payload.class_names), payload.input_shape[0]).eval()
    example = torch.zeros(2, *payload.input_shape)
    _load(model, train_dir / "float.safetensors", config)
    student = quantize_model(model, example, config.quantization, config.targets)
    keep_float_weights(student)
    _load(student, train_dir / f"{candidate}.safetensors", config)
    return student.eval()


def _load(network: nn.Module, file: Path, config: TrainConfig) -> None:
    try:
        network.load_state_dict(read_tensors(file))
    except RuntimeError as error:
        msg = f"{file.parent}: the checkpoint does not fit {config.model.name} as it is now; train again with --force"
        raise UsageError(msg) from error
