"""Each operation of the simulator against slow integer arithmetic in NumPy and ONNX Runtime: no code differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.simulate import simulate
from export.simulated import NotSimulated, Simulation
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


def slow_convolution(x: Array, w: Array, pads: Sequence[int], stride: int, dilation: int, groups: int) -> Array:
    """Sums by the definition of a convolution, one product at a time over the kernel."""
    n, _, height, width = x.shape
    filters, depth, kernel_h, kernel_w = w.shape
    rows = (height + pads[0] + pads[2] - dilation * (kernel_h - 1) - 1) // stride + 1
    columns = (width + pads[1] + pads[3] - dilation * (kernel_w - 1) - 1) // stride + 1
    sums = np.zeros((n, filters, rows, columns), np.int64)
    for f, r, c, d, i, j in np.ndindex(filters, rows, columns, depth, kernel_h, kernel_w):
        y, z = r * stride - pads[0] + i * dilation, c * stride - pads[1] + j * dilation
        if 0 <= y < height and 0 <= z < width:
            sums[:, f, r, c] += x[:, f // (filters // groups) * depth + d, y, z] * w[f, d, i, j]
    return sums


def random_tensor(rng: np.random.Generator, shape: Sequence[int], zero_point: int, high: int = 256) -> Tensor:
    return Tensor(rng.integers(0, high, shape), np.float32(rng.uniform(0.01, 0.1)), zero_point)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("kernel", "pads", "stride", "dilation", "groups"),
    [
        ((3, 3), (1, 1, 1, 1), 1, 1, 1),
        ((3, 3), (1, 0, 2, 1), 2, 1, 1),
        ((1, 1), (0, 0, 0, 0), 2, 1, 1),
        ((3, 2), (2, 2, 2, 2), 1, 2, 1),
        ((3, 3), (1, 1, 1, 1), 1, 1, 4),
        ((3, 3), (1, 1, 1, 1), 2, 1, 8),
        ((5, 5), (2, 2, 2, 2), 1, 1, 2),
    ],
)
def test_convolution(
    kernel: tuple[int, int], pads: tuple[int, ...], stride: int, dilation: int, groups: int, relu: bool
) -> None:
    rng = np.random.default_rng(groups + stride)
    ties = 0
    for zero_point, high, powers in ((128, 256, False), (0, 128, False), (128, 256, True)):
        x = random_tensor(rng, (3, 8, 9, 10), zero_point, high)
        # Within what 16-bit sums hold, so that every x86 kernel is exact.
        limit = 64 if high == 256 else 127
        weight = rng.integers(-limit, limit + 1, (8, 8 // groups, *kernel)).astype(np.int8)
        weight_scale = rng.uniform(0.001, 0.01, 8).astype(np.float32)
        bias = rng.integers(-20000, 20000, 8).astype(np.int32)
        out_scale, out_zero = np.float32(rng.uniform(0.1, 0.4)), 0 if relu else 119
        if powers:  # an eighth of all sums is a tie
            x.scale, weight_scale, out_scale = np.float32(2**-4), np.full(8, 2**-7, np.float32), np.float32(2**-3)
            weight, bias = weight // 32 * 32, bias // 32 * 32
        unit = (x.scale * weight_scale).astype(np.float32)
        constants = {
            **grid("x", x.scale, zero_point), **grid("y", out_scale, out_zero), "w": weight,
            "w.scale": weight_scale, "w.zero": np.zeros(8, np.int8), "b": bias, "b.scale": unit,
        }  # fmt: skip
        attributes = {
            "kernel_shape": kernel, "pads": pads, "strides": [stride] * 2, "dilations": [dilation] * 2, "group": groups,
        }  # fmt: skip
        nodes: list[Node] = [
            quantize("x", "input"),
            dequantize("x", "x", "x.real"),
            ("DequantizeLinear", ["w", "w.scale", "w.zero"], "w.real", {"axis": 0}),
            ("DequantizeLinear", ["b", "b.scale"], "b.real", {"axis": 0}),
            ("Conv", ["x.real", "w.real", "b.real"], "sum", attributes),
            *([("Relu", ["sum"], "relu", {})] if relu else []),
            quantize("y", "relu" if relu else "sum"),
            dequantize("y", "y", "logits"),
        ]
        model = model_of(nodes, constants, x.codes.shape)
        simulation, runtime, logits = run(model, x.real, "y")
        np.testing.assert_array_equal(simulation.codes["x"], x.integers)
        sums = slow_convolution(x.integers, weight.astype(np.int64), pads, stride, dilation, groups)
        sums += bias.reshape(1, -1, 1, 1)
        expected = requantize(sums, (unit / out_scale).astype(np.float32), out_zero, relu)
        assert len(np.unique(expected)) > 20
        ties += int(((np.abs(sums) % 256 == 128) & (expected > 0) & (expected < 255)).sum()) if powers else 0
        np.testing.assert_array_equal(simulation.codes["y"] + out_zero, expected)
        np.testing.assert_array_equal(simulation.codes["y"] + out_zero, runtime)
        np.testing.assert_array_equal(simulation.logits, logits)
    assert ties > 20


def test_sums_are_rounded_in_float32() -> None:
    """As ONNX Runtime does; of two million sums some are codes away from float64's, by one."""
    rng = np.random.default_rng(0)
    different = 0
    for _ in range(4):
        x = Tensor(np.arange(256).reshape(1, 1, 16, 16), np.float32(rng.uniform(0.01, 0.1)), 0)
        weight = rng.integers(1, 65, (2048, 1, 1, 1)).astype(np.int8)
        weight_scale = rng.uniform(0.001, 0.01, 2048).astype(np.float32)
        bias = rng.integers(-8000, 8000, 2048).astype(np.int32)
        unit, out_scale = (x.scale * weight_scale).astype(np.float32), np.float32(rng.uniform(0.02, 0.1))
        constants = {
            **grid("x", x.scale, 0), **grid("y", out_scale, 0), "w": weight, "w.scale": weight_scale,
            "w.zero": np.zeros(2048, np.int8), "b": bias, "b.scale": unit,
        }  # fmt: skip
        nodes: list[Node] = [
            quantize("x", "input"),
            dequantize("x", "x", "x.real"),
            ("DequantizeLinear", ["w", "w.scale", "w.zero"], "w.real", {"axis": 0}),
            ("DequantizeLinear", ["b", "b.scale"], "b.real", {"axis": 0}),
            ("Conv", ["x.real", "w.real", "b.real"], "sum", {"kernel_shape": [1, 1]}),
            quantize("y", "sum"),
            dequantize("y", "y", "logits"),
        ]
        simulation, runtime, _ = run(model_of(nodes, constants, x.codes.shape), x.real, "y")
        np.testing.assert_array_equal(simulation.codes["y"], runtime)
        sums = x.integers * weight.reshape(1, -1, 1, 1).astype(np.int64) + bias.reshape(1, -1, 1, 1)
        ratio = (unit.astype(np.float64) / np.float64(out_scale)).reshape(1, -1, 1, 1)
        different += int((np.clip(np.rint(sums * ratio), 0, 255) != runtime).sum())
    assert different > 0


