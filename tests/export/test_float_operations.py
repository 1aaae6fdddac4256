"""Operations on real values against ONNX Runtime: within the bound, and the bound is narrow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from export.simulate import simulate
from export.simulated import Simulation
from tests.export.conftest import session
from tests.export.one_operation import Array, Node, dequantize, grid, model_of, quantize, random_tensor

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
