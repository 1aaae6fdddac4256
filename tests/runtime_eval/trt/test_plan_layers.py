from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crqat.runtime_eval.trt.plan_layers import Layer, from_inspector, from_log
from tests.needs import missing

NHWC = "Format: (NHWC) Channel major format"


def tensor(name: str, dimensions: str, datatype: str) -> str:
    """A tensor as the builder's log writes it."""
    sizes = dimensions.count(",") + 1
    strides, order = ",".join("1" * sizes), ",".join(map(str, range(sizes)))
    return (
        f"{{ Name: {name}, Dimensions: [{dimensions}], Strides: [{strides}], StrideOrder: [{order}], "
        f"Datatype: {datatype}, {NHWC} }}"
    )


def line(name: str, kind: str, inputs: str = "", constants: str = "", outputs: str = "", rest: str = "") -> str:
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [{inputs}], Constants: [{constants}], Outputs: [{outputs}], "
        f"TacticName: __myelin_CASK_STUB, StreamId: 0{rest or ', Metadata: '}"
    )


def one(text: str) -> Layer:
    layers, unread = from_log([text])
    assert unread == []
    (layer,) = layers
    return layer


CONV_SCALES = ", ".join(tensor(f"__mye{n}dconst_myl0", "1,64,1,1", "Float") for n in range(2))


def test_a_convolution_of_a_real_log() -> None:
    layer = one(
        line(
            "/layer1/layer1.0/conv1/Conv_myl0_4",
            "correlation",
            f" {tensor('__myln_k_arg__bb1_5_myl0', '1,64,56,56', 'Int8')}",
            f" {tensor('__mye5762dconst_myl0', '64,64,3,3', 'Int8')}, {CONV_SCALES}",
            f" {tensor('__myln_k_arg__bb1_6_myl0', '1,64,56,56', 'Float')}",
            ", Metadata: [ONNX Layer: /layer1/layer1.0/conv1/Conv][ONNX Layer: x_DQ]"
            "[ONNX Layer: layer1.0.conv1.weight_DQ]",
        )
    )
    assert layer == Layer(
        "/layer1/layer1.0/conv1/Conv_myl0_4",
        "matmul",
        "correlation",
        ("Int8",),
        ("Float",),
        "Int8",
        ("/layer1/layer1.0/conv1/Conv", "x_DQ", "layer1.0.conv1.weight_DQ"),
    )
    assert layer.int8


@pytest.mark.parametrize(
    ("inputs", "constants", "weights"),
    [
        # A Gemm's constants may be scalars, with the weights among the inputs.
        ((("x", "1,64", "Int8"), ("w", "64,10", "Int8")), (("alpha", "1", "Float"), ("beta", "1", "Float")), "Int8"),
        # A scale for each channel is no weight, though it has as many dimensions.
        ((("x", "1,64,8,8", "Int8"), ("w", "64,64,3,3", "Int8")), (("s", "1,64,1,1", "Float"),), "Int8"),
        # Where a constant can be the weight, a large input is something that is added.
        ((("x", "1,64,8,8", "Int8"), ("skip", "9,64,8,8", "Half")), (("w", "64,64,1,1", "Int8"),), "Int8"),
        # One output channel: the weight has a single dimension other than 1, as a scale has.
        ((("x", "1,64,8,8", "Int8"),), (("s", "1,1,1,1", "Float"), ("w", "1,64,1,1", "Int8")), "Int8"),
        ((("x", "1,64,8,8", "Int8"),), (("w", "64,64,3,3", "Half"), ("s", "1,64,1,1", "Int8")), "Half"),
        ((("x", "-1,64,8,8", "Int8"),), (), None),
    ],
)
def test_the_weight_is_told_from_scales_and_sums(
    inputs: tuple[tuple[str, str, str], ...], constants: tuple[tuple[str, str, str], ...], weights: str | None
) -> None:
    texts = (", ".join(tensor(*one_tensor) for one_tensor in some) for some in (inputs, constants))
    layer = one(line("gemm_myl0_1", "gemm", *texts))
    assert layer.weights == weights
    assert layer.int8 == (weights == "Int8")


