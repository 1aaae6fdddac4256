"""Networks of a finished training."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch

from crqat.core.errors import UsageError
from crqat.core.results.training import TrainingPayload
from crqat.train.checkpoint import write_tensors
from crqat.train.config import DataConfig, FloatConfig, ModelConfig, QATConfig, QuantizationConfig, TrainConfig
from crqat.train.load_trained import rebuild
from crqat.train.models import build as models
from crqat.train.quantized_model import FLOAT_WEIGHTS, quantize_model


class Payload:
    """What `rebuild` reads of a training's payload."""

    class_names = ("a", "b", "c")
    input_shape = (3, 16, 16)


def test_a_rebuilt_network_has_its_own_weights_and_keeps_those_of_the_float_network(tmp_path: Path) -> None:
    config = TrainConfig(
        0, ("onnxruntime",), DataConfig("digits"), ModelConfig("cifar/resnet8"), FloatConfig(0), QuantizationConfig(),
        QATConfig(0),
    )  # fmt: skip
    payload = cast("TrainingPayload", Payload)
    network = models.build("cifar/resnet8", 3, 3).eval()
    write_tensors(tmp_path / "float.safetensors", {name: t.clone() for name, t in network.state_dict().items()})
    student = quantize_model(network, torch.zeros(2, 3, 16, 16), config.quantization, config.targets)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.5)
    write_tensors(tmp_path / "student.safetensors", {name: t.clone() for name, t in student.state_dict().items()})
    found = rebuild(tmp_path, config, payload, "student")
    assert not found.training
    for name, tensor in student.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)
    assert found.meta[FLOAT_WEIGHTS].keys() == network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(found.meta[FLOAT_WEIGHTS][name], tensor)
    write_tensors(tmp_path / "float.safetensors", {"another": torch.zeros(1)})
    with pytest.raises(UsageError, match=r": the checkpoint does not fit cifar/resnet8 as it is now; train again with"):
        rebuild(tmp_path, config, payload, "student")
