"""The table of float operations against ONNX Runtime: within the bound, and a file that is wrong by little is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import pytest

from crqat.core.grid import Grid
from crqat.core.results.verification import Check
from crqat.export.qdq.lower import lower_activation
from crqat.export.qdq.write import QDQModel
from crqat.export.simulator.float_ops import FLOAT_OPERATIONS
from crqat.export.simulator.run import simulate
from crqat.export.simulator.values import Simulation
from crqat.export.verification.checks import _against_runtime, _observe
from tests.export.conftest import edited, initializer, session
from tests.export.simulator.one_operation import Array, Node, dequantize, grid, model_of, quantize, random_tensor

SHAPE = (3, 4, 5, 6)
RNG = np.random.default_rng(0)
PER_CHANNEL = {
    "gamma": RNG.uniform(0.5, 2, 4).astype(np.float32),
    "beta": RNG.normal(size=4).astype(np.float32),
    "mean": RNG.normal(size=4).astype(np.float32),
    "variance": RNG.uniform(0.5, 2, 4).astype(np.float32),
}


@dataclass
class Case:
    """An operation of the tensors "a" and "b", both dequantized, and of constants.

    Attributes:
        inputs: Names.
        attributes: Of the node.
        constants: By name.
        zero: Zero point of both tensors: 0 for what takes no negative values.
        opset: From which the operation exists.
        cast: Whether the result is a truth value.
        truth: Whether the inputs are: a > -0.31 and b > -0.31 then.
        blind: What the result does not depend on, if the codes stay the same: "scale", "zero", "swap".
    """

    inputs: Sequence[str] = ("a",)
    attributes: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    zero: int = 117
    opset: int = 17
    cast: bool = False
    truth: bool = False
    blind: Sequence[str] = ()


BOTH = ("a", "b")
STEPS = ("scale", "zero", "swap")
AXES = {"axes": [2, 3]}
CASES: dict[str, Case] = {
    **{name: Case() for name in ("Neg", "Abs", "Exp", "Sigmoid", "Tanh", "Erf", "Softplus", "Softsign", "HardSigmoid",
                                 "HardSwish", "Relu", "Floor", "Ceil", "Round", "GlobalAveragePool", "GlobalMaxPool")},
    "Sign": Case(blind=STEPS),
    "Mish": Case(opset=18),
    "Gelu": Case(opset=20),
    "Sqrt": Case(zero=0),
    "Log": Case(zero=0),
    "Reciprocal": Case(),
    "Pow": Case(("a", "exponent"), constants={"exponent": np.float32(2.5)}, zero=0),
    "Elu": Case(attributes={"alpha": 0.7}),
    "Selu": Case(),
    "Celu": Case(attributes={"alpha": 0.7}),
    "LeakyRelu": Case(attributes={"alpha": 0.1}),
    "ThresholdedRelu": Case(attributes={"alpha": 0.5}),
    "PRelu": Case(("a", "slope"), constants={"slope": RNG.uniform(0.1, 0.5, (4, 1, 1)).astype(np.float32)}),
    "Clip": Case(("a", "low", "high"), constants={"low": np.float32(-2.1), "high": np.float32(2.3)}),
    **{name: Case(BOTH) for name in ("Max", "Min", "Add", "Sub", "Div")},
    "Mul": Case(BOTH, blind=["swap"]),
    **{name: Case(BOTH, cast=True, blind=STEPS) for name in ("Greater", "GreaterOrEqual", "Less", "LessOrEqual",
                                                            "Equal")},
    **{name: Case(BOTH, truth=True, cast=True, blind=STEPS) for name in ("And", "Or")},
    "Not": Case(truth=True, cast=True, blind=STEPS),
    "Where": Case(("condition", "a", "b"), constants={"condition": RNG.uniform(size=SHAPE) > 0.5}),
    **{name: Case(attributes=AXES) for name in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2",
                                                "ReduceSumSquare", "ReduceProd", "ReduceLogSumExp")},
    "CumSum": Case(("a", "axis"), constants={"axis": np.array(1)}),
    "ReduceSum": Case(("a", "axes"), constants={"axes": np.array([1, -1])}),
    "AveragePool": Case(attributes={"kernel_shape": [2, 2]}),
    "LpNormalization": Case(attributes={"axis": 1, "p": 2}, blind=["scale", "swap"]),
    "Softmax": Case(attributes={"axis": 1}, blind=["zero"]),
    "LogSoftmax": Case(attributes={"axis": 1}, blind=["zero"]),
    "LayerNormalization": Case(
        ("a", "gamma6", "beta6"), {"axis": -1},
        {"gamma6": np.linspace(0.5, 2, 6).astype(np.float32), "beta6": np.linspace(-1, 1, 6).astype(np.float32)},
        blind=STEPS,
    ),
    "InstanceNormalization": Case(("a", "gamma", "beta"), {}, PER_CHANNEL, blind=STEPS),
    "BatchNormalization": Case(("a", "gamma", "beta", "mean", "variance"), {}, PER_CHANNEL),
    "Einsum": Case(BOTH, {"equation": "nchw,nkhw->nck"}, blind=["swap"]),
}  # fmt: skip


def build(name: str) -> tuple[onnx.ModelProto, Array]:
    """A file of the operation between quantizers, and images of codes."""
    case, rng = CASES[name], np.random.default_rng(1)
    x = random_tensor(rng, SHAPE, case.zero)
    x.scale = np.float32(0.0217)
    if name == "Div":  # 0 / 0 is no number
        x.codes = np.where(x.codes == case.zero, case.zero + 1, x.codes)
    inputs = [{"a": "a.real", "b": "b.real"}.get(name, name) for name in case.inputs]
    nodes: list[Node] = [
        quantize("a", "input"), dequantize("a", "a", "a.real"),
        ("Mul", ["input", "factor"], "scaled", {}),
        quantize("b", "scaled"), dequantize("b", "b", "b.real"),
    ]  # fmt: skip
    if case.truth:
        nodes += [("Greater", [name, "none"], f"{name}.truth", {}) for name in inputs]
        inputs = [f"{name}.truth" for name in inputs]
    nodes.append((name, inputs, "result", case.attributes))
    if case.cast:
        nodes.append(("Cast", ["result"], "real", {"to": onnx.TensorProto.FLOAT}))
    constants = {
        **grid("a", x.scale, case.zero), **grid("b", np.float32(0.0119), case.zero), "factor": np.float32(-0.61),
        "none": np.float32(-0.31), **case.constants,
    }  # fmt: skip
    if case.zero == 0:
        constants["factor"] = np.float32(0.61)
    model = model_of([*nodes[:-1], (*nodes[-1][:2], "logits", nodes[-1][3])], constants, SHAPE)
    model.opset_import[0].version = case.opset
    model.ir_version = 9
    return model, x.real


def file_of(model: onnx.ModelProto) -> tuple[QDQModel, dict[str, Grid]]:
    """The file with the Grids that it has, as those that were trained."""
    grids = {}
    for name in BOTH:
        zero = int(initializer(model, f"{name}.zero"))
        scale = initializer(model, f"{name}.scale").reshape(1)
        grids[name] = Grid(scale, 0, -zero, 255 - zero)
    activations = {name: lower_activation(own, "onnxruntime") for name, own in grids.items()}
    return QDQModel(model, activations, {}, {name: [name] for name in BOTH}), grids


def violations(model: onnx.ModelProto, trained: onnx.ModelProto, images: Array) -> Check:
    """The check to the runtime of a file that should have another one's scales."""
    file, grids = file_of(trained)
    changed = replace(file, model=model)
    return _against_runtime(_observe(changed), changed, grids, simulate(model, images), images)


