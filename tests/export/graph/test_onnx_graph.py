"""Multiplications of known networks, counted from their graphs."""

from __future__ import annotations

import torch

from crqat.export.graph.from_torch import marked_graph
from crqat.export.graph.onnx_graph import Graph, macs
from crqat.train.config import QuantizationConfig
from crqat.train.models import build as models
from crqat.train.quantized_model import quantize_model
from crqat.train.quantizers import LSQQuantizer


def graph_of(name: str, size: int, classes: int = 1000) -> Graph:
    network = models.build(name, classes, 3).eval()
    example = torch.zeros(2, 3, size, size)
    model = quantize_model(network, example, QuantizationConfig(), ("onnxruntime",), LSQQuantizer)
    return marked_graph(model, [3, size, size], classes)


def test_macs_of_resnet18() -> None:
    counted = macs(graph_of("torchvision/resnet18", 224))
    assert (len(counted), sum(counted.values())) == (21, 1_814_073_344)
    assert counted["conv1"] == 112 * 112 * 64 * 7 * 7 * 3
    assert counted["fc"] == 512 * 1000


def test_macs_of_resnet20() -> None:
    """By hand: 3x3 convolutions on 32, 16 and 8 pixels with 16, 32 and 64 channels."""
    stages = [(32, 16, 16), (16, 16, 32), (8, 32, 64)]
    by_hand = 32 * 32 * 3 * 9 * 16 + 64 * 10
    by_hand += sum(size * size * 9 * (inner * width + 5 * width * width) for size, inner, width in stages)
    counted = macs(graph_of("cifar/resnet20", 32, 10))
    assert (len(counted), sum(counted.values())) == (20, by_hand)
    assert round(by_hand / 1e6, 2) == 40.55


def test_macs_of_grouped_convolutions() -> None:
    """mobilenet_v2 at 224 px: 300.8 million."""
    assert round(sum(macs(graph_of("torchvision/mobilenet_v2", 224)).values()) / 1e6, 1) == 300.8
