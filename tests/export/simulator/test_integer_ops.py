"""Operations on codes against integer arithmetic in NumPy and ONNX Runtime: no code differs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from crqat.export.simulator import integer_ops
from crqat.export.simulator.run import simulate
from crqat.export.simulator.values import Float, Simulation
from tests.export.conftest import session
from tests.export.simulator.one_operation import (
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


def test_a_product_of_codes_is_rounded_with_the_zero_point_added() -> None:
    """Scales and codes of a squeeze-and-excitation, whose product lies 4.8e-6 of a code beside a tie."""
    scales, zero_points = (0.03390503, 0.0050582886, 0.016326904), (128, 0, 128)
    constants = {
        f"{kind}{index}": np.asarray(value, kind_of)
        for kind, values, kind_of in (("s", scales, np.float32), ("z", zero_points, np.uint8))
        for index, value in enumerate(values)
    }
    node = onnx.helper.make_node(
        "QLinearMul", ["a", "s0", "z0", "b", "s1", "z1", "s2", "z2"], ["y"], domain="com.microsoft"
    )
    shapes = {"a": [1, 1, 4, 4], "b": [1, 1, 1, 1], "y": [1, 1, 4, 4]}
    uint8 = onnx.TensorProto.UINT8
    infos = {name: onnx.helper.make_tensor_value_info(name, uint8, size) for name, size in shapes.items()}
    graph = onnx.helper.make_graph(
        [node], "product", [infos["a"], infos["b"]], [infos["y"]],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    feed = {"a": np.full(shapes["a"], 130, np.uint8), "b": np.full(shapes["b"], 119, np.uint8)}
    (theirs,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)
    exact = 2 * 119 * float(np.float32(scales[0])) * float(np.float32(scales[1])) / float(np.float32(scales[2]))
    assert exact > 2.5
    out = Simulation()
    value = Float(np.asarray([exact * float(np.float32(scales[2]))]), np.zeros(1), product=True)
    quantizer = onnx.helper.make_node("QuantizeLinear", ["x", "s2", "z2"], ["codes"])
    integer_ops.quantize(quantizer, {"x": value}, constants, None, out)
    distance = np.abs((theirs.astype(np.int64) - 128) - exact) - 0.5
    assert (distance <= out.bounds["codes"]).all()
    assert (out.bounds["codes"] < 2e-5).all()
    out.bounds.clear()
    integer_ops.quantize(quantizer, {"x": replace(value, product=False)}, constants, None, out)
    assert (theirs == 130).all() and (distance > out.bounds["codes"]).all()