def with_scales(model: onnx.ModelProto, change: str, tensor: str) -> onnx.ModelProto:
    """A copy that is wrong by little."""
    scale, zero = initializer(model, f"{tensor}.scale"), initializer(model, f"{tensor}.zero")
    if change == "scale":
        return edited(model, f"{tensor}.scale", scale * np.float32(1.01))
    if change == "zero":
        return edited(model, f"{tensor}.zero", zero + np.uint8(1))
    return edited(edited(model, "a.scale", initializer(model, "b.scale")), "b.scale", initializer(model, "a.scale"))


def dequantized_with(model: onnx.ModelProto, change: str, tensor: str) -> onnx.ModelProto:
    """The same in front of the operation alone: the codes stay those of the trained Grids."""
    wrong = with_scales(model, change, tensor)
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    for name in BOTH:
        for kind in ("scale", "zero"):
            copied.graph.initializer.append(
                onnx.numpy_helper.from_array(initializer(wrong, f"{name}.{kind}"), f"{name}.wrong.{kind}")
            )
        (index, node) = next((i, n) for i, n in enumerate(copied.graph.node) if n.output[0] == f"{name}.real")
        own = onnx.helper.make_node(
            "DequantizeLinear", [name, f"{name}.wrong.scale", f"{name}.wrong.zero"], [f"{name}.wrong"], f"{name}.wrong"
        )
        copied.graph.node.insert(index + 1, own)
        for reader in list(copied.graph.node)[index + 2 :]:
            for i, read in enumerate(reader.input):
                reader.input[i] = f"{name}.wrong" if read == f"{name}.real" else read
        assert node.op_type == "DequantizeLinear"
    return copied


