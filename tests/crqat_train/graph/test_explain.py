"""Networks as people write them: what cannot be traced is named by file and line, with what to change there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from crqat.core.errors import UsageError
from crqat.train.config import QuantizationConfig
from crqat.train.quantized_model import quantize_model


class Own(nn.Module):
    """Layers for a forward that is given as a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 4)
        self.act = lambda x: functional.relu(x)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.bn(self.conv(x)).relu())

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def quantized(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    targets = ("onnxruntime", "tensorrt")
    example = torch.randn(2, 3, 8, 8)
    return quantize_model(model.eval(), example, QuantizationConfig(), targets, lambda _: nn.Identity())


def line_of(function: Callable[..., Any], text: str) -> str:
    lines, first = inspect.getsourcelines(function)
    return f"{inspect.getsourcefile(function)}:{first + next(i for i, line in enumerate(lines) if text in line)}"


def message_of(model: nn.Module) -> str:
    with pytest.raises(UsageError) as caught:
        quantized(model)
    message = str(caught.value)
    assert message.startswith("model.name: ") and "\n" not in message
    return message


def values_decide(m: Own, x: Tensor) -> Tensor:
    if x.max() > 1:
        x = x * 0.5
    return m.head(x)


def changes_a_part(m: Own, x: Tensor) -> Tensor:
    x[:, :4] += 1.0
    return m.head(m.conv2(x))


def numpy_computes(m: Own, x: Tensor) -> Tensor:
    return m.head(torch.from_numpy(x.detach().numpy()))


def new_zeros(m: Own, x: Tensor) -> Tensor:
    zeros = torch.zeros(x.shape[0], 8, x.shape[2], x.shape[3])
    return m.head(m.conv2(x + zeros))


def uneven_pool(m: Own, x: Tensor) -> Tensor:
    pooled = functional.adaptive_avg_pool2d(x, 3)
    return m.head(m.conv2(pooled))


def uses_weights(m: Own, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    tokens, weights = m.attention(tokens, tokens, tokens)
    return m.fc(tokens.mean(1)) * weights.mean()  # type: ignore[no-any-return]


def masked_attention(m: Own, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    tokens, _ = m.attention(tokens, tokens, tokens, attn_mask=x.new_zeros(64, 64))
    return m.fc(tokens.mean(1))  # type: ignore[no-any-return]


def other_slope_in_training(m: Own, x: Tensor) -> Tensor:
    return m.head(m.conv2(functional.leaky_relu(x, 0.1 if m.training else 0.2)))


@pytest.mark.parametrize(
    ("function", "line", "way_out"),
    [
        (values_decide, "if x", "depends on values or sizes; decide it in __init__, take torch.where for values"),
        (changes_a_part, "x[:, :4]", "a part of a tensor is assigned there; build the tensor by torch.cat"),
        (numpy_computes, "from_numpy", "NumPy computes there; take torch's operation"),
        (new_zeros, "torch.zeros", "write x.new_zeros(...)"),
        (uneven_pool, "adaptive", "pools (8, 8) pixels to (3, 3), which ONNX cannot express: take images whose size"),
        (uses_weights, "weights.mean", "use the first output of nn.MultiheadAttention alone"),
        (masked_attention, "attn_mask", "call nn.MultiheadAttention without a mask"),
        (other_slope_in_training, "leaky_relu", "computes something else in training than in eval mode"),
    ],
)
def test_the_line_and_the_way_out_are_named(function: Callable[..., Any], line: str, way_out: str) -> None:
    message = message_of(Own(function))
    assert f" at {line_of(function, line)}" in message
    assert way_out in message


WORKING: dict[str, Callable[..., Any]] = {
    "a function as an attribute": lambda m, x: m.head(m.act(m.conv2(x))),
    "a loop over a known number": lambda m, x: m.head([x := functional.relu(m.conv2(x)) for _ in range(2)][-1]),
    "attention": lambda m, x: m.fc(
        (lambda t: m.attention(t, t, t, need_weights=False)[0])(x.flatten(2).transpose(1, 2)).mean(1)
    ),
    "zeros of its size": lambda m, x: m.head(m.conv2(x + x.new_zeros(x.shape[0], 8, 1, 1))),
    "resized to another's size": lambda m, x: m.head(
        functional.interpolate(functional.max_pool2d(x, 2), size=x.shape[-2:]) + m.conv2(x)
    ),
    "added in place and not": lambda m, x: m.head((x + m.conv2(x)).add_(m.conv2(x))),
}


@pytest.mark.parametrize("case", WORKING)
def test_what_works(case: str) -> None:
    model, x = Own(WORKING[case]), torch.randn(3, 3, 8, 8)
    graph = quantized(model)
    with torch.no_grad():
        # torch has a faster kernel for attention in eval mode, whose last bits differ.
        torch.testing.assert_close(graph(x), model(x), rtol=1e-5 if case == "attention" else 0, atol=1e-6)


@pytest.mark.parametrize(
    ("result", "kind"), [(lambda m, x: {"logits": m.head(x)}, "dict"), (lambda m, x: (x, x), "tuple")]
)
def test_another_result_than_logits_is_refused(result: Callable[..., Any], kind: str) -> None:
    message = message_of(Own(result))
    assert f"the forward of Own at {line_of(Own.forward, 'def forward')} returns a {kind}; wrap it in a" in message


class Two(Own):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return self.head(self.conv(x) + y)


class Empty(nn.Module):
    pass


def test_another_input_than_images_is_refused() -> None:
    assert f"{line_of(Two.forward, 'def forward')} takes x, y; wrap it in a module" in message_of(Two(lambda m, x: x))
    assert "Empty has no forward; define one that takes the images" in message_of(Empty())

    class OfDict(Own):
        def forward(self, batch: Any) -> Any:
            return self.head(self.conv(batch["image"]))

    assert line_of(OfDict.forward, "batch[") in message_of(OfDict(lambda m, x: x))


def test_wrapped_networks_are_refused_before_they_are_copied() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    compiled: Any = torch.compile(plain)
    assert "0 is compiled by torch.compile" in message_of(nn.Sequential(compiled))
    assert "DataParallel is wrapped in DataParallel" in message_of(nn.DataParallel(plain))
    assert "is scripted by torch.jit" in message_of(nn.Sequential(torch.jit.script(plain)))
