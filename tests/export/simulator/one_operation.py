"""QDQ files of one operation or a few, from nodes that are written out, for the tests of the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from crqat.export.simulator.run import simulate
from crqat.export.simulator.values import NotSimulated, Simulation
from tests.export.conftest import session

Array = npt.NDArray[Any]
Node = tuple[str, Sequence[str], str, dict[str, Any]]


@dataclass
class Tensor:
    """Codes 0..255 and what they stand for."""

    codes: Array
    scale: np.float32
    zero_point: int

    @property
    def integers(self) -> Array:
        return np.asarray(self.codes.astype(np.int64) - self.zero_point)

    @property
    def real(self) -> npt.NDArray[np.float32]:
        return self.integers.astype(np.float32) * self.scale


def model_of(nodes: Sequence[Node], constants: dict[str, Any], shape: Sequence[int]) -> onnx.ModelProto:
    """A file with the input "input" of `shape` and the output "logits"."""
    graph = helper.make_graph(
        [helper.make_node(op, list(i), [o], f"{o}/{op}", **attributes) for op, i, o, attributes in nodes],
        "one",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def grid(name: str, scale: np.float32, zero_point: int) -> dict[str, Any]:
    """The constants of a quantizer."""
    return {f"{name}.scale": np.float32(scale), f"{name}.zero": np.uint8(zero_point)}


def quantize(name: str, source: str, grid_name: str = "") -> Node:
    return "QuantizeLinear", [source, f"{grid_name or name}.scale", f"{grid_name or name}.zero"], name, {}


def dequantize(name: str, grid_name: str, result: str) -> Node:
    return "DequantizeLinear", [name, f"{grid_name}.scale", f"{grid_name}.zero"], result, {}


def run(model: onnx.ModelProto, images: npt.NDArray[np.float32], name: str) -> tuple[Simulation, Array, Array]:
    """The simulation, ONNX Runtime's codes of a tensor at full optimization, and its logits."""
    runtime = session(model, outputs=(name,))
    logits, codes = runtime.run(["logits", name], {"input": images})
    return simulate(model, images), codes.astype(np.int64), logits


def requantize(sums: Array, ratio: npt.NDArray[np.float32], zero_point: int, relu: bool = False) -> Array:
    """Codes of int32 sums; `ratio` is s_x s_w / s_y for each channel, on axis 1."""
    ratio = ratio.reshape(1, -1, *[1] * (sums.ndim - 2))
    rounded = np.rint(sums.astype(np.float32) * ratio).astype(np.int64)
    rounded = np.maximum(rounded, 0) if relu else rounded
    return np.asarray(np.clip(rounded, -zero_point, 255 - zero_point) + zero_point)


def random_tensor(rng: np.random.Generator, shape: Sequence[int], zero_point: int, high: int = 256) -> Tensor:
    return Tensor(rng.integers(0, high, shape), np.float32(rng.uniform(0.01, 0.1)), zero_point)


def refused(nodes: Sequence[Node], constants: dict[str, Any] | None = None) -> str:
    model = model_of(nodes, {**grid("x", np.float32(0.1), 128), **(constants or {})}, (1, 2, 4, 4))
    with pytest.raises(NotSimulated) as caught:
        simulate(model, np.zeros((1, 2, 4, 4), np.float32))
    return str(caught.value)
