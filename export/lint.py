"""The targets' rules, checked on the file that ships. A finding names the node, the rule and the fix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from crqat_train.layout import INT16_MAX
from export.trace import DOMAIN

# TensorRT moves a DequantizeLinear behind these.
COMMUTING = {"MaxPool", "Flatten", "Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Pad", "Concat",
             "Gather"}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One broken rule.

    Attributes:
        node: Name of the node.
        rule: What must hold, and what happens if it does not.
        fix: What to do.
    """

    node: str
    rule: str
    fix: str

    def __str__(self) -> str:
        return f"{self.node}: {self.rule}; {self.fix}"


def lint(model: onnx.ModelProto, target: str) -> list[Finding]:
    """Check a file against a target's rules.

    Args:
        model: With its initializers inside.
        target: "float", "float16", "onnxruntime" or "tensorrt".
    """
    view = _View(model)
    findings = [
        Finding(tensor.name, "weights are inside the file", "export again; external data is not used")
        for tensor in model.graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
    ]
    if findings:
        return findings  # the other rules look at values, and these are somewhere else
    findings += _common(view)
    if target == "tensorrt":
        findings += _tensorrt(view)
    if target == "onnxruntime":
        findings += _onnxruntime(view)
    return findings


class _View:
    """Look-ups over a model."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producer = {output: node for node in self.nodes for output in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def array(self, name: str) -> npt.NDArray[Any]:
        return numpy_helper.to_array(self.tensors[name])

    def zero_point(self, node: onnx.NodeProto) -> onnx.TensorProto | None:
        return self.tensors.get(node.input[2]) if len(node.input) > 2 else None

    def qdq(self) -> Iterator[onnx.NodeProto]:
        return (node for node in self.nodes if node.op_type in {"QuantizeLinear", "DequantizeLinear"})


def _common(view: _View) -> Iterator[Finding]:
    for node in view.nodes:
        if node.domain not in ("", "ai.onnx"):
            yield Finding(node.name, f"only standard operations ({node.domain}.{node.op_type})", "report this as a bug")
        if node.domain == DOMAIN:
            yield Finding(node.name, "no marker is left", "report this as a bug")
    for node in view.qdq():
        if node.input[1] not in view.tensors:
            yield Finding(node.name, "scales are constants", "export again")
            continue
        scale = view.array(node.input[1]).astype(np.float64)
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            yield Finding(node.name, "every scale is finite and positive", "train again; a channel may have died")


def _tensorrt(view: _View) -> Iterator[Finding]:
    for node in view.qdq():
        zero_point = view.zero_point(node)
        if zero_point is None or zero_point.data_type != TensorProto.INT8:
            kind = "none" if zero_point is None else TensorProto.DataType.Name(zero_point.data_type)
            yield Finding(
                node.name,
                f"TensorRT's INT8 is signed; it reads {kind} with the same scale and clips half of the range",
                "export with `targets: [tensorrt]`",
            )
        elif view.array(zero_point.name).any():
            yield Finding(node.name, "TensorRT refuses a zero point other than 0", "export with `targets: [tensorrt]`")
    for node in view.nodes:
        if node.op_type in {"Conv", "Gemm"}:
            yield from _left_in_float(view, node)


def _left_in_float(view: _View, node: onnx.NodeProto) -> Iterator[Finding]:
    """TensorRT multiplies in INT8 where both operands come out of a DequantizeLinear.

    Where neither does, the layout wants the layer in float, as NNCF does in squeeze-and-excitation; the gate's
    `min_int8_coverage` weighs that.
    """
    quantized = _quantized_operands(view, node)
    if quantized in ([True, False], [False, True]):
        missing, there = ("weight", "input") if quantized[0] else ("input", "weight")
        rule = f"its {missing} is not quantized though its {there} is, so TensorRT runs it in float"
        yield Finding(node.name, rule, "quantize it, or leave tensorrt out of `export.targets`")


def _quantized_operands(view: _View, node: onnx.NodeProto) -> list[bool]:
    quantized = []
    for name in node.input[:2]:
        source = view.producer.get(name)
        while source is not None and source.op_type in COMMUTING:
            source = view.producer.get(source.input[0])
        quantized.append(source is not None and source.op_type == "DequantizeLinear")
    return quantized


def left_in_float(model: onnx.ModelProto) -> dict[str, str]:
    """Which operands of each Conv, Gemm and MatMul have no quantizer: node name to "input", "weight" or both.

    A runtime is not asked to compute these in integers. For a MatMul the operands are called first and second.
    """
    view, result = _View(model), {}
    for node in view.nodes:
        if node.op_type in {"Conv", "Gemm", "MatMul"}:
            kinds = ("first", "second") if node.op_type == "MatMul" else ("input", "weight")
            quantized = _quantized_operands(view, node)
            missing = [kind for kind, there in zip(kinds, quantized, strict=True) if not there]
            if missing:
                result[node.name] = " and ".join(missing)
    return result


def _onnxruntime(view: _View) -> Iterator[Finding]:
    for node in view.qdq():
        if node.input[1] not in view.tensors:
            continue
        weight = node.input[0] in view.tensors
        zero_point = view.zero_point(node)
        if not weight and view.array(node.input[1]).ndim:
            yield Finding(node.name, "a per-tensor scale is a scalar: with shape [1] no Add fuses", "export again")
        if not weight and (zero_point is None or zero_point.data_type != TensorProto.UINT8):
            yield Finding(
                node.name,
                "activations are UINT8: x86 kernels for signed ones are slower than float",
                "export with `targets: [onnxruntime]`",
            )
    for node in view.nodes:
        if node.op_type in {"Conv", "Gemm"}:
            yield from _saturation(view, node)
        if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2] in view.tensors:
            yield Finding(node.name, "QGemm needs an int32 bias behind a DequantizeLinear", "export again")
        if node.op_type == "Clip" and _float_clip_before_quantizer(view, node):
            yield Finding(node.name, "a float Clip before a quantizer keeps its Conv in float", "export again")


def _saturation(view: _View, node: onnx.NodeProto) -> Iterator[Finding]:
    """x86 without VNNI adds two u8*s8 products in 16 bits."""
    x, w = view.producer.get(node.input[0]), view.producer.get(node.input[1])
    if x is None or w is None or x.op_type != "DequantizeLinear" or w.op_type != "DequantizeLinear":
        return
    if w.input[0] not in view.tensors:
        yield Finding(node.name, "weights are stored as integers", "export again")
        return
    weight = view.array(w.input[0]).astype(np.int64)
    group = next((a.i for a in node.attribute if a.name == "group"), 1)
    if group == weight.shape[0] and weight.shape[1] == 1:
        return
    largest = _largest_code(view, x.input[0])
    worst = largest * 2 * int(np.abs(weight).max(initial=0))
    if worst > INT16_MAX:
        yield Finding(
            node.name,
            f"16-bit sums saturate on x86 without VNNI: {largest} * 2 * {worst // (2 * largest)} > {INT16_MAX}",
            "train with `targets: [onnxruntime]`, which limits this weight to 7 bits",
        )


def _largest_code(view: _View, name: str) -> int:
    """Upper bound of a tensor of codes: an integer Clip's, or the type's."""
    node = view.producer.get(name)
    while node is not None and node.op_type not in {"Clip", "QuantizeLinear"}:
        node = view.producer.get(node.input[0])
    bounded = node is not None and node.op_type == "Clip" and len(node.input) > 2 and node.input[2] in view.tensors
    return int(view.array(node.input[2])) if node is not None and bounded else 255


def _float_clip_before_quantizer(view: _View, node: onnx.NodeProto) -> bool:
    if len(node.input) < 2 or node.input[1] not in view.tensors:
        return False
    is_float = view.tensors[node.input[1]].data_type in (TensorProto.FLOAT, TensorProto.FLOAT16)
    readers = view.readers.get(node.output[0], [])
    return is_float and any(reader.op_type == "QuantizeLinear" for reader in readers)