@pytest.mark.parametrize(("activation", "weight"), [("Float", "Int8"), ("Int8", "Float"), ("Half", "Half")])
def test_both_operands_must_be_int8(activation: str, weight: str) -> None:
    layer = one(line("c", "correlation", tensor("x", "1,8,4,4", activation), tensor("w", "8,8,3,3", weight)))
    assert not layer.int8


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("__myl_MulCastAddReluMulMinMaxRounCast_myl0_2", "kgen", "pointwise"),
        ("__myl_Tran_myl0_0", "kgen", "reformat"),
        ("__myl_Cast_myl0_0", "kgen", "reformat"),
        ("__myl_SlicSlicReplConc_myl0_9", "kgen", "copy"),
        ("__myl_CastMulMeanEtc_myl0_38", "kgen", "pointwise"),
        ("__mye3112_pooling_myl0_5", "maxpool", "pooling"),
        ("__myl_Fc_myl0_3", "runtime_fusion", "opaque"),
        ("__mye6475_myl0_12", "signal", "sync"),
        ("shape", "shape_call", "shape"),
        ("new", "never_seen", "other"),
    ],
)
def test_kinds(name: str, kind: str, expected: str) -> None:
    assert one(line(name, kind)).kind == expected


def test_events_and_names_with_the_log_s_own_punctuation() -> None:
    assert one(line("__mye6475_myl0_12", "signal", rest=", EventId: 1, Metadata: ")).nodes == ()
    odd = one(
        line(
            "a, b [c]_myl0_1",
            "correlation",
            tensor("x{1}, y", "1,8,4,4", "Int8"),
            tensor("w", "8,8,3,3", "Int8"),
            rest=", Metadata: [ONNX Layer: a[0]/conv, 1][ONNX Layer: b]",
        )
    )
    assert (odd.name, odd.nodes, odd.int8) == ("a, b [c]_myl0_1", ("a[0]/conv, 1", "b"), True)


def test_other_lines_are_passed_over_and_a_plan_line_that_is_not_understood_is_kept() -> None:
    broken = "Name: x, LayerType: correlation, Something: new"
    layers, unread = from_log(
        ["Parsing node: Name: x", f"Engine:\n{line('a', 'kgen')}\n  {line('b', 'kgen')}\n{broken}"]
    )
    assert [layer.name for layer in layers] == ["a", "b"]
    assert unread == [broken]


@pytest.fixture(scope="module")
def published(shared_data: Path) -> Callable[[str], list[Layer]]:
    """Layers of NVIDIA's ResNet-18 engines (TensorRT 8, A100, batch 32), by the engine's name."""
    root = shared_data / "trt-engine-explorer" / "resnet18-A100"
    if not root.is_dir():
        missing("shared", f"no folder {root}")

    def of(name: str) -> list[Layer]:
        (path,) = (root / name).glob("*.graph.json")
        return from_inspector(json.loads(path.read_text()))

    return of


@pytest.mark.parametrize(
    ("name", "layers", "matmuls", "int8", "reformats", "copies"),
    [
        ("fp32", 32, 21, 0, 1, 8),
        ("fp16", 36, 21, 0, 2, 11),
        ("qat", 37, 21, 21, 12, 2),
        ("qat-residual", 26, 21, 21, 3, 1),
        ("qat-residual-qgap", 24, 21, 21, 1, 1),
    ],
)
def test_published_engines(
    published: Callable[[str], list[Layer]],
    name: str,
    layers: int,
    matmuls: int,
    int8: int,
    reformats: int,
    copies: int,
) -> None:
    found = published(name)
    kinds = Counter(layer.kind for layer in found)
    assert (len(found), kinds["matmul"], kinds["reformat"], kinds["copy"]) == (layers, matmuls, reformats, copies)
    assert kinds["other"] == 0
    assert sum(layer.int8 for layer in found) == int8
    precision = {"fp32": "Float", "fp16": "Half"}.get(name, "Int8")
    assert {layer.weights for layer in found if layer.kind == "matmul"} == {precision}
    assert {datatype for layer in found for datatype in layer.inputs + layer.outputs} <= {"Int8", "Half", "Float"}


