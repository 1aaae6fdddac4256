"""What only moves or selects codes against NumPy and ONNX Runtime: no code differs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from crqat.export.simulator.run import simulate
from tests.export.simulator.one_operation import Node, dequantize, grid, model_of, quantize, random_tensor, refused, run


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


CODES_OF_ONE_GRID: list[tuple[Node, dict[str, Any], Any]] = [
    (
        ("DepthToSpace", ["x.real"], "out", {"blocksize": 2, "mode": "CRD"}),
        {},
        lambda codes: codes.reshape(2, 2, 2, 2, 6, 4).transpose(0, 1, 4, 2, 5, 3).reshape(2, 2, 12, 8),
    ),
    (
        ("DepthToSpace", ["x.real"], "out", {"blocksize": 2}),
        {},
        lambda codes: codes.reshape(2, 2, 2, 2, 6, 4).transpose(0, 3, 4, 1, 5, 2).reshape(2, 2, 12, 8),
    ),
    (
        ("SpaceToDepth", ["x.real"], "out", {"blocksize": 2}),
        {},
        lambda codes: codes.reshape(2, 8, 3, 2, 2, 2).transpose(0, 3, 5, 1, 2, 4).reshape(2, 32, 3, 2),
    ),
    (("Tile", ["x.real", "times"], "out", {}), {"times": [1, 2, 1, 1]}, lambda codes: np.tile(codes, (1, 2, 1, 1))),
    (("Expand", ["x.real", "size"], "out", {}), {"size": [3, 1, 1, 1, 1]}, lambda codes: np.stack([codes] * 3)),
    (
        ("Resize", ["x.real", "", "scales"], "out",
         {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
        {"scales": np.array([1, 1, 2, 2], np.float32)},
        lambda codes: codes.repeat(2, 2).repeat(2, 3),
    ),
    (("Max", ["x.real", "flipped.real"], "out", {}), {}, lambda codes: np.maximum(codes, codes[:, :, :, ::-1])),
    (("Min", ["x.real", "flipped.real"], "out", {}), {}, lambda codes: np.minimum(codes, codes[:, :, :, ::-1])),
    (("ReduceMax", ["x.real"], "out", {"axes": [1]}), {}, lambda codes: codes.max(axis=1, keepdims=True)),
    (("GlobalMaxPool", ["x.real"], "out", {}), {}, lambda codes: codes.max(axis=(2, 3), keepdims=True)),
    (("Split", ["x.real", "sizes"], "out", {"axis": 1}), {"sizes": [3, 5]}, lambda codes: codes[:, :3]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("node", "arguments", "expected"), CODES_OF_ONE_GRID, ids=[f"{m[0][0]}{i}" for i, m in enumerate(CODES_OF_ONE_GRID)]
)
def test_what_moves_or_selects_real_values_of_one_grid_is_exact_in_codes(
    node: Node, arguments: dict[str, Any], expected: Any
) -> None:
    x = random_tensor(np.random.default_rng(0), (2, 8, 6, 4), 119)
    nodes: list[Node] = [
        quantize("x", "input"),
        dequantize("x", "x", "x.real"),
        ("Slice", ["x", "start", "end", "axis", "step"], "flipped", {}),
        dequantize("flipped", "x", "flipped.real"),
        node,
        quantize("y", "out", "x"),
        dequantize("y", "x", "logits"),
    ]
    turn = {"start": [-1], "end": [-99], "axis": [3], "step": [-1]}
    constants = {**grid("x", x.scale, 119), **{name: np.asarray(v) for name, v in {**turn, **arguments}.items()}}
    model = model_of(nodes, constants, x.codes.shape)
    if node[0] == "Split":
        next(n for n in model.graph.node if n.op_type == "Split").output.append("rest")
    simulation, runtime, _ = run(model, x.real, "y")
    assert "y" not in simulation.inexact
    np.testing.assert_array_equal(simulation.codes["y"] + 119, expected(x.codes))
    np.testing.assert_array_equal(runtime, expected(x.codes))


@pytest.mark.parametrize("mode", ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"])
@pytest.mark.parametrize("kind", ["linear", "cubic"])
def test_interpolation_lies_within_a_narrow_bound(mode: str, kind: str) -> None:
    x = random_tensor(np.random.default_rng(0), (2, 3, 5, 7), 119)
    resize: Node = (
        "Resize", ["x.real", "", "", "sizes"], "logits", {"mode": kind, "coordinate_transformation_mode": mode},
    )  # fmt: skip
    constants = {**grid("x", x.scale, 119), "sizes": np.array([2, 3, 11, 9])}
    model = model_of([quantize("x", "input"), dequantize("x", "x", "x.real"), resize], constants, x.codes.shape)
    simulation, _, logits = run(model, x.real, "x")
    assert simulation.logits_bound is not None
    assert (np.abs(logits - simulation.logits) <= simulation.logits_bound).all()
    assert float(simulation.logits_bound.max()) < 1e-4 * float(np.abs(logits).max())


def test_a_pad_with_a_value() -> None:
    x = random_tensor(np.random.default_rng(0), (2, 3, 5, 7), 119)
    constants = {**grid("x", x.scale, 119), "pads": np.array([0, 0, 1, 2, 0, 0, 2, 1]), "value": np.float32(-1.5)}
    pad: Node = ("Pad", ["x.real", "pads", "value"], "logits", {})
    model = model_of([quantize("x", "input"), dequantize("x", "x", "x.real"), pad], constants, x.codes.shape)
    simulation, _, logits = run(model, x.real, "x")
    assert simulation.logits_bound is not None
    assert (np.abs(logits - simulation.logits) <= simulation.logits_bound).all()
    assert (logits[:, :, 0] == -1.5).all()


def test_squeeze() -> None:
    x = random_tensor(np.random.default_rng(0), (2, 8, 1, 1), 128)
    nodes: list[Node] = [
        quantize("x", "input"),
        ("Squeeze", ["x", "axes"], "y", {}),
        dequantize("y", "x", "logits"),
    ]
    model = model_of(nodes, {**grid("x", x.scale, 128), "axes": np.array([2, 3])}, x.codes.shape)
    np.testing.assert_array_equal(simulate(model, x.real).logits, x.real[:, :, 0, 0])


@pytest.mark.parametrize(("pads", "value", "attributes"), [([-1] * 8, 0.0, {}), ([1] * 8, 0.0, {"mode": "wrap"})])
def test_pads_that_are_not_simulated(pads: list[int], value: float, attributes: dict[str, str]) -> None:
    constants = {"pads": np.array(pads), "value": np.float32(value)}
    pad: Node = ("Pad", ["x.real", "pads", "value"], "logits", attributes)
    assert refused([quantize("x", "input"), dequantize("x", "x", "x.real"), pad], constants).startswith("logits/Pad: ")