def test_a_relu_is_a_bound_of_signed_codes() -> None:
    """TensorRT's codes have no zero point: what a ReLU cuts off, their type does not."""
    rng = np.random.default_rng(0)
    images = rng.normal(0, 2, (2, 4, 6, 6)).astype(np.float32)
    constants: dict[str, Any] = {
        "w": rng.integers(-64, 65, (4, 4, 1, 1)).astype(np.int8), "w.scale": np.full(4, 0.01, np.float32),
        "w.zero": np.zeros(4, np.int8),
    }  # fmt: skip
    for name in "xyz":
        constants.update({f"{name}.scale": np.float32(0.05), f"{name}.zero": np.int8(0)})
    nodes: list[Node] = [
        quantize("x", "input"),
        dequantize("x", "x", "x.real"),
        ("DequantizeLinear", ["w", "w.scale", "w.zero"], "w.real", {"axis": 0}),
        ("Conv", ["x.real", "w.real"], "sum", {"kernel_shape": [1, 1]}),
        ("Relu", ["sum"], "relu", {}),
        quantize("y", "relu"),
        dequantize("y", "y", "y.real"),
        ("Add", ["x.real", "y.real"], "added", {}),
        ("Relu", ["added"], "relu2", {}),
        quantize("z", "relu2"),
        dequantize("z", "z", "logits"),
    ]
    model = model_of(nodes, constants, images.shape)
    simulation = simulate(model, images)
    expected = session(model, "ORT_DISABLE_ALL").run(["logits"], {"input": images})[0]
    assert [int(simulation.codes[name].min()) for name in "xyz"] == [simulation.codes["x"].min(), 0, 0]
    assert simulation.codes["x"].min() < -60
    np.testing.assert_array_equal(simulation.logits, expected)