def test_every_operation_of_the_table_has_a_case() -> None:
    assert CASES.keys() == FLOAT_OPERATIONS.keys()


@pytest.mark.parametrize("name", CASES)
def test_the_runtime_lies_within_the_bound_which_is_narrow(name: str) -> None:
    model, images = build(name)
    check = violations(model, model, images)
    assert (check.violations, check.differing_logits) == (0, 0)
    simulation = simulate(model, images)
    if simulation.logits_bound is None:
        return
    finite = np.isfinite(simulation.logits) & np.isfinite(simulation.logits_bound)
    assert finite.mean() > 0.9  # next to a pole there is no bound
    # 1 % of one of 128 steps.
    narrow = float(np.median(simulation.logits_bound[finite]))
    assert narrow < 1e-2 / 128 * float(np.abs(simulation.logits[finite]).max())


@pytest.mark.parametrize("change", ["scale", "zero", "swap"])
@pytest.mark.parametrize("name", CASES)
def test_a_scale_that_is_wrong_by_little_is_found(name: str, change: str) -> None:
    model, images = build(name)
    for tensor in BOTH if change == "swap" else [tensor for tensor in BOTH if tensor in CASES[name].inputs]:
        # By the codes of these tensors, whatever the operation does to the values.
        assert violations(with_scales(model, change, tensor), model, images).violations > 0
        # By the result alone, where it depends on that at all.
        if change not in CASES[name].blind:
            assert violations(dequantized_with(model, change, tensor), model, images).differing_logits


TRANSFORMERS: dict[str, tuple[Node, dict[str, Any]]] = {
    "layer norm": (
        ("LayerNormalization", ["x.real", "g", "b"], "logits", {"axis": -1, "epsilon": 1e-5}),
        {"g": np.linspace(0.5, 2, 7).astype(np.float32), "b": np.linspace(-1, 1, 7).astype(np.float32)},
    ),
    "softmax": (("Softmax", ["x.real"], "logits", {"axis": -1}), {}),
    "product": (("MatMul", ["x.real", "w"], "logits", {}), {"w": np.ones((7, 3), np.float32) / 3}),
    "gather": (("Gather", ["x.real", "i"], "logits", {"axis": 1}), {"i": np.array(2, np.int64)}),
}


@pytest.mark.parametrize("case", list(TRANSFORMERS))
def test_float_operations_of_transformers_lie_within_their_bound(case: str) -> None:
    operation, constants = TRANSFORMERS[case]
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
