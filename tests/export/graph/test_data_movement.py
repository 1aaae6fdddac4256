"""Torch's list of data movement and ONNX's agree: what the one calls movement is exported as the other's operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper
from torch import Tensor, nn
from torch.nn import functional

from crqat.export.graph.data_movement import DATA_MOVEMENT, PARTIAL_MOVEMENT, moves_codes
from crqat.export.graph.from_torch import marked_graph
from crqat.train.graph.operations import moves_values, trace

CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool": lambda x: functional.max_pool2d(x, 2),
    "flatten": lambda x: torch.flatten(x, 1),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: torch.transpose(x, 1, 2),
    "slice": lambda x: x[:, :, ::2, ::2],
    "pad": lambda x: functional.pad(x, (1, 1)),
    "reflect": lambda x: functional.pad(x, (1, 1, 1, 1), mode="reflect"),
    "chunk": lambda x: x.chunk(2, 1)[1],
    "unsqueeze": lambda x: x.unsqueeze(2),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "replicate": nn.ReplicationPad2d(1),
}


class Moved(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        if isinstance(function, nn.Module):
            self.layer = function
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x).flatten(1)


@pytest.mark.parametrize("case", CASES)
def test_what_torch_moves_is_movement_in_onnx(case: str) -> None:
    traced = trace(Moved(CASES[case]).eval())
    moved = [node for node in traced.graph.nodes if node.op.startswith("call")]
    assert moved and all(moves_values(traced, node) for node in moved)
    graph = marked_graph(traced, [4, 6, 6], 1)
    assert graph.nodes and {node.op_type for node in graph.nodes} <= {*DATA_MOVEMENT, *PARTIAL_MOVEMENT}


def test_padding_moves_codes_only_with_zeros() -> None:
    node = helper.make_node("Pad", ["x", "pads", "value"], ["y"])
    assert moves_codes(node, {"value": np.zeros((), np.float32)})
    assert not moves_codes(node, {"value": np.ones((), np.float32)})
    assert moves_codes(helper.make_node("Pad", ["x", "pads"], ["y"]), {})
    assert not moves_codes(helper.make_node("DepthToSpace", ["x"], ["y"], blocksize=2), {})