@pytest.mark.parametrize("quantized_output", [False, True])
def test_gemm(quantized_output: bool) -> None:
    rng = np.random.default_rng(0)
    for zero_point, high in ((128, 256), (0, 128)):
        x = random_tensor(rng, (16, 37, 1, 1), zero_point, high)
        limit = 64 if high == 256 else 127
        weight = rng.integers(-limit, limit + 1, (11, 37)).astype(np.int8)
        weight_scale = rng.uniform(0.001, 0.01, 11).astype(np.float32)
        bias = rng.integers(-20000, 20000, 11).astype(np.int32)
        unit = (x.scale * weight_scale).astype(np.float32)
        constants = {
            **grid("x", x.scale, zero_point), **grid("y", np.float32(0.05), 131), "w": weight,
            "w.scale": weight_scale, "w.zero": np.zeros(11, np.int8), "b": bias, "b.scale": unit,
        }  # fmt: skip
        nodes: list[Node] = [
            quantize("x", "input"),
            ("Flatten", ["x"], "flat", {}),
            dequantize("flat", "x", "flat.real"),
            ("DequantizeLinear", ["w", "w.scale", "w.zero"], "w.real", {"axis": 0}),
            ("DequantizeLinear", ["b", "b.scale"], "b.real", {"axis": 0}),
            ("Gemm", ["flat.real", "w.real", "b.real"], "sum" if quantized_output else "logits", {"transB": 1}),
            *([quantize("y", "sum"), dequantize("y", "y", "logits")] if quantized_output else []),
        ]
        model = model_of(nodes, constants, x.codes.shape)
        simulation, runtime, logits = run(model, x.real, "y" if quantized_output else "x")
        sums = x.integers[:, :, 0, 0] @ weight.astype(np.int64).T + bias
        if quantized_output:
            expected = requantize(sums, (unit / np.float32(0.05)).astype(np.float32), 131)
            assert len(np.unique(expected)) > 20
            np.testing.assert_array_equal(simulation.codes["y"] + 131, expected)
            np.testing.assert_array_equal(simulation.codes["y"] + 131, runtime)
        else:
            np.testing.assert_array_equal(simulation.logits, sums.astype(np.float32) * unit)
        np.testing.assert_array_equal(simulation.logits, logits)


@pytest.mark.parametrize("relu", [False, True])
def test_add_over_all_pairs_of_codes(relu: bool) -> None:
    """65,536 pairs for each of 12 triples of scales."""
    rng = np.random.default_rng(int(relu))
    pairs = np.stack(np.meshgrid(np.arange(256), np.arange(256), indexing="ij"))[None]
    wrong_in_float64 = 0
    for trial in range(12):
        scales = rng.uniform(0.005, 0.05, 3).astype(np.float32)
        if trial == 0:
            scales[:] = 0.5, 0.25, 0.5  # full of ties
        zeros = (int(rng.choice([0, 128])), int(rng.choice([0, 128])), 0 if relu else 128)
        a, b = (Tensor(pairs[:, i : i + 1], scales[i], zeros[i]) for i in range(2))
        constants: dict[str, Any] = {}
        for name, scale, zero in zip("aby", scales, zeros, strict=True):
            constants.update(grid(name, scale, zero))
        for i, name in enumerate("ab"):
            bounds = {"starts": [i], "ends": [i + 1], "axes": [1], "steps": [1]}
            constants.update({f"{name}.{key}": np.array(value, np.int64) for key, value in bounds.items()})
        nodes: list[Node] = []
        for name in "ab":
            bounds_of = [f"{name}.{key}" for key in ("starts", "ends", "axes", "steps")]
            nodes += [
                ("Slice", ["input", *bounds_of], f"{name}.cut", {}),
                quantize(name, f"{name}.cut"),
                dequantize(name, name, f"{name}.real"),
            ]
        nodes.append(("Add", ["a.real", "b.real"], "sum", {}))
        if relu:
            nodes.append(("Relu", ["sum"], "relu", {}))
        nodes += [quantize("y", "relu" if relu else "sum"), dequantize("y", "y", "logits")]
        model = model_of(nodes, constants, pairs.shape)
        simulation, runtime, _ = run(model, np.concatenate([a.real, b.real], axis=1), "y")
        np.testing.assert_array_equal(simulation.codes["a"], a.integers)
        np.testing.assert_array_equal(simulation.codes["b"], b.integers)
        np.testing.assert_array_equal(simulation.codes["y"] + zeros[2], runtime)
        # In float64, off by one at most and only next to a tie.
        exact = (a.integers * np.float64(scales[0]) + b.integers * np.float64(scales[1])) / np.float64(scales[2])
        expected = np.clip(np.rint(exact), 0 if relu else -zeros[2], 255 - zeros[2])
        differing = simulation.codes["y"] != expected
        wrong_in_float64 += int(differing.sum())
        assert np.abs(simulation.codes["y"] - expected).max() <= 1
        distance = np.abs(exact - np.floor(exact) - 0.5)[differing]
        assert distance.max(initial=0) <= simulation.tie_bound["y"] < 0.01
    assert wrong_in_float64 > 0  # the order of the float32 operations matters


