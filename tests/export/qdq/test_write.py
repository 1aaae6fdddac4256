"""The files as they ship: their form, and that ONNX Runtime runs them whole in integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from crqat.core.compare_codes import compare_codes
from crqat.export.qdq.lower import clip_bound
from crqat.export.qdq.write import QDQModel, float_model, qdq_model
from crqat.export.simulator.run import simulate
from crqat.export.verification.checks import verify
from crqat.export.verification.fusion import fusion, optimized_operations
from crqat.train.config import QuantizationConfig, Target
from crqat.train.models import build as models
from tests.export.conftest import Quantized, initializer, nodes, quantize, random_images, sane_bn, session

Digits = Callable[[int], Quantized]


def runtime_codes(file: QDQModel, images: np.ndarray) -> dict[str, np.ndarray]:
    """All tensors of codes as ONNX Runtime computes them at full optimization, zero point taken off, and the logits."""
    zero_points = {name: file.activations[edge].grid.zero_point for edge, own in file.codes.items() for name in own}
    values = session(file.model, outputs=tuple(zero_points)).run(["logits", *zero_points], {"input": images})
    codes = {n: v.astype(np.int64) - z for (n, z), v in zip(zero_points.items(), values[1:], strict=True)}
    return {"logits": values[0], **codes}


def differing(file: QDQModel, images: np.ndarray) -> int:
    simulation, runtime = simulate(file.model, images), runtime_codes(file, images)
    wrong = int((simulation.logits != runtime.pop("logits")).sum())
    return wrong + compare_codes({name: (simulation.codes[name], codes) for name, codes in runtime.items()}).wrong


@pytest.mark.parametrize("bits", [8, 4])
def test_the_files_are_complete_and_hold_nothing_else(digits: Digits, bits: int) -> None:
    files = digits(bits).files()
    baseline = float_model(digits(bits).graph, {"crqat.target": "float"})
    models_of = {"float": baseline, **{name: file.model for name, file in files.items()}}
    for target, model in models_of.items():
        onnx.checker.check_model(model, full_check=True)
        assert {p.key: p.value for p in model.metadata_props} == {"crqat.target": target}
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 19 if target == "tensorrt" else 17)]
        assert {node.domain for node in model.graph.node} == {""}
        for value, name, shape in ((model.graph.input, "input", [1, 8, 8]), (model.graph.output, "logits", [10])):
            assert [v.name for v in value] == [name]
            assert value[0].type.tensor_type.elem_type == TensorProto.FLOAT
            batch, *rest = value[0].type.tensor_type.shape.dim
            assert (batch.dim_param, [d.dim_value for d in rest]) == ("batch", shape)
        read = {name for node in model.graph.node for name in node.input}
        assert {tensor.name for tensor in model.graph.initializer} <= read
        names = [node.name for node in model.graph.node]
        assert len(set(names)) == len(names)
        written = [output for node in model.graph.node for output in node.output]
        assert len(set(written)) == len(written)
        assert set(written) - read == {"logits"}


@pytest.mark.parametrize("bits", [8, 4])
def test_zero_points_are_the_targets(digits: Digits, bits: int) -> None:
    for target, file in digits(bits).files().items():
        types = set()
        for node in file.model.graph.node:
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.input) < 3:
                continue
            zero_point = initializer(file.model, node.input[2])
            weight = zero_point.ndim == 1
            types.add((weight, zero_point.dtype.name))
            assert target == "onnxruntime" or not zero_point.any()
            assert zero_point.ndim == initializer(file.model, node.input[1]).ndim
        assert types == {(True, "int8"), (False, "uint8" if target == "onnxruntime" else "int8")}


def test_the_float_type_is_float16_but_for_input_output_and_the_first_quantizer(digits: Digits) -> None:
    file = digits(8).file("tensorrt", "float16")
    kinds = {t.name: t.data_type for t in file.model.graph.initializer}
    singles = [name for name, kind in kinds.items() if kind == TensorProto.FLOAT]
    first = file.model.graph.node[0]
    assert (first.op_type, list(first.input[:2])) == ("QuantizeLinear", ["input", singles[0]])
    assert len(singles) == 1
    assert file.model.graph.node[-1].op_type == "Cast"
    inferred = onnx.shape_inference.infer_shapes(file.model, strict_mode=True)
    sums = {node.output[0] for node in file.model.graph.node if node.op_type in ("Conv", "Add", "Gemm")}
    types = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info if v.name in sums}
    assert len(types) == len(sums)
    assert set(types.values()) == {TensorProto.FLOAT16}
    assert TensorProto.FLOAT16 not in {
        t.data_type for t in digits(8).file("tensorrt", "float32").model.graph.initializer
    }


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_clipped_where_the_type_does_not(digits: Digits, bits: int) -> None:
    quantized = digits(bits)
    for target, file in quantized.files().items():
        clips = {node.output[0]: node for node in nodes(file.model, "Clip")}
        for edge, (name,) in file.codes.items():
            grid = quantized.grids[edge]
            zero = file.activations[edge].grid.zero_point
            info = np.iinfo(np.uint8 if target == "onnxruntime" else np.int8)
            bounds = (int(info.min), int(info.max))
            if name in clips:
                low, high = (initializer(file.model, clips[name].input[i]) for i in (1, 2))
                assert low.dtype == high.dtype == info.dtype
                bounds = (int(low), int(high))
            nonnegative = grid.qmin == 0 and target == "tensorrt" and name not in clips
            assert (0 if nonnegative else bounds[0] - zero, bounds[1] - zero) == (grid.qmin, grid.qmax)
        signed_and_full = sum(grid.qmin == -128 for grid in quantized.grids.values())
        activations = sum(grid.axis is None for grid in quantized.grids.values())
        expected = {"onnxruntime": activations - signed_and_full, "tensorrt": 0 if bits == 8 else len(clips)}
        assert len(clips) == expected[target]
        assert len(clips) > 10 or (target, bits) == ("tensorrt", 8)


def test_the_shortcut_moves_codes_for_onnxruntime_and_values_for_tensorrt(digits: Digits) -> None:
    files = digits(8).files()
    for target, file in files.items():
        producer = {output: node.op_type for node in file.model.graph.node for output in node.output}
        sources = {producer[node.input[0]] for node in nodes(file.model, "Slice") if node.input[0] in producer}
        assert sources <= ({"Clip", "Slice"} if target == "onnxruntime" else {"DequantizeLinear", "Slice"})
        assert len(nodes(file.model, "Slice")) == 4
        for pad in nodes(file.model, "Pad"):
            # The code of 0.0 has to be named; for floats 0.0 is what is meant anyway.
            assert bool(pad.input[2]) == (target == "onnxruntime")
            if pad.input[2]:
                value = initializer(file.model, pad.input[2])
                assert (value.dtype.name, int(value)) == ("uint8", 0)
        # What an Add reads is dequantized right before it.
        inputs = {producer[name] for node in nodes(file.model, "Add") for name in node.input}
        assert inputs == ({"DequantizeLinear"} if target == "onnxruntime" else {"DequantizeLinear", "Pad"})


@pytest.mark.parametrize("bits", [8, 4])
def test_the_batch_is_free(digits: Digits, bits: int) -> None:
    quantized = digits(bits)
    images = quantized.images[:8]
    runtime = session(quantized.file("onnxruntime").model)
    eight = runtime.run(["logits"], {"input": images})[0]
    assert eight.shape == (8, 10)
    assert len(np.unique(eight, axis=0)) == 8
    for batch in (1, 3):
        for start in range(0, 8 - batch, batch):
            rows = runtime.run(["logits"], {"input": images[start : start + batch]})[0]
            np.testing.assert_array_equal(rows, eight[start : start + batch])
    engine = session(quantized.file("tensorrt", "float16").model, "ORT_DISABLE_ALL")
    assert engine.run(["logits"], {"input": images[:3]})[0].shape == (3, 10)


@pytest.mark.parametrize("bits", [8, 4])
def test_lowering_claims_are_those_of_the_manifest(digits: Digits, bits: int) -> None:
    for file in digits(bits).files().values():
        claims = file.claims()
        assert claims.keys() == digits(bits).grids.keys()
        assert {claim.claim for claim in claims.values()} == {"exact"}
        for edge, weight in file.weights.items():
            assert claims[edge].bias_error == weight.bias_error >= 0
        assert not any(claim.note for claim in claims.values())


def test_a_scale_that_float16_does_not_hold_is_lossy(digits: Digits) -> None:
    """Training for TensorRT chooses scales that fit; a Grid from elsewhere may not."""
    quantized = digits(8)
    off = dict(quantized.grids)
    changed = [next(e for e, g in off.items() if g.axis == axis) for axis in (None, 0)]
    for edge in changed:
        off[edge] = replace(off[edge], scale=np.nextafter(off[edge].scale, np.float32(9)) * np.float32(1.0001))
    other = replace(quantized, grids=off)
    claims = other.file("tensorrt", "float16").claims()
    lossy = {edge: claim.note for edge, claim in claims.items() if claim.claim == "lossy"}
    assert lossy == dict.fromkeys(changed, "float16 does not hold its scale")
    for precise in (other.file("tensorrt", "float32"), other.file("onnxruntime")):
        assert {claim.claim for claim in precise.claims().values()} == {"exact"}


@pytest.mark.parametrize(
    ("name", "bits", "fused"),
    [
        ("torchvision/mobilenet_v2", 8, (52, 10, 1)),
        ("torchvision/mobilenet_v2", 4, (52, 10, 1)),
        ("torchvision/resnet18", 8, (20, 8, 1)),
        ("cifar/mobilenet_v2", 8, (52, 10, 1)),
        ("cifar/resnet18", 8, (20, 8, 1)),
    ],
)
def test_networks_fuse_completely(name: str, bits: int, fused: tuple[int, ...]) -> None:
    images = random_images(4, 3, *((64, 64) if name.startswith("torchvision/") else (32, 32)))
    torch.manual_seed(0)
    quantized = quantize(sane_bn(models.build(name, 10, 3), images), images, bits)
    files = quantized.files()
    found = fusion(files["onnxruntime"].model)
    operations = found.operations
    assert tuple(operations[op] for op in ("QLinearConv", "QLinearAdd", "QGemm")) == fused
    assert (found.complete, found.in_float) == (True, [])
    assert not {"Conv", "FusedConv", "Add", "Gemm", "Relu"} & operations.keys()
    assert (operations["QuantizeLinear"], operations.get("DequantizeLinear", 0)) == (1, 0)
    assert differing(files["onnxruntime"], quantized.images) == 0
    proof = verify(quantized.model, quantized.grids, files, quantized.images)
    assert {name: entry.status for name, entry in proof.items()} == dict.fromkeys(files, "passed")
    if name.endswith("mobilenet_v2"):
        # ReLU6 is the integer Clip's upper bound, and the float one is gone; TensorRT keeps it.
        kinds = {
            t: {initializer(f.model, c.input[1]).dtype.name for c in nodes(f.model, "Clip")} for t, f in files.items()
        }
        assert kinds["onnxruntime"] == {"uint8"}
        assert "float16" in kinds["tensorrt"]
        assert operations["Clip"] == (36 if bits == 8 else 63)


class Between(nn.Module):
    """What a test asks for between two convolutions, of 3 and 8 channels, and a head that runs in integers."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.linear = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3), nn.Linear(5, 5)
        self.relu = nn.ReLU()
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.second(self.between(self.first(x))))
        return self.linear(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("targets", [("onnxruntime",), ("onnxruntime", "tensorrt")])
def test_relu6_clips_at_its_own_code(targets: tuple[Target, ...]) -> None:
    """The quantizer's range may go beyond 6 or stop below it."""
    torch.manual_seed(0)
    network = Between(nn.functional.relu6)
    network.first.weight.data *= 10
    quantized = quantize(network, random_images(8, 3, 8, 8), targets=targets)
    edge = next(s.edge for s in quantized.specs if "relu6" in s.edge)
    seen = set()
    for scale in (0.015, 0.0235, 0.024, 0.03, 0.047, 0.048, 0.0624, 0.1, 6 / 31.5, 1.0):
        grid = replace(quantized.grids[edge], scale=np.array([scale], np.float32))
        other = replace(quantized, grids={**quantized.grids, edge: grid})
        file = other.file("onnxruntime")
        high = clip_bound(6.0, grid)
        if high == 255:  # where QuantizeLinear saturates there is nothing left to clip
            assert f"{edge}.qmax" not in {tensor.name for tensor in file.model.graph.initializer}
        else:
            assert high == int(initializer(file.model, f"{edge}.qmax"))
        simulation = simulate(file.model, quantized.images)
        assert simulation.codes[f"{edge}.codes"].max() == high
        assert differing(file, quantized.images) == 0
        seen.add(high == grid.qmax)
    assert seen == {True, False}


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate"])
def test_pads_of_zeros_and_of_values_run_on_codes(mode: str) -> None:
    def between(x: Tensor) -> Tensor:
        return nn.functional.pad(x, (1, 2, 0, 1), mode)

    network = Between(between)
    quantized = quantize(network, random_images(4, 3, 8, 8))
    files = quantized.files()
    proof = verify(quantized.model, quantized.grids, files, quantized.images)
    assert {target: entry.status for target, entry in proof.items()} == dict.fromkeys(files, "passed")
    assert fusion(files["onnxruntime"].model).operations["QLinearConv"] == 2


def test_a_pad_of_other_values_is_kept() -> None:
    """Its values are on no Grid: the convolution behind it stays in float, and the file says 1.0."""
    network = Between(lambda x: nn.functional.pad(x, (1, 2, 0, 1), value=1.0))
    quantized = quantize(network, random_images(4, 3, 8, 8))
    for file in quantized.files().values():
        (pad,) = nodes(file.model, "Pad")
        assert float(initializer(file.model, pad.input[2])) == 1.0
    proof = verify(quantized.model, quantized.grids, quantized.files(), quantized.images)
    assert {entry.status for entry in proof.values()} == {"passed"}


@pytest.mark.parametrize(
    "between",
    [
        lambda x: nn.functional.max_pool2d(x, 3, 2, 1),
        lambda x: x[:, :, 1:, ::2],
        lambda x: nn.functional.relu6(x + x),
        lambda x: nn.functional.relu6(x) + x,
    ],
    ids=["max pool", "slice", "relu6 of a sum", "relu6 beside its input"],
)
@pytest.mark.parametrize("targets", [("onnxruntime",), ("tensorrt",), ("onnxruntime", "tensorrt")], ids="+".join)
def test_what_stands_between_convolutions(between: Callable[[Tensor], Tensor], targets: tuple[Target, ...]) -> None:
    torch.manual_seed(0)
    quantized = quantize(Between(between), random_images(8, 3, 9, 9), targets=targets)
    files: dict[str, QDQModel] = {
        target: quantized.file(target, "float16" if target == "tensorrt" else "float32") for target in targets
    }
    proof = verify(quantized.model, quantized.grids, files, quantized.images)
    assert {target: entry.status for target, entry in proof.items()} == dict.fromkeys(files, "passed")


def test_a_squeezed_tensor_is_a_quantized_one() -> None:
    class Squeezed(Between):
        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.second(self.first(x)))
            return self.linear(nn.functional.adaptive_avg_pool2d(x, 1).squeeze(3).squeeze(2))  # type: ignore[no-any-return]

    quantized = quantize(Squeezed(nn.Identity()), random_images(8, 3, 8, 8))
    files = quantized.files()
    proof = verify(quantized.model, quantized.grids, files, quantized.images)
    assert {target: entry.status for target, entry in proof.items()} == dict.fromkeys(files, "passed")
    assert fusion(files["onnxruntime"].model).complete


