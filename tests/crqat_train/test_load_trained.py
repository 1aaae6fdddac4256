"""Networks of a finished training."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from crqat.train.checkpoint import write_tensors
from crqat.train.config import QuantizationConfig
from crqat.train.load_trained import take_float_weights
from crqat.train.quantized_model import quantize_model
from crqat.train.quantizers import METHODS


class Spare(nn.Module):
    """Has a weight that its forward pass never uses."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.spare = nn.Linear(4, 3), nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)  # type: ignore[no-any-return]


def test_float_weights_come_back_below_quantizers_that_stay(tmp_path: Path) -> None:
    network = Spare().eval()
    model = quantize_model(network, torch.randn(2, 4), QuantizationConfig(), ("onnxruntime",), METHODS["lsq"])
    specs = model.specs
    write_tensors(
        tmp_path / "float.safetensors", {name: tensor.clone() for name, tensor in network.state_dict().items()}
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.25)
    take_float_weights(model, tmp_path)
    own = model.state_dict()
    assert "spare" not in own
    assert torch.equal(own["linear.weight"], network.linear.weight) and torch.equal(
        own["linear.bias"], network.linear.bias
    )
    scales = [tensor for name, tensor in own.items() if name.startswith("quantizers.") and name.endswith("scale")]
    assert len(scales) == len(specs) and all(bool((scale == 0.25).all()) for scale in scales)