@pytest.mark.parametrize("size", [1, 4, 7, 16])
def test_global_average_pool(size: int) -> None:
    rng = np.random.default_rng(size)
    for zero_point, high in ((128, 256), (0, 128)):
        for _ in range(5):
            x = random_tensor(rng, (8, 16, size, size), zero_point, high)
            out_scale = np.float32(x.scale * rng.uniform(0.2, 1.1))
            constants = {**grid("x", x.scale, zero_point), **grid("y", out_scale, zero_point)}
            nodes: list[Node] = [
                quantize("x", "input"),
                dequantize("x", "x", "x.real"),
                ("GlobalAveragePool", ["x.real"], "mean", {}),
                quantize("y", "mean"),
                dequantize("y", "y", "logits"),
            ]
            simulation, runtime, _ = run(model_of(nodes, constants, x.codes.shape), x.real, "y")
            sums = x.integers.sum(axis=(2, 3), keepdims=True)
            ratio = np.float32(x.scale / np.float32(out_scale * np.float32(size * size)))
            expected = requantize(sums, np.repeat(ratio, 16), zero_point)
            np.testing.assert_array_equal(simulation.codes["y"] + zero_point, expected)
            np.testing.assert_array_equal(simulation.codes["y"] + zero_point, runtime)


@pytest.mark.parametrize(
    ("kernel", "pads", "stride", "dilation", "ceil_mode"),
    [(2, 0, 2, 1, 0), (3, 1, 2, 1, 0), (3, 1, 1, 2, 0), (2, 0, 2, 1, 1), (3, 0, 2, 1, 1)],
)
def test_max_pool(kernel: int, pads: int, stride: int, dilation: int, ceil_mode: int) -> None:
    x = random_tensor(np.random.default_rng(0), (2, 3, 9, 11), 128, high=128)  # below 0.0, which is no padding then
    attributes = {
        "kernel_shape": [kernel] * 2, "pads": [pads] * 4, "strides": [stride] * 2, "dilations": [dilation] * 2,
        "ceil_mode": ceil_mode,
    }  # fmt: skip
    nodes: list[Node] = [
        quantize("x", "input"),
        ("MaxPool", ["x"], "y", attributes),
        dequantize("y", "x", "logits"),
    ]
    simulation, runtime, logits = run(model_of(nodes, grid("x", x.scale, 128), x.codes.shape), x.real, "y")

    def positions(length: int) -> list[list[int]]:
        covered = dilation * (kernel - 1) + 1
        steps = (length + 2 * pads - covered) / stride
        count = int(np.ceil(steps) if ceil_mode else steps) + 1
        starts = [i * stride - pads for i in range(count)]
        return [[s + j * dilation for j in range(kernel) if 0 <= s + j * dilation < length] for s in starts]

    expected = np.stack(
        [
            np.stack([x.codes[:, :, rows][:, :, :, columns].max(axis=(2, 3)) for columns in positions(11)], axis=-1)
            for rows in positions(9)
        ],
        axis=-2,
    )
    np.testing.assert_array_equal(runtime, expected)
    np.testing.assert_array_equal(simulation.logits, logits)
    np.testing.assert_array_equal(np.rint(simulation.logits / x.scale), expected - 128)


