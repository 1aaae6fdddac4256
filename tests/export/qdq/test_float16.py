"""Every operation that torch exports, in float16: valid by ONNX's own types, and float32 within float16's rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import Tensor, nn

from crqat.export.graph.from_torch import marked_graph
from crqat.export.qdq.float16 import as_float16
from crqat.export.qdq.write import float_model
from crqat.train.graph.operations import trace
from tests.export.conftest import initializer, random_images, session

Function = Callable[[Tensor], Tensor]


class Applied(nn.Module):
    """A function of a layer's result and of the image itself, both of shape [N, 8, 8, 8]."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(8, 8, 1), function

    def forward(self, x: Tensor) -> Tensor:
        """All values of both."""
        return torch.cat([self.function(self.conv(x)).flatten(1), self.function(x).flatten(1)], 1)


def attention(x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    return torch.softmax(tokens @ tokens.transpose(1, 2) / math.sqrt(8), -1) @ tokens


def masked(x: Tensor) -> Tensor:
    return torch.softmax(x.masked_fill(x > 1, -1e9), -1)


MODULES: dict[str, nn.Module] = {
    type(module).__name__: module
    for module in (
        nn.ReLU(), nn.ReLU6(), nn.Hardtanh(), nn.Sigmoid(), nn.Tanh(), nn.SiLU(), nn.Mish(), nn.GELU(), nn.ELU(),
        nn.SELU(), nn.CELU(0.7), nn.Softplus(), nn.Softsign(), nn.Hardswish(), nn.Hardsigmoid(), nn.LeakyReLU(0.1),
        nn.PReLU(8), nn.LogSigmoid(), nn.Softshrink(0.3), nn.Hardshrink(0.3), nn.Tanhshrink(), nn.Softmin(1),
        nn.Softmax(1), nn.LogSoftmax(1), nn.Softmax2d(), nn.GLU(1), nn.BatchNorm2d(8), nn.GroupNorm(2, 8),
        nn.InstanceNorm2d(8), nn.LayerNorm(8), nn.AvgPool2d(2), nn.MaxPool2d(2),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.AdaptiveAvgPool2d(2), nn.AdaptiveMaxPool2d(2),
        nn.LPPool2d(2, 2), nn.PixelShuffle(2), nn.PixelUnshuffle(2), nn.ZeroPad2d(1), nn.ReflectionPad2d(1),
        nn.ReplicationPad2d(1), nn.ConstantPad2d(1, 0.3), nn.Conv2d(8, 4, 3, dilation=2), nn.Linear(8, 4),
        nn.ConvTranspose2d(8, 4, 3, 2), nn.Flatten(), nn.Unflatten(1, (2, 4)), nn.Upsample(scale_factor=2),
        nn.UpsamplingBilinear2d(scale_factor=2), nn.CosineSimilarity(1), nn.ChannelShuffle(2), nn.Dropout(),
    )
    if not isinstance(module, (nn.CosineSimilarity, nn.ChannelShuffle))
}  # fmt: skip
FUNCTIONS: dict[str, Function] = {
    "abs": torch.abs, "exp": torch.exp, "neg": torch.neg, "sign": lambda x: torch.sign(x) * x, "square": torch.square,
    "sqrt": lambda x: torch.sqrt(x.abs() + 0.1), "log": lambda x: torch.log(x.abs() + 1), "erf": torch.erf,
    "reciprocal": lambda x: 1 / (1 + x.abs()), "power": lambda x: (x.abs() + 0.1) ** 1.5,
    "square by power": lambda x: x**2, "floor": lambda x: x - torch.floor(x + 0.5) * 0, "sin": lambda x: torch.sin(x),
    "mean": lambda x: x.mean((2, 3)), "mean of tokens": lambda x: x.flatten(2).mean(2, keepdim=True),
    "sum": lambda x: x.sum(1), "max": lambda x: x.amax((2, 3)), "min": lambda x: x.amin(1, keepdim=True),
    "norm": lambda x: x.norm(dim=1), "absolute sum": lambda x: x.norm(1, dim=1), "product": lambda x: x[:, :2].prod(1),
    "log sum": lambda x: torch.logsumexp(x, 1), "variance": lambda x: x.var((2, 3)), "std": lambda x: x.std(1),
    "subtraction": lambda x: x - 0.5, "from one": lambda x: 1 - x, "division": lambda x: x / 3.0,
    "clamp": lambda x: x.clamp(-0.5, 1.5), "clamp below": lambda x: x.clamp(min=0),
    "clamp above": lambda x: x.clamp(max=1), "maximum": lambda x: torch.maximum(x, x.flip(1)),
    "minimum": lambda x: torch.minimum(x, x * x), "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "comparison": lambda x: x * (x > 0.2), "mask as float": lambda x: x * (x > 0.2).float(), "masked": masked,
    "chunk": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "split": lambda x: torch.cat(torch.split(x, [3, 5], 1)[::-1], 1),
    "slice": lambda x: x[:, :, ::2, 1:], "roll": lambda x: torch.roll(x, 1, 2), "flip": lambda x: x.flip(2),
    "stack": lambda x: torch.stack([x, x * 2], 1), "unbind": lambda x: x.unbind(1)[3] + x.unbind(1)[0],
    "permute": lambda x: x.permute(0, 2, 3, 1), "expand": lambda x: x[:, :1].expand(-1, 4, -1, -1),
    "repeat": lambda x: x.repeat(1, 2, 1, 1), "zeros": lambda x: torch.cat([x, torch.zeros_like(x[:, :2])], 1),
    "ones": lambda x: x + torch.ones_like(x), "full": lambda x: x * torch.full_like(x, 0.3), "attention": attention,
    "matmul": lambda x: x @ x.transpose(2, 3), "bmm": lambda x: torch.bmm(x.flatten(2), x.flatten(2).transpose(1, 2)),
    "einsum": lambda x: torch.einsum("nchw,nchv->ncwv", x, x), "normalize": lambda x: F.normalize(x, dim=1),
    "normalize nothing": lambda x: F.normalize(x * 0, dim=1), "cumulative sum": lambda x: torch.cumsum(x, 1),
    "glu": lambda x: F.glu(x, 1), "pad": lambda x: F.pad(x, (1, 0, 2, 1), value=-1.0),
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0), "nearest size": lambda x: F.interpolate(x, size=(5, 6)),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "aligned": lambda x: F.interpolate(x, size=(12, 12), mode="bilinear", align_corners=True),
    "bicubic": lambda x: F.interpolate(x, scale_factor=2.0, mode="bicubic"),
    "power mean": lambda x: F.avg_pool2d(x.clamp(min=1e-6) ** 3, 8) ** (1 / 3),
    "layer norm by hand": lambda x: (x - x.mean(1, True)) / torch.sqrt(x.var(1, keepdim=True) + 1e-6),
}  # fmt: skip
ALL: dict[str, Function] = {**MODULES, **FUNCTIONS}


