"""A network that is quantized by calibration alone, and what its files say of it."""

from __future__ import annotations

from dataclasses import replace

import onnx
import torch
from torch import nn

from crqat.export.to_onnx import quantize_network
from tests.export.conftest import random_images


def test_the_files_say_what_they_are_and_a_changed_copy_makes_its_own() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 7))
    images = random_images(8, 3, 6, 6)
    quantized = quantize_network(network, torch.split(images, 3), ("tensorrt",))
    assert not network.training
    assert quantized.images.shape == (8, 3, 6, 6)
    assert (quantized.graph.input_shape, quantized.graph.classes) == ([3, 6, 6], 7)
    assert quantized.graph is quantized.graph
    assert replace(quantized).graph is not quantized.graph
    model = quantized.file("tensorrt", "float16", {"crqat.run": "a run"}).model
    assert {entry.key: entry.value for entry in model.metadata_props} == {
        "crqat.run": "a run",
        "crqat.target": "tensorrt",
    }
    assert onnx.TensorProto.FLOAT16 in {tensor.data_type for tensor in model.graph.initializer}
