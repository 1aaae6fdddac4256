"""A functional dropout drops in training and nothing in eval mode, in the quantized network as in the user's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import StochasticDepth  # type: ignore[import-untyped]

from crqat.train.config import QuantizationConfig
from crqat.train.quantized_model import quantize_model


class Dropping(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.fc = nn.Linear(16, 4)
        self.kind = kind
        self.depth = StochasticDepth(0.5, "row")

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.conv(x))
        if self.kind == "dropout":
            x = functional.dropout(x, 0.25, training=self.training)
        elif self.kind == "dropout2d":
            x = functional.dropout2d(x, p=0.25, training=self.training)
        else:
            x = x + self.depth(x)
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["dropout", "dropout2d", "stochastic depth"])
def test_what_is_dropped_in_training_is_the_same_as_in_the_network(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Dropping(kind).eval(), torch.randn(8, 3, 6, 6)
    graph = quantize_model(model, x, QuantizationConfig(), ("onnxruntime",), lambda _: nn.Identity())
    assert torch.equal(graph(x), model(x))
    outputs = []
    for network in (model.train(), graph.train()):
        torch.manual_seed(1)
        outputs.append(network(x))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], graph.eval()(x))
    assert {key for key in graph.state_dict() if "depth" not in key} == set(model.state_dict())