def test_there_are_at_least_eighty() -> None:
    assert len(ALL) >= 80


@pytest.mark.parametrize("name", ALL)
def test_float16_is_float32_within_its_rounding(name: str) -> None:
    torch.manual_seed(0)
    network, images = Applied(ALL[name]).eval(), random_images(2, 8, 8, 8)
    with torch.no_grad():
        expected = network(images).numpy()
    graph = marked_graph(trace(network), [8, 8, 8], expected.shape[1])
    single, half = float_model(graph, {}), float_model(graph, {}, "float16")
    onnx.checker.check_model(half, full_check=True)
    assert [value.type.tensor_type.elem_type for value in (half.graph.input[0], half.graph.output[0])] == [
        TensorProto.FLOAT
    ] * 2
    found: list[Any] = [session(model).run(["logits"], {"input": images.numpy()})[0] for model in (single, half)]
    scale = np.abs(expected).max() + 2.0**-10
    assert np.abs(found[0] - expected).max() <= 1e-4 * scale
    assert np.abs(found[1] - expected).max() <= 16 * 2.0**-11 * scale
    layer = next(node for node in half.graph.node if node.op_type == "Conv")
    assert initializer(half, layer.input[1]).dtype == np.float16


def test_constants_are_neither_infinite_nor_lost() -> None:
    stored = [float(as_float16(np.asarray(value, np.float32))) for value in (-1e9, 1e-12, -1e-12, 0.0, -np.inf, 0.1)]
    assert stored == [-65504.0, 2.0**-24, -(2.0**-24), 0.0, -np.inf, float(np.float16(0.1))]
