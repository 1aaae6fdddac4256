"""A functional dropout drops in training and nothing in eval mode, in the quantized network as in the user's."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import StochasticDepth  # type: ignore[import-untyped]

from crqat.core.errors import UsageError
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


class Differing(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.conv, self.other, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, functional.relu(self.conv(x)))

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def noise(m: Differing, x: Tensor) -> Tensor:
    if m.training:
        x = x + 0.1 * torch.randn_like(x)
    return m.head(functional.dropout(m.other(x), 0.5, m.training))


def depth(m: Differing, x: Tensor) -> Tensor:
    y = m.other(x)
    if m.training:
        y = y * (torch.rand_like(y[:, :1, :1, :1]) > 0.2).to(y.dtype)
    return m.head(x + y)


def probabilities(m: Differing, x: Tensor) -> Tensor:
    logits = m.head(m.other(x))
    return logits if m.training else logits.softmax(1)


@pytest.mark.parametrize(
    ("function", "line"),
    [
        (noise, "Differing at FILE computes randn_like, mul, add only in training mode"),
        (depth, "Differing at FILE computes getitem, rand_like, gt, to, mul only in training mode"),
        (probabilities, "Differing at FILE computes softmax only in eval mode"),
    ],
)
def test_what_has_no_weights_is_left_as_in_eval_mode_and_told(function: Callable[..., Any], line: str) -> None:
    torch.manual_seed(0)
    model, x = Differing(function).eval(), torch.randn(2, 3, 6, 6)
    graph = quantize_model(model, x, QuantizationConfig(), ("onnxruntime",), lambda _: nn.Identity())
    torch.testing.assert_close(graph(x), model(x))
    (note,) = graph.notes
    assert re.sub(re.escape(__file__) + r":\d+", "FILE", note).startswith(line)
    assert note.partition("; ")[2].startswith("the quantized network follows eval mode, in training too")
    assert ("return the logits in both modes" in note) == (function is probabilities)
    # What is dropped stays a matter of the mode; noise does not.
    assert torch.equal(graph.train()(x), graph.eval()(x)) == (function is not noise)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (m.head(x), m.head(x)) if m.training else m.head(x),
        lambda m, x: m.head(m.other(x)) if m.training else m.head(x),
        lambda m, x: m.head(functional.leaky_relu(x, 0.1 if m.training else 0.2)),
    ],
)
def test_weights_outputs_and_settings_of_training_alone_are_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="computes something else in training than in eval mode: ") as caught:
        quantize_model(
            Differing(function), torch.randn(2, 3, 6, 6), QuantizationConfig(), ("tensorrt",), lambda _: nn.Identity()
        )
    assert f" at {__file__}:" in str(caught.value)
