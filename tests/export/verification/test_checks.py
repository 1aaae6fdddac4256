"""Verification passes on trained networks, and each of its checks fails when what it verifies is broken."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from crqat.core.results.verification import FloatNode
from crqat.core.typed_json import to_json
from crqat.export.qdq.write import QDQModel
from crqat.export.simulator.run import simulate
from crqat.export.to_onnx import quantize_network
from crqat.export.verification import checks as verification
from crqat.export.verification import fusion as fusions
from crqat.export.verification.checks import REFUSED, verify
from crqat.export.verification.fusion import fusion, optimized_operations
from crqat.train.data import sources
from crqat.train.quantizers import quantizer_of
from crqat.train.quantizers.calibration import weight_of
from tests.export.conftest import (
    Quantized,
    edited_file,
    initializer,
    nodes,
    quantize,
    random_images,
    session,
    with_ties,
)
from tests.export.simulator import one_operation
from tests.export.simulator.one_operation import Node

Digits = Callable[[int], Quantized]
# An inner convolution, its input and its output.
WEIGHT = "pre_hooks.layer2/1/conv1/conv2d/0__1.0"
BEHIND = "post_hooks.layer2/1/relu1/relu/0__0.0"


def proof_of(quantized: Quantized, files: dict[str, QDQModel]) -> dict[str, dict[str, Any]]:
    """As the manifest has it."""
    found: dict[str, dict[str, Any]] = to_json(verify(quantized.model, quantized.grids, files, quantized.images))
    return found


def broken_checks(entry: dict[str, Any]) -> set[str]:
    """Names of the checks that failed; the status names the same ones."""
    broken = {name for name, check in entry["links"].items() if isinstance(check, dict) and check["violations"]}
    status = entry["status"]
    assert (status == "passed") == (not broken)
    assert not broken or {part.split(":")[0] for part in status.removeprefix("failed: ").split("; ")} == broken
    return broken


def assert_proven(quantized: Quantized, files: dict[str, QDQModel]) -> None:
    proof = proof_of(quantized, files)
    assert proof.keys() == files.keys()
    simulation = simulate(files["onnxruntime"].model, quantized.images)
    codes = sum(simulation.codes[name].size for names in files["onnxruntime"].codes.values() for name in names)
    for target, entry in proof.items():
        assert entry["status"] == "passed"
        assert (entry["images"], entry["codes"], entry["differing_codes"]) == (len(quantized.images), codes, 0)
        assert entry["links"]["torch"]["codes"] == codes
        # Codes differ only where the value before rounding is nearly a tie, and nearly none does.
        for check in (entry["links"]["torch"], entry["links"].get("onnxruntime")):
            if check is not None:
                assert check["farthest_from_tie"] <= check["largest_bound"] < 0.25
                assert check["differing"] < 0.005 * codes
        assert entry["links"]["runtime"] == "not run: no CUDA device" or target == "onnxruntime"
    runtime = proof["onnxruntime"]["links"]["runtime"]
    assert (runtime["codes"], runtime["differing"], runtime["differing_logits"]) == (codes, 0, 0)
    assert runtime["observed_graph_is_shipped_graph"]
    assert broken_checks(proof["tensorrt"]) == set()
    found = fusion(files["onnxruntime"].model)
    assert (found.complete, found.in_float) == (True, [])
    operations = found.operations
    fused = ("QLinearConv", "QLinearAdd", "QGemm", "QLinearGlobalAveragePool")
    assert [operations[operation] for operation in fused] == [19, 9, 1, 1]
    assert not {"Conv", "FusedConv", "Add", "Gemm", "Relu", "DequantizeLinear"} & operations.keys()


def test_a_file_that_its_runtime_refuses_is_a_failed_proof(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = copy.deepcopy(digits(8).file("onnxruntime").model)
    broken.graph.node[0].op_type = "NoSuchOperation"
    own = fusions.session
    monkeypatch.setattr(verification, "session", lambda _, *more: own(broken.SerializeToString(), *more))
    entry = proof_of(digits(8), digits(8).files())["onnxruntime"]
    assert entry["status"].startswith(REFUSED) and "NoSuchOperation" in entry["status"]
    monkeypatch.setattr(verification, "session", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        proof_of(digits(8), digits(8).files())


@pytest.mark.parametrize("bits", [8, 4])
def test_a_network_trained_on_digits_is_proven(digits: Digits, bits: int) -> None:
    assert_proven(digits(bits), digits(bits).files())


@pytest.mark.parametrize("bits", [8, 4])
def test_the_published_resnet20_is_proven_on_cifar10(published_resnet20: Digits, bits: int) -> None:
    quantized = published_resnet20(bits)
    assert_proven(quantized, quantized.files())


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_one_target_alone_is_proven(digits: Digits, precision: str) -> None:
    quantized = digits(8)
    for target in ("onnxruntime", "tensorrt"):
        file = quantized.file(target, precision if target == "tensorrt" else "float32")
        (entry,) = proof_of(quantized, {target: file}).values()
        assert entry["status"] == "passed"
        assert entry["links"].keys() == {"torch", "runtime"}


def change_one_code(file: QDQModel) -> QDQModel:
    codes = initializer(file.model, f"{WEIGHT}.codes").copy()
    codes[3, 5, 1, 1] += 9 if codes[3, 5, 1, 1] < 0 else -9
    return edited_file(file, f"{WEIGHT}.codes", codes)


def change_one_weight_scale(file: QDQModel) -> QDQModel:
    scale = initializer(file.model, f"{WEIGHT}.scale").copy()
    scale[3] *= np.float32(1.05)
    return edited_file(file, f"{WEIGHT}.scale", scale)


def change_one_activation_scale(file: QDQModel) -> QDQModel:
    scale = initializer(file.model, f"{BEHIND}.scale")
    return edited_file(file, f"{BEHIND}.scale", scale * scale.dtype.type(1.05))


def shift_one_bias(file: QDQModel) -> QDQModel:
    name = f"{WEIGHT}.bias_codes" if file.activations[BEHIND].dtype is np.uint8 else f"{WEIGHT}.bias"
    bias = initializer(file.model, name).copy()
    shift = 0.5 * float(file.activations[BEHIND].grid.scale[0])
    bias[3] += bias.dtype.type(shift / file_unit(file)[3] if bias.dtype.kind == "i" else shift)
    return edited_file(file, name, bias)


def file_unit(file: QDQModel) -> np.ndarray:
    unit: np.ndarray = initializer(file.model, f"{WEIGHT}.bias_scale")
    return unit


def drop_a_clip(file: QDQModel) -> QDQModel:
    model = onnx.ModelProto()
    model.CopyFrom(file.model)
    clip = next(node for node in model.graph.node if node.name == f"{BEHIND}/Clip")
    quantizer = next(node for node in model.graph.node if node.name == f"{BEHIND}/QuantizeLinear")
    quantizer.output[0] = clip.output[0]
    model.graph.node.remove(clip)
    return replace(file, model=model)


BREAKS = [change_one_code, change_one_weight_scale, change_one_activation_scale, shift_one_bias, drop_a_clip]


def loud(quantized: Quantized) -> Quantized:
    """The same network on images with large values, so that every range's end is reached."""
    return replace(quantized, images=quantized.images * np.float32(3))