def test_a_published_layer(published: Callable[[str], list[Layer]]) -> None:
    fused = next(layer for layer in published("qat-residual") if "Add_219" in layer.nodes)
    assert fused.nodes == ("layer3.1.conv2.weight", "QuantizeLinear_209", "Conv_211", "Add_219", "Relu_220")
    assert (fused.inputs, fused.outputs, fused.type) == (("Int8", "Int8"), ("Int8",), "CaskConvolution")
    moved = next(layer for layer in published("fp16") if layer.name.startswith("Reformatting CopyNode for Input"))
    assert (moved.kind, moved.nodes) == ("reformat", ())


# Made by hand from NVIDIA's description of the layout; no engine wrote it.
LAYOUT_B: dict[str, Any] = {
    "Layers": [
        {
            "Name": "conv1_myl0_1",
            "LayerType": "correlation",
            "Inputs": [{"Name": "x", "Dimensions": [1, 4, 32, 32], "Datatype": "Int8", "Format": NHWC}],
            "Constants": [
                {"Name": "w", "Dimensions": [16, 4, 3, 3], "Datatype": "Int8", "Format": NHWC},
                {"Name": "s", "Dimensions": [1, 16, 1, 1], "Datatype": "Float", "Format": NHWC},
            ],
            "Outputs": [{"Name": "y", "Dimensions": [1, 16, 32, 32], "Datatype": "Half", "Format": NHWC}],
            "TacticName": "__myelin_CASK_STUB",
            "StreamId": 0,
            "Metadata": "[ONNX Layer: conv1]\x1e[ONNX Layer: conv1.weight_DQ]",
        },
        {"Name": "__myl_Tran_myl0_2", "LayerType": "kgen", "Inputs": [], "Outputs": [], "Metadata": ""},
        {"Name": "{ForeignNode[fc.weight...Gemm_9]}", "LayerType": "Myelin", "Inputs": [], "Outputs": []},
    ],
    "Bindings": ["x", "y"],
}
# The same for 11.x.
LAYOUT_C: dict[str, Any] = {
    "Layers": [
        {
            "Name": "conv1",
            "LayerType": "CaskConvolution",
            "ParameterType": "Convolution",
            "Inputs": [{"Name": "x", "Dimensions": [1, 4, 32, 32], "DataType": "Int8", "Format": "kCHW32"}],
            "Outputs": [{"Name": "y", "Dimensions": [1, 16, 32, 32], "DataType": "Float", "Format": "kLINEAR"}],
            "TacticName": "sm87_xmma_fprop_implicit_gemm_i8i8_i8i32_f32_nhwckrsc",
            "Metadata": "[ONNX Layer: conv1]",
        },
        {"Name": "pool + relu [profile 1]", "LayerType": "CaskPooling", "ParameterType": "Pooling"},
    ],
    "I/O Tensors": [{"Name": "x", "IOMode": "Input", "DataType": "Float", "Dimensions": [1, 3, 32, 32]}],
}


def test_the_later_layouts_by_their_description() -> None:
    conv, moved, opaque = from_inspector(LAYOUT_B)
    assert (conv.nodes, conv.inputs, conv.outputs, conv.int8) == (
        ("conv1", "conv1.weight_DQ"),
        ("Int8",),
        ("Half",),
        True,
    )
    assert (moved.kind, opaque.kind, opaque.int8) == ("reformat", "opaque", False)
    conv, pool = from_inspector(LAYOUT_C)
    assert (conv.kind, conv.weights, conv.int8) == ("matmul", "Int8", True)  # by its kernel's name
    assert (pool.kind, pool.nodes, pool.inputs) == ("pooling", ("pool", "relu"), ())


def test_an_engine_that_only_names_its_layers() -> None:
    named = from_inspector({"Layers": ["conv1.weight + Conv_9 [profile 0]"], "Bindings": []})
    assert named == [
        Layer("conv1.weight + Conv_9 [profile 0]", "other", "unknown", (), (), None, ("conv1.weight", "Conv_9"))
    ]
    nonsense: list[dict[str, Any]] = [{}, {"Layers": {}}]
    for wrong in nonsense:
        with pytest.raises(ValueError, match="not the JSON of an engine inspector"):
            from_inspector(wrong)
