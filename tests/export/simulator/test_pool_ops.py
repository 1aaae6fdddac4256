"""Pools of any rank against torch and ONNX Runtime: no code of a maximum differs, and means lie in their bound."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from crqat.export.simulator.pool_ops import average_pool, max_pool
from crqat.export.simulator.run import simulate
from tests.export.conftest import session
from tests.export.simulator.one_operation import Node, dequantize, grid, model_of, quantize, random_tensor

SIZES = (9, 8, 7)
WINDOWS: list[dict[str, Any]] = [
    {"kernel": 3, "stride": 2, "pad": 1},
    {"kernel": 2, "stride": 3, "pad": 0, "ceil_mode": True},
    {"kernel": 3, "stride": 2, "pad": 1, "ceil_mode": True},
    {"kernel": 2, "stride": 2, "pad": 1, "ceil_mode": True},  # a window that would start in the padding
]


def attributes_of(rank: int, *, kernel: int, stride: int, pad: int, ceil_mode: bool = False) -> dict[str, Any]:
    return {
        "kernel_shape": [kernel] * rank, "strides": [stride] * rank, "pads": [pad] * 2 * rank,
        "ceil_mode": int(ceil_mode),
    }  # fmt: skip


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_windows_are_those_of_torch(rank: int, window: dict[str, Any]) -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, *SIZES[:rank])))
    given = {"kernel_size": window["kernel"], "stride": window["stride"], "padding": window["pad"]}
    given["ceil_mode"] = window.get("ceil_mode", False)
    mean = [functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d][rank - 1]
    largest: Any = [functional.max_pool1d, functional.max_pool2d, functional.max_pool3d][rank - 1]
    attributes = attributes_of(rank, **window)
    for counted in (False, True):
        ours = average_pool({**attributes, "count_include_pad": int(counted)}, x.numpy())
        np.testing.assert_allclose(ours, mean(x, **given, count_include_pad=counted).numpy(), rtol=1e-12)
    for dilation in (1, 2) if window["kernel"] == 3 else (1,):
        ours = max_pool({**attributes, "dilations": [dilation] * rank}, x.numpy())
        np.testing.assert_array_equal(ours, largest(x, **given, dilation=dilation).numpy())


@pytest.mark.parametrize("kind", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize(
    "attributes",
    [{"auto_pad": "SAME_UPPER"}, {"auto_pad": "SAME_LOWER"}, {"auto_pad": "VALID"}, {"pads": 1}, {"pads": 2}],
    ids=str,
)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_windows_are_those_of_the_runtime(rank: int, attributes: dict[str, Any], kind: str) -> None:
    x = random_tensor(np.random.default_rng(0), (2, 3, *SIZES[:rank]), 128, high=128)  # padding is none of the values
    further = {"kernel_shape": [3] * rank, "strides": [2] * rank, **attributes}
    if "pads" in attributes:  # more behind than before, in one way or the other
        further["pads"] = [attributes["pads"] - 1] * rank + [1] * rank
    nodes: list[Node] = [
        quantize("x", "input"),
        dequantize("x", "x", "x.real"),
        (kind, ["x.real"], "y", further),
        quantize("y.codes", "y", "x"),
        dequantize("y.codes", "x", "logits"),
    ]
    model = model_of(nodes, grid("x", x.scale, 128), x.codes.shape)
    simulation = simulate(model, x.real)
    runtime = session(model).run(["logits"], {"input": x.real})[0]
    differing = np.rint(runtime / x.scale) != simulation.codes["y.codes"]
    before = simulation.before_rounding["y.codes"]
    tie = np.abs(before - np.floor(before) - 0.5) <= simulation.bounds["y.codes"]
    assert not (differing & ~tie).any()
    assert not differing.any() or kind == "AveragePool"