MOVES: list[tuple[Node, dict[str, Any], Any]] = [
    (
        ("Slice", ["x", "starts", "ends", "axes", "steps"], "y", {}),
        {"starts": [1, 0], "ends": [-1, 2**63 - 1], "axes": [2, 3], "steps": [1, 2]},
        lambda codes: codes[:, :, 1:-1, ::2],
    ),
    (
        ("Pad", ["x", "pads", "x.zero"], "y", {}),
        {"pads": [0, 1, 0, 2, 0, 3, 1, 0]},
        lambda codes: np.pad(codes, ((0, 0), (1, 3), (0, 1), (2, 0)), constant_values=128),
    ),
    (
        ("Pad", ["x", "pads"], "y", {"mode": "reflect"}),
        {"pads": [0, 0, 1, 2, 0, 0, 1, 0]},
        lambda codes: np.pad(codes, ((0, 0), (0, 0), (1, 1), (2, 0)), "reflect"),
    ),
    (
        ("Pad", ["x", "pads"], "y", {"mode": "edge"}),
        {"pads": [0, 0, 1, 2, 0, 0, 1, 0]},
        lambda codes: np.pad(codes, ((0, 0), (0, 0), (1, 1), (2, 0)), "edge"),
    ),
    (("Flatten", ["x"], "y", {}), {}, lambda codes: codes.reshape(2, -1)),
    (("Reshape", ["x", "shape"], "y", {}), {"shape": [0, 4, 6, -1]}, lambda codes: codes.reshape(2, 4, 6, -1)),
    (("Transpose", ["x"], "y", {"perm": [0, 2, 3, 1]}), {}, lambda codes: codes.transpose(0, 2, 3, 1)),
    (("Unsqueeze", ["x", "axes"], "y", {}), {"axes": [1]}, lambda codes: codes[:, None]),
]


@pytest.mark.parametrize(("node", "arguments", "expected"), MOVES, ids=[f"{m[0][0]}{i}" for i, m in enumerate(MOVES)])
def test_values_that_only_move(node: Node, arguments: dict[str, list[int]], expected: Any) -> None:
    x = random_tensor(np.random.default_rng(0), (2, 8, 6, 7), 128)
    nodes = [quantize("x", "input"), node, dequantize("y", "x", "logits")]
    constants = {**grid("x", x.scale, 128), **{name: np.array(v, np.int64) for name, v in arguments.items()}}
    simulation, runtime, logits = run(model_of(nodes, constants, x.codes.shape), x.real, "y")
    np.testing.assert_array_equal(runtime, expected(x.codes))
    np.testing.assert_array_equal(simulation.logits, logits)
    np.testing.assert_array_equal(np.rint(simulation.logits / x.scale), expected(x.codes) - 128)


def test_squeeze() -> None:
    x = random_tensor(np.random.default_rng(0), (2, 8, 1, 1), 128)
    nodes: list[Node] = [
        quantize("x", "input"),
        ("Squeeze", ["x", "axes"], "y", {}),
        dequantize("y", "x", "logits"),
    ]
    model = model_of(nodes, {**grid("x", x.scale, 128), "axes": np.array([2, 3])}, x.codes.shape)
    np.testing.assert_array_equal(simulate(model, x.real).logits, x.real[:, :, 0, 0])


def test_an_integer_clip_bounds_codes() -> None:
    x = random_tensor(np.random.default_rng(0), (1, 1, 16, 16), 7)
    nodes: list[Node] = [
        quantize("x", "input"),
        ("Clip", ["x", "low", "high"], "y", {}),
        dequantize("y", "x", "logits"),
    ]
    constants = {**grid("x", x.scale, 7), "low": np.uint8(5), "high": np.uint8(90)}
    simulation, runtime, logits = run(model_of(nodes, constants, x.codes.shape), x.real, "y")
    np.testing.assert_array_equal(simulation.codes["y"] + 7, np.clip(x.codes, 5, 90))
    np.testing.assert_array_equal(simulation.codes["y"] + 7, runtime)
    np.testing.assert_array_equal(simulation.logits, logits)


