"""Forwards that ask for sizes are traced as they are, and hold for other numbers of images."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from crqat.train.graph.operations import trace

CASES: dict[str, Callable[[Tensor], Tensor]] = {}


def case(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    CASES[function.__name__] = function
    return function


@case
def padding_by_size(x: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    assert height == width, "square images"
    missing = max((-(-height // 3) - 1) * 3 + 4 - height, 0)
    return functional.pad(x, [missing // 2, missing - missing // 2, 0, 0]) if missing > 0 else x


@case
def a_list_of_chunks(x: Tensor) -> Tensor:
    parts = list(x.chunk(2, 1))
    parts.extend(torch.relu(parts[-1]) for _ in range(2))
    return torch.cat(parts, 1)


@case
def an_unequal_split(x: Tensor) -> Tensor:
    left, right = x.split((1, 3), dim=1)  # type: ignore[no-untyped-call]
    return left * right  # type: ignore[no-any-return]


@case
def unpacked_queries(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    q, k = x.reshape(batch, 2, channels // 2, height * width).permute(1, 0, 2, 3)
    return (q @ k.transpose(-2, -1)).softmax(-1)  # type: ignore[no-any-return]


class Of(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("offset", torch.ones(1, 1, 1, 1))

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        x = x if scale is None else x * scale
        return self.function(x + self.offset.expand(x.shape[0], -1, -1, -1))  # type: ignore[operator]


@pytest.mark.parametrize("name", CASES)
def test_sizes_are_known_and_the_batch_stays_free(name: str) -> None:
    network = Of(CASES[name]).eval()
    traced = trace(network, torch.randn(2, 4, 8, 8))
    images = torch.randn(5, 4, 8, 8)
    assert torch.equal(traced(images), Of(CASES[name])(images))
    assert len(traced.graph.find_nodes(op="placeholder")) == 1
