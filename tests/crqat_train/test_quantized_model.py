"""The float network's weights that a quantized network keeps while training changes its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import crqat
from crqat.core.errors import UsageError
from crqat.export.qdq.write import float_model
from crqat.export.to_onnx import Quantized
from crqat.export.write_models import _float_graph
from crqat.train.checkpoint import read_header, read_tensors, write_tensors
from crqat.train.config import QuantizationConfig
from crqat.train.quantized_model import keep_float_weights, quantize_model, take_float_weights
from crqat.train.quantizers import METHODS
from tests.export.conftest import session


class Spare(nn.Module):
    """Has a weight that its forward pass never uses."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.spare = nn.Linear(4, 3), nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)  # type: ignore[no-any-return]


class Computed(nn.Module):
    """Computes the weight of its convolution from two others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = weight_norm(nn.Conv2d(3, 8, 3)), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.conv(x).relu().mean((2, 3)))  # type: ignore[no-any-return]


def train(model: nn.Module) -> None:
    """Change all weights, as training does."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("quantizers."):
                parameter.mul_(1.5)


def test_float_weights_come_back_below_quantizers_that_stay() -> None:
    network = Spare().eval()
    model = quantize_model(network, torch.randn(2, 4), QuantizationConfig(), ("onnxruntime",), METHODS["lsq"])
    keep_float_weights(model)
    specs = model.specs
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.25)
    take_float_weights(model)
    own = model.state_dict()
    assert "spare" not in own
    assert torch.equal(own["linear.weight"], network.linear.weight) and torch.equal(
        own["linear.bias"], network.linear.bias
    )
    scales = [tensor for name, tensor in own.items() if name.startswith("quantizers.") and name.endswith("scale")]
    assert len(scales) == len(specs) and all(bool((scale == 0.25).all()) for scale in scales)


@pytest.mark.parametrize("stored", [False, True])
def test_the_float_file_is_the_float_network_whose_weights_are_computed(tmp_path: Path, stored: bool) -> None:
    torch.manual_seed(0)
    network, images = Computed().eval(), torch.randn(8, 3, 12, 12)
    model = crqat.quantize(network, [images])
    train(model)
    if stored:
        crqat.save(model, tmp_path / "model.safetensors")
        model = crqat.load(tmp_path / "model.safetensors", Computed())
    graph = _float_graph(Quantized.of(model, images))
    (logits,) = session(float_model(graph, {})).run(None, {"input": images.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(logits, network(images).numpy(), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(images), network(images), rtol=0.1)


def test_a_file_without_a_float_weight_is_refused(tmp_path: Path) -> None:
    file, images = tmp_path / "model.safetensors", torch.randn(8, 3, 12, 12)
    crqat.save(crqat.quantize(Computed().eval(), [images]), file)
    tensors = {name: tensor for name, tensor in read_tensors(file).items() if name != "float.conv.weight"}
    write_tensors(file, tensors, read_header(file))
    with pytest.raises(UsageError, match=r"does not hold the float network's conv\.weight; quantize the network again"):
        crqat.load(file, Computed())