@pytest.mark.parametrize("broken", [False, True])
def test_images_in_parts_count_as_they_do_together(
    digits: Digits, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    quantized = digits(8)
    files = quantized.files()
    if broken:
        files["onnxruntime"] = change_one_code(files["onnxruntime"])
    whole = proof_of(quantized, files)
    count, _, height, width = quantized.images.shape
    monkeypatch.setattr(verification, "_PIXELS", (count // 2 - 1) * height * width)  # three parts, the last one small
    parts = proof_of(quantized, files)
    for target, entry in whole.items():
        assert broken_checks(parts[target]) == broken_checks(entry)
        for name, check in entry["links"].items():
            if isinstance(check, dict):
                for key in ("codes", "differing", "at"):
                    assert parts[target]["links"][name][key] == check[key]
    assert parts["onnxruntime"]["status"].startswith("failed") == broken


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("change", BREAKS, ids=lambda change: change.__name__)
def test_a_changed_file_breaks_the_links_to_torch_and_to_the_other_target(
    digits: Digits, change: Callable[[QDQModel], QDQModel], target: str
) -> None:
    """The runtime runs the changed file as the simulator does, unless a scale and its bias's no longer fit together."""
    quantized = loud(digits(4))
    good = quantized.files()
    assert {name: broken_checks(entry) for name, entry in proof_of(quantized, good).items()} == {
        "onnxruntime": set(),
        "tensorrt": set(),
    }
    files = {**good, target: change(good[target])}
    proof = proof_of(quantized, files)
    assert broken_checks(proof[target]) >= {"torch"}
    assert "onnxruntime" in broken_checks(proof["tensorrt"])
    torn = target == "onnxruntime" and change in (change_one_weight_scale, change_one_activation_scale)
    assert ("runtime" in broken_checks(proof["onnxruntime"])) == torn
    other = "tensorrt" if target == "onnxruntime" else "onnxruntime"
    assert "torch" not in broken_checks(proof[other])


def test_the_result_says_where(digits: Digits) -> None:
    quantized = digits(8)
    files = quantized.files()
    proof = proof_of(quantized, {**files, "onnxruntime": change_one_code(files["onnxruntime"])})
    check = proof["onnxruntime"]["links"]["torch"]
    assert check["at"] == f"{BEHIND}.codes"
    assert check["farthest_from_tie"] > check["largest_bound"]
    assert proof["onnxruntime"]["status"] == f"failed: torch: {check['violations']} codes"


def test_a_changed_weight_in_torch_breaks_the_link_to_torch(digits: Digits) -> None:
    quantized = digits(8)
    changed = replace(quantized, model=copy.deepcopy(quantized.model))
    spec = next(spec for spec in quantized.specs if spec.edge == WEIGHT)
    files = quantized.files()
    with torch.no_grad():
        weight = weight_of(changed.model, spec)
        weight[3, 5, 1, 1] += 9 * float(quantized.grids[WEIGHT].scale[3])
    proof = proof_of(changed, files)
    assert {target: broken_checks(entry) for target, entry in proof.items()} == {
        "onnxruntime": {"torch"},
        "tensorrt": {"torch"},
    }
    assert proof["onnxruntime"]["links"]["torch"]["at"] == f"{BEHIND}.codes"


@pytest.mark.parametrize("edge", [WEIGHT, BEHIND])
def test_a_quantizer_in_torch_that_is_not_its_grid_breaks_the_link_to_torch(digits: Digits, edge: str) -> None:
    quantized = digits(8)
    changed = replace(quantized, model=copy.deepcopy(quantized.model))
    with torch.no_grad():
        quantizer_of(changed.model, next(spec for spec in quantized.specs if spec.edge == edge)).scale.mul_(1.05)
    for entry in proof_of(changed, quantized.files()).values():
        assert broken_checks(entry) == {"torch"}
        assert entry["links"]["torch"]["at"] == f"{BEHIND}.codes"


def test_a_wrong_simulator_breaks_the_link_to_the_runtime(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the codes of a ReLU: as if it were forgotten that it is part of the rounding."""
    quantized = digits(8)
    files = quantized.files()
    calls: list[str] = []

    def wrong(model: onnx.ModelProto, images: Any, forced: Any = None, **further: Any) -> Any:
        simulation = simulate(model, images, forced, **further)
        simulation.codes[f"{BEHIND}.codes"] = simulation.codes[f"{BEHIND}.codes"].copy()
        simulation.codes[f"{BEHIND}.codes"].flat[7] ^= 1
        calls.append("")
        return simulation

    monkeypatch.setattr("crqat.export.verification.checks.simulate", wrong)
    entry = proof_of(quantized, {"onnxruntime": files["onnxruntime"]})["onnxruntime"]
    runtime = entry["links"]["runtime"]
    assert (runtime["differing"], runtime["at"], len(calls)) == (1, f"{BEHIND}.codes", 1)
    assert "runtime" in broken_checks(entry)
    assert entry["differing_codes"] == 1


def test_the_link_to_the_runtime_holds_for_the_kernels_of_this_cpu_alone(
    digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = with_ties(digits(8))
    files = {"onnxruntime": quantized.file("onnxruntime")}
    # Torch has the scales of before.
    assert broken_checks(proof_of(quantized, files)["onnxruntime"]) == {"torch"}
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    # This CPU's kernels add otherwise than ARM's, whose codes are then asked for.
    assert broken_checks(proof_of(quantized, files)["onnxruntime"]) == {"torch", "runtime"}


def test_logits_count_in_the_link_to_the_runtime(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = digits(8)

    def wrong(model: onnx.ModelProto, images: Any, forced: Any = None, **further: Any) -> Any:
        simulation = simulate(model, images, forced, **further)
        simulation.logits[2, 3] = np.nextafter(simulation.logits[2, 3], np.float32(99))
        return simulation

    monkeypatch.setattr("crqat.export.verification.checks.simulate", wrong)
    entry = proof_of(quantized, {"onnxruntime": quantized.file("onnxruntime")})["onnxruntime"]
    assert entry["links"]["runtime"]["differing_logits"] == 1
    assert entry["status"] == "failed: runtime: 1 codes"


def test_what_cannot_be_simulated_is_not_run_and_said(digits: Digits) -> None:
    quantized = digits(8)
    files = quantized.files()
    model = onnx.ModelProto()
    model.CopyFrom(files["tensorrt"].model)
    node = nodes(model, "Relu")[0]
    node.op_type = "Det"
    proof = proof_of(quantized, {**files, "tensorrt": replace(files["tensorrt"], model=model)})
    assert proof["onnxruntime"]["status"] == "passed"
    entry = proof["tensorrt"]
    assert entry["status"] == f"not run: {node.name}: the simulator does not support Det"
    assert (entry["images"], entry["codes"], entry["differing_codes"]) == (len(quantized.images), 0, 0)


def test_hooks_are_removed(digits: Digits) -> None:
    quantized = digits(8)
    proof_of(quantized, {"onnxruntime": quantized.file("onnxruntime")})
    assert not any(module._forward_hooks for module in quantized.model.modules())


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        ("Conv", "HardSwish stands between it and a quantizer"),
        ("Add", "its input first is not quantized (Conv)"),
    ],
)
def test_what_stays_float_is_named_with_the_reason(digits: Digits, operation: str, reason: str) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(digits(8).file("onnxruntime").model)
    if operation == "Conv":
        node = next(node for node in model.graph.node if node.name == "layer1/0/conv1")
        relu = next(other for other in model.graph.node if node.output[0] in other.input)
        relu.op_type = "HardSwish"
    else:
        # The Add of the first block reads its convolution instead of the codes behind it.
        node = nodes(model, "Add")[0]
        producer = {output: other for other in model.graph.node for output in other.output}
        source = producer[node.input[0]]
        while source.op_type != "Conv":
            source = producer[source.input[0]]
        reader = next(other for other in model.graph.node if source.output[0] in other.input)
        reader.input[0], source.output[0], node.input[0] = "first", "first", "first"
    found = fusion(model)
    assert not found.complete
    assert FloatNode(node.name, operation, reason) in found.in_float
    assert found.expected == {
        "QLinearConv": 19, "QLinearAdd": 9, "QGemm": 1, "QLinearGlobalAveragePool": 1,
    }  # fmt: skip


def test_fusion_names_are_the_files(digits: Digits) -> None:
    model = digits(8).file("onnxruntime").model
    operations = optimized_operations(model)
    assert set(operations["QLinearConv"]) == {node.name for node in nodes(model, "Conv")}
    assert operations["QGemm"] == [nodes(model, "Gemm")[0].name]


class Shared(nn.Module):
    """Adds a sum to itself by way of shared quantizers, and ends in a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.relu, self.linear = nn.ReLU(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        for _ in range(2):
            x = self.relu(self.second(x) + x)
        return self.linear(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))  # type: ignore[no-any-return]


def test_layers_that_are_used_twice_are_proven() -> None:
    torch.manual_seed(0)
    quantized = quantize(Shared(), random_images(8, 3, 8, 8))
    files = quantized.files()
    assert {entry["status"] for entry in proof_of(quantized, files).values()} == {"passed"}


def test_an_add_of_very_unlike_scales_agrees_across_targets_within_the_kernels_own_rounding() -> None:
    """A branch that is all zeros has a scale far above the sum's, and its zero point cancels with an error."""
    step = np.float32(0.00385)
    codes = np.arange(1, 126, 2)
    images = np.stack([np.zeros(len(codes)), codes * 0.50001 * step]).astype(np.float32).reshape(1, 2, 1, -1)
    simulations = {}
    for dtype, zero_point in ((np.uint8, 128), (np.int8, 0)):
        constants: dict[str, Any] = {}
        made: list[Node] = []
        for name, scale in (("a", 1.0), ("b", 0.50001 * step), ("y", step)):
            constants.update({f"{name}.scale": np.float32(scale), f"{name}.zero": dtype(zero_point)})
        for i, name in enumerate("ab"):
            bounds = {"starts": i, "ends": i + 1, "axes": 1, "steps": 1}
            constants.update({f"{name}.{key}": np.array([value], np.int64) for key, value in bounds.items()})
            made += [
                ("Slice", ["input", *(f"{name}.{key}" for key in bounds)], f"{name}.cut", {}),
                one_operation.quantize(name, f"{name}.cut"),
                one_operation.dequantize(name, name, f"{name}.real"),
            ]
        made += [("Add", ["a.real", "b.real"], "sum", {}), one_operation.quantize("y", "sum")]
        made += [one_operation.dequantize("y", "y", "logits")]
        simulations[zero_point] = simulate(one_operation.model_of(made, constants, images.shape), images)
    kernel, own = simulations[128], simulations[0]
    pairs = {"y": (own.codes["y"], kernel.codes["y"])}
    assert verification._compare(pairs, own).violations > 0  # by the bound of real values alone
    check = verification._compare(pairs, own, kernel.kernel_bounds)
    assert check.differing > 0 and check.violations == 0
    assert check.farthest_from_tie is not None and check.largest_bound is not None
    assert own.tie_bound["y"] < check.farthest_from_tie <= check.largest_bound < 0.05
    further = {"y": (own.codes["y"], kernel.codes["y"] + 1)}
    assert verification._compare(further, own, kernel.kernel_bounds).violations > 0


def test_accuracy_of_the_real_network_survives_the_way(published_resnet20: Digits, cifar10_root: Path) -> None:
    """300 test images: torch's quantized network and the file answer alike, ties in the codes aside."""
    quantized = published_resnet20(8)
    dataset = sources.load("cifar10", str(cifar10_root), False)
    images, labels = dataset.preprocessing(dataset.test_images[:300].numpy()), dataset.test_labels[:300].numpy()
    with torch.no_grad():
        expected = quantized.model(torch.from_numpy(images)).numpy().argmax(axis=1)
    runtime = session(quantized.file("onnxruntime").model)
    own = runtime.run(["logits"], {"input": images})[0].argmax(axis=1)
    assert (own == expected).mean() > 0.985
    assert (own == labels).mean() > 0.90


def test_a_relu_that_shares_its_scale_with_both_signs_says_why_its_convolution_stays_float() -> None:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    for up, kept in ((nn.Upsample(scale_factor=2), 0), (nn.ConvTranspose2d(8, 8, 2, stride=2), 1)):
        file = quantize_network(Skip(up).eval(), [images], ("onnxruntime",)).files()["onnxruntime"]
        reasons = [entry.reason for entry in fusion(file.model).in_float if entry.node == "first"]
        told = "the quantizer behind its Relu is shared with a tensor of both signs, so ONNX Runtime keeps the Relu"
        assert reasons == [told] * kept


def test_a_result_with_two_quantizers_says_why_it_stays_float() -> None:
    names = ["scale", "zero"]
    layers = [helper.make_node("DequantizeLinear", [name, *names], [f"{name}.real"]) for name in ("input", "weight")]
    conv = helper.make_node("Conv", ["input.real", "weight.real"], ["y"], name="conv")
    quantizers = [helper.make_node("QuantizeLinear", ["y", *names], [f"codes{i}"]) for i in range(2)]
    outputs = [helper.make_tensor_value_info(f"codes{i}", TensorProto.UINT8, None) for i in range(2)]
    shapes = {"scale": np.float32(0.1), "zero": np.uint8(0), "weight": np.ones((2, 2, 1, 1), np.uint8)}
    constants = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in shapes.items()]
    read = [helper.make_tensor_value_info("input", TensorProto.UINT8, [1, 2, 3, 3])]
    graph = helper.make_graph([*layers, conv, *quantizers], "g", read, outputs, constants)
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    told = "its result goes to 2 quantizers, of which ONNX Runtime fuses none"
    assert fusion(file).in_float == [FloatNode("conv", "Conv", told)]


class Skip(nn.Module):
    """A skip connection that shares its scale with what it is joined to."""

    def __init__(self, up: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.last = up, nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = torch.relu(self.first(x))
        deep = torch.relu(self.second(torch.max_pool2d(skip, 2)))
        logits: Tensor = self.last(torch.cat([self.up(deep), skip], dim=1)).mean((2, 3))
        return logits