def test_a_linear_layer_without_a_bias_is_an_integer_gemm() -> None:
    network = Between(nn.functional.relu)
    network.linear = nn.Linear(5, 5, bias=False)
    quantized = quantize(network, random_images(4, 3, 8, 8))
    files = quantized.files()
    proof = verify(quantized.model, quantized.grids, files, quantized.images)
    assert {target: entry.status for target, entry in proof.items()} == dict.fromkeys(files, "passed")
    assert fusion(files["onnxruntime"].model).operations["QGemm"] == 1


def test_full_width_weights_behind_a_signed_input_are_reduced_not_saturated(digits: Digits) -> None:
    """A network that was trained for TensorRT alone, written for ONNX Runtime."""
    images = torch.from_numpy(digits(8).images)
    network = models.build("cifar/resnet20", 10, 1)
    quantized = quantize(sane_bn(network, images), images, targets=("tensorrt",))
    file = quantized.file("onnxruntime")
    lossy = {edge for edge, claim in file.claims().items() if claim.claim == "lossy"}
    assert lossy == {s.edge for s in quantized.specs if s.kind == "weight" and s.operation == "conv1"}
    assert np.abs(file.weights[lossy.pop()].codes.astype(int)).max() == 64


def test_grouped_and_depthwise_convolutions_get_their_own_limits() -> None:
    network = Between(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=2)))
    quantized = quantize(network, random_images(8, 3, 11, 11))
    file = quantized.file("onnxruntime")
    largest = {
        node.name: int(
            np.abs(initializer(file.model, node.input[1].replace(".dequantized", ".codes")).astype(int)).max()
        )
        for node in nodes(file.model, "Conv")
    }
    assert largest["between/0"] == 127
    assert max(largest["first"], largest["between/1"]) <= 64
    assert differing(file, quantized.images) == 0


