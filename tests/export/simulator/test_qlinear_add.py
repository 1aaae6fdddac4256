"""Both formulas of a sum of codes against ONNX Runtime's kernels, here and on emulated ARM CPUs: no code differs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bench import onnxruntime_process
from crqat.core.targets import AddKernel
from crqat.export.simulator.qlinear_add import qlinear_add
from crqat.export.simulator.values import Added, Array, Codes
from tests.needs import arm_python

# All pairs of codes: the input has one row of all codes after the other, a constant beside it each row's number.
ROWS = np.tile(np.arange(256, dtype=np.uint8), (256, 1))[None, None]
# That constant in full, or one number per row, which kernels treat apart.
CONSTANTS = {"full": np.ascontiguousarray(ROWS.swapaxes(2, 3)), "number": np.arange(256, dtype=np.uint8)[:, None]}


@dataclass(frozen=True)
class Sum:
    """One QLinearAdd."""

    scales: tuple[np.float32, np.float32, np.float32]
    zero_points: tuple[int, int, int]
    constant: str
    constant_first: bool


@functools.cache
def sums() -> list[Sum]:
    rng = np.random.default_rng(0)
    result = []
    for trial in range(96):
        first, second = (np.float32(np.exp(rng.uniform(-6, 1))) for _ in range(2))
        total = np.float32((first + second) * rng.uniform(0.3, 1.2))
        if trial % 8 == 0:
            first, second, total = (np.float32(value) for value in (0.5, 0.25, 0.5))  # full of ties
        elif trial % 8 == 1:  # outside of fixed point's quotients, with ties
            first, second = np.float32(total * 10 ** -rng.uniform(4.3, 5)), np.float32(total / 2)
        elif trial % 8 == 2:
            first, second = np.float32(total * 300), np.float32(total * rng.uniform(0.3, 1.2))
        if trial % 16 > 8:
            first, second = second, first
        zeros = [int(zero) for zero in (rng.choice([0, 128], 3) if trial % 3 else rng.integers(0, 256, 3))]
        constant = "full" if trial % 4 < 2 else "number"
        result.append(Sum((first, second, total), (zeros[0], zeros[1], zeros[2]), constant, trial % 32 >= 16))
    return result


@functools.cache
def simulated(kernel: AddKernel) -> list[Array]:
    """Each sum's codes, uint8; its distance from the exact sum is within the bound."""
    result = []
    for each in sums():
        codes = [ROWS, CONSTANTS[each.constant]]
        ordered = codes[::-1] if each.constant_first else codes
        first, second = (
            Codes(raw.astype(np.int32) - zero, scale, zero)
            for raw, scale, zero in zip(ordered, each.scales, each.zero_points, strict=False)
        )
        scale, zero_point = each.scales[2], each.zero_points[2]
        rounded, bound = qlinear_add(Added(first, second), scale, zero_point, kernel)
        exact = sum(v.integers * np.float64(v.scale) for v in (first, second)) / np.float64(scale)
        assert np.abs(rounded - exact).max() <= 0.5 + bound
        # Of one step of a code where no two large products cancel.
        assert bound < (0.05 if max(each.scales) / scale < 4 else 1)
        result.append(np.clip(rounded + zero_point, 0, 255).astype(np.uint8))
    return result


def model() -> onnx.ModelProto:
    """All sums, each an output."""
    constants: dict[str, Array] = dict(CONSTANTS)
    nodes = []
    for index, each in enumerate(sums()):
        names = []
        for part, scale, zero in zip("aby", each.scales, each.zero_points, strict=True):
            constants[f"{index}.{part}.scale"] = np.asarray(scale)
            constants[f"{index}.{part}.zero"] = np.asarray(zero, np.uint8)
            names.append([f"{index}.{part}.scale", f"{index}.{part}.zero"])
        first, second = (each.constant, "input") if each.constant_first else ("input", each.constant)
        inputs = [first, *names[0], second, *names[1], *names[2]]
        nodes.append(helper.make_node("QLinearAdd", inputs, [f"y{index}"], domain="com.microsoft"))
    graph = helper.make_graph(
        nodes,
        "sums",
        [helper.make_tensor_value_info("input", TensorProto.UINT8, ROWS.shape)],
        [helper.make_tensor_value_info(node.output[0], TensorProto.UINT8, None) for node in nodes],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def computed(folder: Path, python: Path | None = None) -> list[Array]:
    onnx.save(model(), folder / "sums.onnx")
    names = [f"y{index}" for index in range(len(sums()))]
    return onnxruntime_process.outputs(folder / "sums.onnx", names, ROWS, folder, python=python)


def differing(first: list[Array], second: list[Array]) -> int:
    return sum(int((a != b).sum()) for a, b in zip(first, second, strict=True))


def test_the_formula_of_x86(tmp_path: Path) -> None:
    assert differing(simulated("float32"), computed(tmp_path)) == 0


@pytest.mark.arm
@pytest.mark.parametrize("cpu", ["cortex-a57", "max"])
def test_the_formula_of_arm(cpu: str, tmp_path: Path) -> None:
    assert differing(simulated("fixed_point"), computed(tmp_path, arm_python(cpu))) == 0


def test_the_formulas_differ_by_one_at_ties() -> None:
    pairs = list(zip(simulated("float32"), simulated("fixed_point"), strict=True))
    assert 0 < differing(*map(list, zip(*pairs, strict=True))) < 0.05 * ROWS.size * len(pairs)
    assert max(np.abs(a.astype(int) - b).max() for a, b in pairs) == 1
