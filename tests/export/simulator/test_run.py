"""The simulator's loop: codes that are forced, and files that it does not know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from crqat.export.simulator.run import simulate
from crqat.export.simulator.values import Simulation
from tests.export.simulator.one_operation import Node, dequantize, grid, model_of, quantize, refused


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


def test_what_is_not_simulated_is_named() -> None:
    coded = [quantize("x", "input"), dequantize("x", "x", "x.real")]
    weight = {"w": np.ones((2, 2, 1, 1), np.int8), "w.scale": np.ones(2, np.float32), "w.zero": np.zeros(2, np.int8)}
    read: Node = ("DequantizeLinear", ["w", "w.scale", "w.zero"], "w.real", {"axis": 0})
    assert refused([("Det", ["input"], "logits", {})]) == "logits/Det: the simulator does not support Det"
    message = refused([*coded, ("Add", ["x.real", "none"], "logits", {})])
    assert message.startswith("logits/Add: the simulator does not know 'none', an input or attribute that Add needs")
    flat: list[Node] = [*coded, ("Flatten", ["x.real"], "flat", {}), read]
    gemm = {**weight, "w": np.ones((32, 2), np.int8)}
    assert refused([*flat, ("Gemm", ["flat", "w.real"], "logits", {})], gemm).startswith("logits/Gemm: ")
    assert refused([dequantize("input", "x", "logits")]).startswith("logits/DequantizeLinear: ")
