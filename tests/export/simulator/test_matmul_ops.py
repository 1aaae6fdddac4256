"""Convolutions and matrix products of codes against slow integer arithmetic and ONNX Runtime: no code differs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest

from crqat.export.simulator.run import simulate
from tests.export.simulator.one_operation import (
    Array,
    Node,
    Tensor,
    dequantize,
    grid,
    model_of,
    quantize,
    random_tensor,
    requantize,
    run,
)


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


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions_of_any_rank_pad_by_themselves(rank: int, auto_pad: str) -> None:
    rng = np.random.default_rng(rank)
    x = random_tensor(rng, (2, 4, 9, 8, 7)[: 2 + rank], 120)
    weight = rng.integers(-60, 61, (6, 2, 4, 2, 3)[: 2 + rank]).astype(np.int8)
    constants = {
        **grid("x", x.scale, 120), **grid("y", np.float32(0.02 * 2**rank), 119), "w": weight,
        "w.scale": rng.uniform(0.001, 0.01, 6).astype(np.float32), "w.zero": np.zeros(6, np.int8),
    }  # fmt: skip
    attributes = {"auto_pad": auto_pad, "strides": [2, 1, 3][:rank], "group": 2}
    nodes: list[Node] = [
        quantize("x", "input"),
        dequantize("x", "x", "x.real"),
        ("DequantizeLinear", ["w", "w.scale", "w.zero"], "w.real", {"axis": 0}),
        ("Conv", ["x.real", "w.real"], "sum", attributes),
        quantize("y", "sum"),
        dequantize("y", "y", "logits"),
    ]
    simulation, runtime, _ = run(model_of(nodes, constants, x.codes.shape), x.real, "y")
    assert len(np.unique(runtime)) > 20
    np.testing.assert_array_equal(simulation.codes["y"] + 119, runtime)