def chain(weights: Sequence[npt.NDArray[np.int8]]) -> onnx.ModelProto:
    """1x1 convolutions in a row, each behind a quantizer: codes "0", "1", ... and the last one float."""
    constants: dict[str, Any] = {}
    nodes: list[Node] = []
    source = "input"
    for i, weight in enumerate(weights):
        constants.update(grid(str(i), np.float32(0.05), 128))
        constants.update({f"w{i}": weight, f"w{i}.scale": np.full(4, 0.02, np.float32)})
        constants[f"w{i}.zero"] = np.zeros(4, np.int8)
        result = "logits" if i == len(weights) - 1 else f"sum{i}"
        nodes += [
            quantize(str(i), source),
            dequantize(str(i), str(i), f"{i}.real"),
            ("DequantizeLinear", [f"w{i}", f"w{i}.scale", f"w{i}.zero"], f"w{i}.real", {"axis": 0}),
            ("Conv", [f"{i}.real", f"w{i}.real"], result, {"kernel_shape": [1, 1]}),
        ]
        source = result
    return model_of(nodes, constants, (2, 4, 5, 5))


def test_forced_codes_keep_a_difference_where_it_arises() -> None:
    rng = np.random.default_rng(0)
    weights = [rng.integers(-64, 65, (4, 4, 1, 1)).astype(np.int8) for _ in range(4)]
    broken = [w.copy() for w in weights]
    broken[1][0, 0] += 20
    images = rng.normal(0, 3, (2, 4, 5, 5)).astype(np.float32)
    good, free = simulate(chain(weights), images), simulate(chain(broken), images)
    forced = simulate(chain(broken), images, good.codes)

    def differing(other: Simulation) -> list[bool]:
        return [bool((other.codes[name] != good.codes[name]).any()) for name in "0123"]

    assert differing(free) == [False, False, True, True]
    assert differing(forced) == [False, False, True, False]
    np.testing.assert_array_equal(forced.logits, good.logits)
    # And at the place itself, what was computed is shown, not what was forced.
    np.testing.assert_array_equal(forced.codes["2"], free.codes["2"])


def refused(nodes: Sequence[Node], constants: dict[str, Any] | None = None) -> str:
    model = model_of(nodes, {**grid("x", np.float32(0.1), 128), **(constants or {})}, (1, 2, 4, 4))
    with pytest.raises(NotSimulated) as caught:
        simulate(model, np.zeros((1, 2, 4, 4), np.float32))
    return str(caught.value)


def test_what_is_not_simulated_is_named() -> None:
    coded = [quantize("x", "input"), dequantize("x", "x", "x.real")]
    weight = {"w": np.ones((2, 2, 1, 1), np.int8), "w.scale": np.ones(2, np.float32), "w.zero": np.zeros(2, np.int8)}
    read: Node = ("DequantizeLinear", ["w", "w.scale", "w.zero"], "w.real", {"axis": 0})
    assert refused([("Softplus", ["input"], "logits", {})]) == "logits/Softplus: the simulator does not know Softplus"
    message = refused([*coded, ("Add", ["x.real", "none"], "logits", {})])
    assert message.startswith("logits/Add: the simulator does not know Add with 'none'")
    for attributes in ({"dilations": [2, 2]}, {"pads": [0, 0, 1, 1]}, {"auto_pad": "SAME_UPPER"}):
        pool: Node = ("AveragePool", ["x.real"], "logits", {"kernel_shape": [2, 2], **attributes})
        assert refused([*coded, pool]).startswith("logits/AveragePool: the simulator ")
    flat: list[Node] = [*coded, ("Flatten", ["x.real"], "flat", {}), read]
    gemm = {**weight, "w": np.ones((32, 2), np.int8)}
    assert refused([*flat, ("Gemm", ["flat", "w.real"], "logits", {})], gemm).startswith("logits/Gemm: ")
    assert refused([dequantize("input", "x", "logits")]).startswith("logits/DequantizeLinear: ")


@pytest.mark.parametrize(
    ("pads", "value", "attributes"), [([1] * 8, 1.0, {}), ([-1] * 8, 0.0, {}), ([1] * 8, 0.0, {"mode": "wrap"})]
)
def test_pads_that_are_not_simulated(pads: list[int], value: float, attributes: dict[str, str]) -> None:
    constants = {"pads": np.array(pads), "value": np.float32(value)}
    pad: Node = ("Pad", ["x.real", "pads", "value"], "logits", attributes)
    assert refused([quantize("x", "input"), dequantize("x", "x", "x.real"), pad], constants).startswith("logits/Pad: ")