def test_widths_of_first_and_last_layers_reach_the_file(digits: Digits) -> None:
    images = torch.from_numpy(digits(8).images)
    config = QuantizationConfig(weights=2, activations=3, first_layer=8, last_layer=6)
    quantized = quantize(sane_bn(models.build("cifar/resnet20", 10, 1), images), images, config=config)
    files = quantized.files()
    assert differing(files["onnxruntime"], quantized.images) == 0
    weights = {s.operation: files["tensorrt"].weights[s.edge].codes for s in quantized.specs if s.kind == "weight"}
    largest = {name: int(np.abs(weights[name].astype(int)).max()) for name in ("conv1", "layer2.1.conv1", "linear")}
    # 7 bits behind the signed input.
    assert 32 < largest["conv1"] <= 64
    assert 1 <= largest["layer2.1.conv1"] <= 2
    assert 16 < largest["linear"] <= 32
    assert optimized_operations(files["onnxruntime"].model).keys() >= {"QLinearConv", "QLinearAdd", "QGemm"}


def test_a_layout_without_a_quantizer_is_written_too() -> None:
    """The float network under a target's name: nothing to lower, nothing to break."""
    graph = quantize(Between(nn.functional.relu), random_images(4, 3, 8, 8)).graph
    edges = {node.output[0]: node.input[0] for node in graph.nodes if node.op_type == "Edge"}
    graph.nodes[:] = [node for node in graph.nodes if node.op_type != "Edge"]
    for node in graph.nodes:
        for index, name in enumerate(node.input):
            node.input[index] = edges.get(name, name)
    file = qdq_model(graph, [], {}, {}, "onnxruntime", "float32", {})
    assert not nodes(file.model, "QuantizeLinear")
    images = random_images(2, 3, 8, 8).numpy()
    run = [session(m, "ORT_DISABLE_ALL").run(None, {"input": images})[0] for m in (file.model, float_model(graph, {}))]
    np.testing.assert_array_equal(*run)


