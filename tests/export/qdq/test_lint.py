"""Each rule on a good file that is broken in one place: exactly that rule is named, with the node and what to do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from crqat.export.graph.record import DOMAIN
from crqat.export.qdq.lint import Finding, lint
from crqat.export.qdq.write import float_model
from tests.export.conftest import Quantized, edited, initializer, nodes

Digits = Callable[[int], Quantized]
RELU, INPUT = "post_hooks.relu/relu/0__0.0", "post_hooks.x__0.0"


@pytest.fixture(scope="module")
def files(digits: Digits) -> dict[str, onnx.ModelProto]:
    """Good files, never changed."""
    return {target: file.model for target, file in digits(8).files().items()}


def check_only(findings: list[Finding], node: str, rule: str, fix: str) -> None:
    assert [finding.node for finding in findings] == [node], [str(finding) for finding in findings]
    text = str(findings[0])
    assert text.startswith(f"{node}: ")
    assert rule in text
    assert text.endswith(fix)
    assert "\n" not in text


@pytest.mark.parametrize("bits", [8, 4])
def test_good_files_break_no_rule(digits: Digits, bits: int) -> None:
    for target, file in digits(bits).files().items():
        assert lint(file.model, target) == []
    assert lint(digits(bits).file("tensorrt", "float32").model, "tensorrt") == []
    assert lint(float_model(digits(bits).graph, {}), "float") == []


def test_codes_without_a_sign_for_tensorrt(files: dict[str, onnx.ModelProto]) -> None:
    broken = edited(files["tensorrt"], f"{RELU}.zero_point", np.uint8(0))
    findings = lint(broken, "tensorrt")
    # The QuantizeLinear and the DequantizeLinear behind it.
    assert {finding.node for finding in findings} == {f"{RELU}/QuantizeLinear", f"{RELU}.codes/DequantizeLinear"}
    for finding in findings:
        assert "reads UINT8 with the same scale and clips half of the range" in str(finding)
        assert str(finding).endswith("export with `targets: [tensorrt]`")
    assert lint(files["onnxruntime"], "tensorrt")  # the other target's file is none of this one's


def relu_before(model: onnx.ModelProto, layer: onnx.NodeProto) -> str:
    """The float tensor whose codes a layer reads."""
    before = list(model.graph.node)[: list(model.graph.node).index(layer)]
    return next(str(node.output[0]) for node in reversed(before) if node.op_type == "Relu")


@pytest.mark.parametrize(
    ("index", "what", "source"),
    [(0, "input", "plain"), (1, "weight", "plain"), (0, "input", "ReLU")],
)
def test_a_layer_left_in_float_for_tensorrt(
    files: dict[str, onnx.ModelProto], index: int, what: str, source: str
) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(files["tensorrt"])
    conv = next(node for node in broken.graph.node if node.name == "layer2/0/conv2")
    broken.graph.initializer.append(numpy_helper.from_array(np.ones((32, 32, 3, 3), np.float16), "plain"))
    conv.input[index] = relu_before(broken, conv) if source == "ReLU" else source
    fix = "quantize it, or leave tensorrt out of `export.targets`"
    check_only(lint(broken, "tensorrt"), "layer2/0/conv2", f"its {what} is not quantized though its", fix)


def test_a_layer_that_is_meant_to_be_float_is_none_left_in_float(files: dict[str, onnx.ModelProto]) -> None:
    meant = onnx.ModelProto()
    meant.CopyFrom(files["tensorrt"])
    conv = next(node for node in meant.graph.node if node.name == "layer2/0/conv2")
    meant.graph.initializer.append(numpy_helper.from_array(np.ones((32, 32, 3, 3), np.float16), "plain"))
    conv.input[0], conv.input[1] = relu_before(meant, conv), "plain"
    assert lint(meant, "tensorrt") == []


def test_a_zero_point_for_tensorrt(files: dict[str, onnx.ModelProto]) -> None:
    findings = lint(edited(files["tensorrt"], f"{INPUT}.zero_point", np.int8(3)), "tensorrt")
    assert {finding.node for finding in findings} == {f"{INPUT}/QuantizeLinear", f"{INPUT}.codes/DequantizeLinear"}
    assert all("a zero point other than 0" in finding.rule for finding in findings)


def test_a_bias_in_integers_for_tensorrt(files: dict[str, onnx.ModelProto]) -> None:
    findings = lint(files["onnxruntime"], "tensorrt")
    assert any(finding.node.endswith(".bias/DequantizeLinear") and "reads none" in finding.rule for finding in findings)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt", "float"])
def test_external_data(files: dict[str, onnx.ModelProto], target: str) -> None:
    """Even where the values would be needed for another rule: nothing is read from elsewhere."""
    for suffix in (".codes", ".scale"):
        broken = onnx.ModelProto()
        broken.CopyFrom(files["onnxruntime" if target == "float" else target])
        name = "pre_hooks.layer1/0/conv1/conv2d/0__1.0" + suffix
        tensor = next(tensor for tensor in broken.graph.initializer if tensor.name == name)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="/etc/passwd")
        check_only(lint(broken, target), name, "weights are inside the file", "external data is not used")


@pytest.mark.parametrize("domain", ["com.microsoft", DOMAIN])
def test_other_operations_than_the_standards(files: dict[str, onnx.ModelProto], domain: str) -> None:
    for target, model in files.items():
        broken = onnx.ModelProto()
        broken.CopyFrom(model)
        node = nodes(broken, "Flatten")[0]
        node.domain = domain
        findings = lint(broken, target)
        assert {finding.node for finding in findings} == {node.name}
        assert f"only standard operations ({domain}.Flatten)" in findings[0].rule
        assert len(findings) == (2 if domain == DOMAIN else 1)
        assert all(finding.fix == "report this as a bug" for finding in findings)


@pytest.mark.parametrize("value", [0.0, -0.5, np.nan, np.inf])
def test_scales_that_are_none(files: dict[str, onnx.ModelProto], value: float) -> None:
    name = "pre_hooks.layer2/1/conv2/conv2d/0__1.0"
    for target, model in files.items():
        scale = initializer(model, f"{name}.scale").copy()
        scale[3] = value
        findings = lint(edited(model, f"{name}.scale", scale), target)
        check_only(
            findings, f"{name}/DequantizeLinear", "every scale is finite and positive", "a channel may have died"
        )


def test_a_scale_that_is_computed(files: dict[str, onnx.ModelProto]) -> None:
    for target, model in files.items():
        broken = onnx.ModelProto()
        broken.CopyFrom(model)
        name = "pre_hooks.layer2/1/conv2/conv2d/0__1.0"
        node = next(node for node in broken.graph.node if node.name == f"{name}/DequantizeLinear")
        broken.graph.node.insert(0, helper.make_node("Abs", [node.input[1]], ["computed"], "abs"))
        next(node for node in broken.graph.node if node.name == f"{name}/DequantizeLinear").input[1] = "computed"
        check_only(lint(broken, target), f"{name}/DequantizeLinear", "scales are constants", "export again")


def test_a_scale_of_one_element_for_onnxruntime(files: dict[str, onnx.ModelProto]) -> None:
    scale = initializer(files["onnxruntime"], f"{INPUT}.scale")
    assert scale.ndim == 0
    findings = lint(edited(files["onnxruntime"], f"{INPUT}.scale", scale.reshape(1)), "onnxruntime")
    assert {finding.node for finding in findings} == {f"{INPUT}/QuantizeLinear", f"{INPUT}.codes/DequantizeLinear"}
    assert all("with shape [1] no Add fuses" in finding.rule for finding in findings)


def test_signed_activations_for_onnxruntime(files: dict[str, onnx.ModelProto]) -> None:
    findings = lint(edited(files["onnxruntime"], f"{INPUT}.zero_point", np.int8(0)), "onnxruntime")
    assert {finding.node for finding in findings} == {f"{INPUT}/QuantizeLinear", f"{INPUT}.codes/DequantizeLinear"}
    assert all("activations must be UINT8" in finding.rule for finding in findings)
    assert all(finding.fix == "export with `targets: [onnxruntime]`" for finding in findings)


def test_weights_that_saturate(files: dict[str, onnx.ModelProto]) -> None:
    """255 * 2 * 64 = 32,640 fits into 16 bits, 255 * 2 * 65 = 33,150 does not."""
    model, name = files["onnxruntime"], "pre_hooks.conv1/conv2d/0__1.0"
    codes = initializer(model, f"{name}.codes").copy()
    codes[0, 0, 0, 0] = -64
    assert lint(edited(model, f"{name}.codes", codes), "onnxruntime") == []
    codes[0, 0, 0, 0] = -65
    findings = lint(edited(model, f"{name}.codes", codes), "onnxruntime")
    check_only(findings, "conv1", "255 * 2 * 65 > 32767", "which limits this weight to 7 bits")
    assert lint(edited(files["tensorrt"], f"{name}.codes", codes), "tensorrt") == []


def test_a_clip_is_what_makes_full_weights_safe(files: dict[str, onnx.ModelProto]) -> None:
    model = files["onnxruntime"]
    assert np.abs(initializer(model, "pre_hooks.layer1/0/conv1/conv2d/0__1.0.codes").astype(int)).max() > 64
    findings = lint(edited(model, f"{RELU}.qmax", np.uint8(255)), "onnxruntime")
    check_only(findings, "layer1/0/conv1", "255 * 2 * ", "7 bits")


def test_a_weight_that_is_quantized_in_the_file(files: dict[str, onnx.ModelProto]) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(files["onnxruntime"])
    name = "pre_hooks.layer1/0/conv1/conv2d/0__1.0"
    node = next(node for node in broken.graph.node if node.name == f"{name}/DequantizeLinear")
    node.input[0] = "computed"
    broken.graph.node.insert(0, helper.make_node("Identity", [f"{name}.codes"], ["computed"], "identity"))
    findings = [finding for finding in lint(broken, "onnxruntime") if finding.node == "layer1/0/conv1"]
    check_only(findings, "layer1/0/conv1", "weights must be stored as integers", "export again")


def test_a_float_bias_of_the_last_layer(files: dict[str, onnx.ModelProto]) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(files["onnxruntime"])
    (gemm,) = nodes(broken, "Gemm")
    gemm.input[2] = "bias"
    broken.graph.initializer.append(numpy_helper.from_array(np.zeros(10, np.float32), "bias"))
    check_only(lint(broken, "onnxruntime"), gemm.name, "int32 bias after a DequantizeLinear", "export again")


def test_a_float_clip_before_a_quantizer(files: dict[str, onnx.ModelProto]) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(files["onnxruntime"])
    node = next(node for node in broken.graph.node if node.name == f"{RELU}/QuantizeLinear")
    index = list(broken.graph.node).index(node)
    broken.graph.node.insert(index, helper.make_node("Clip", [node.input[0], "low", "high"], ["clipped"], "relu6"))
    broken.graph.node[index + 1].input[0] = "clipped"
    for name, value in (("low", 0.0), ("high", 6.0)):
        broken.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
    check_only(lint(broken, "onnxruntime"), "relu6", "keeps its Conv in float", "export again")
    assert lint(files["tensorrt"], "tensorrt") == []