def test_the_bound_of_ties_holds_for_float32_and_is_narrow() -> None:
    """Two sums in float32, in two orders, against the exact one; the order is what runtimes differ in."""
    rng = np.random.default_rng(0)
    x = random_tensor(rng, (4, 64, 6, 6), 128)
    weight = rng.integers(-64, 65, (8, 64, 3, 3)).astype(np.int8)
    scale = rng.uniform(0.001, 0.01, 8).astype(np.float32)
    constants = {**grid("x", x.scale, 128), **grid("y", np.float32(0.3), 128), "w": weight, "w.scale": scale}
    nodes: list[Node] = [
        quantize("x", "input"),
        dequantize("x", "x", "x.real"),
        ("DequantizeLinear", ["w", "w.scale"], "w.real", {"axis": 0}),
        ("Conv", ["x.real", "w.real"], "sum", {"kernel_shape": [3, 3]}),
        quantize("y", "sum"),
        dequantize("y", "y", "logits"),
    ]
    simulation = simulate(model_of(nodes, constants, x.codes.shape), x.real)
    real_weight = weight.astype(np.float32) * scale.reshape(-1, 1, 1, 1)
    products = np.empty((4, 8, 4, 4, 576), np.float32)
    for r, c in product(range(4), range(4)):
        patch = x.real[:, :, r : r + 3, c : c + 3].reshape(4, 1, -1)
        products[:, :, r, c] = patch * real_weight.reshape(1, 8, -1)
    for ordered in (products, np.sort(products)):
        total = np.add.accumulate(ordered, axis=-1, dtype=np.float32)[..., -1]
        error = np.abs(total.astype(np.float64) / 0.3 - simulation.before_rounding["y"]).max()
        assert 0 < error <= simulation.tie_bound["y"] < 0.02


FLOAT_OPERATIONS: dict[str, tuple[Node, dict[str, Any]]] = {
    "layer norm": (
        ("LayerNormalization", ["x.real", "g", "b"], "logits", {"axis": -1, "epsilon": 1e-5}),
        {"g": np.linspace(0.5, 2, 7).astype(np.float32), "b": np.linspace(-1, 1, 7).astype(np.float32)},
    ),
    "softmax": (("Softmax", ["x.real"], "logits", {"axis": -1}), {}),
    "product": (("MatMul", ["x.real", "w"], "logits", {}), {"w": np.ones((7, 3), np.float32) / 3}),
    "gather": (("Gather", ["x.real", "i"], "logits", {"axis": 1}), {"i": np.array(2, np.int64)}),
}


@pytest.mark.parametrize("case", list(FLOAT_OPERATIONS))
def test_float_operations_of_transformers_lie_within_their_bound(case: str) -> None:
    operation, constants = FLOAT_OPERATIONS[case]
    rng = np.random.default_rng(1)
    x = random_tensor(rng, (4, 5, 6, 7), 128)
    nodes = [quantize("x", "input"), dequantize("x", "x", "x.real"), operation]
    model = model_of(nodes, {**grid("x", x.scale, 128), **constants}, x.codes.shape)
    simulation = simulate(model, x.real)
    (expected,) = session(model, "ORT_DISABLE_ALL").run(None, {"input": x.real})
    assert simulation.logits_bound is not None or case == "gather"
    bound = 1e-7 if simulation.logits_bound is None else simulation.logits_bound
    assert (np.abs(simulation.logits - expected) <= bound + 1e-7 * np.abs(expected)).all()
    assert np.max(bound) < 1e-3 * np.abs(expected).max()


def test_a_constant_that_float16_rounds_is_part_of_the_bound() -> None:
    rng = np.random.default_rng(2)
    x, weight = random_tensor(rng, (2, 5, 6, 7), 128), rng.normal(size=(7, 3)).astype(np.float32)
    nodes: list[Node] = [
        quantize("x", "input"), dequantize("x", "x", "x.real"), ("MatMul", ["x.real", "w"], "logits", {}),
    ]  # fmt: skip

    def of(stored: Array, error: dict[str, Array]) -> Simulation:
        model = model_of(nodes, {**grid("x", x.scale, 128), "w": stored}, x.codes.shape)
        return simulate(model, x.real, stored_error=error)

    half = weight.astype(np.float16).astype(np.float32)
    exact, rounded, bounded = of(weight, {}), of(half, {}), of(half, {"w": np.abs(half - weight).astype(np.float64)})
    moved = np.abs(exact.logits - rounded.logits)
    assert rounded.logits_bound is not None and bounded.logits_bound is not None
    assert (moved > rounded.logits_bound).mean() > 0.5
    assert (moved <= bounded.logits_bound).all()