class Head(nn.Module):
    """A small network with one of the ways in which people write the step from pixels to classes."""

    def __init__(self, step: Callable[[Tensor], Tensor], features: int) -> None:
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Linear(features, 5)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.step(self.relu(self.conv(x))))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("step", "features"),
    [
        (lambda x: x.view(x.size(0), -1), 288),
        (lambda x: x.view(x.shape[0], -1), 288),
        (lambda x: x.reshape(-1, 288), 288),
        (lambda x: torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1), 8),
        (lambda x: x.mean((2, 3)), 8),
        (lambda x: x.mean((2, 3), keepdim=True).flatten(1), 8),
    ],
    ids=["view-size", "view-shape", "reshape", "pool-flatten", "mean", "mean-keepdim"],
)
def test_every_way_to_the_classifier_is_fused_and_exact(step: Callable[[Tensor], Tensor], features: int) -> None:
    torch.manual_seed(0)
    quantized = quantize(Head(step, features), random_images(8, 3, 8, 8))
    file = quantized.file("onnxruntime")
    proof = verify(quantized.model, quantized.grids, {"onnxruntime": file}, quantized.images)
    assert proof["onnxruntime"].status == "passed"
    assert proof["onnxruntime"].differing_codes == 0 < proof["onnxruntime"].codes
    assert fusion(file.model).in_float == []


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_weights_stored_as_float_come_back_as_the_same_codes(digits: Digits, bits: int, precision: str) -> None:
    q = digits(bits)
    codes = q.file("tensorrt", precision)
    values = qdq_model(
        q.graph, q.specs, q.grids, q.latent, "tensorrt", precision, {"crqat.target": "tensorrt"}, "float"
    )
    weights = [spec.edge for spec in q.specs if spec.kind == "weight"]
    assert len(nodes(values.model, "QuantizeLinear")) == len(nodes(codes.model, "QuantizeLinear")) + len(weights)
    taps = [f"{edge}.codes" for edge in weights]
    tapped = onnx.ModelProto()
    tapped.CopyFrom(values.model)
    tapped.graph.output.extend(onnx.helper.make_tensor_value_info(name, TensorProto.INT8, None) for name in taps)
    for edge, own in zip(weights, session(tapped).run(taps, {"input": q.images}), strict=True):
        np.testing.assert_array_equal(own, initializer(codes.model, f"{edge}.codes"))
    first, second = simulate(codes.model, q.images), simulate(values.model, q.images)
    assert first.codes.keys() == second.codes.keys()
    for name, expected in first.codes.items():
        np.testing.assert_array_equal(second.codes[name], expected)
    np.testing.assert_array_equal(second.logits, first.logits)


def test_the_float_network_in_float16(digits: Digits) -> None:
    q = digits(8)
    half, single = float_model(q.graph, {}, "float16"), float_model(q.graph, {})
    onnx.checker.check_model(half, full_check=True)
    for value in (half.graph.input[0], half.graph.output[0]):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
    types = {tensor.data_type for tensor in half.graph.initializer}
    assert TensorProto.FLOAT16 in types
    assert TensorProto.FLOAT not in types
    assert [node.op_type for node in half.graph.node][:: len(half.graph.node) - 1] == ["Cast", "Cast"]
    assert len(half.graph.node) == len(single.graph.node) + 2
    expected, found = (session(model).run(["logits"], {"input": q.images})[0] for model in (single, half))
    assert found.dtype == np.float32
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert 0 < error < 0.02  # it is not the same, and it is the same network
