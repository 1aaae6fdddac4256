"""Checks a delivered file against its target's rules. A finding names the node, the rule and the fix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from crqat.core import targets as runtimes
from crqat.export.graph.data_movement import ON_CODES
from crqat.export.graph.macs import file_macs
from crqat.export.graph.onnx_graph import LAYERS
from crqat.export.graph.record import DOMAIN

# TensorRT moves a DequantizeLinear from before these to after them.
_COMMUTING = {*ON_CODES, "Concat"}


@dataclass(frozen=True)
class Finding:
    """A rule that a node of a file breaks.

    Attributes:
        node: Name of the node.
        rule: The rule, and the consequence of breaking it.
        fix: How to fix it.
    """

    node: str
    rule: str
    fix: str

    def __str__(self) -> str:
        return f"{self.node}: {self.rule}; {self.fix}"


def lint(model: onnx.ModelProto, target: str) -> list[Finding]:
    """Return a file's violations of a target's rules.

    Args:
        model: The file's model; its initializers should be inside the file.
        target: Name of a runtime, or "float" or "float16".
    """
    view = _View(model)
    findings = [
        Finding(tensor.name, "weights are inside the file", "export again; external data is not used")
        for tensor in model.graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
    ]
    if findings:
        return findings  # the other rules need values, which lie in other files
    findings += _common(view)
    rules = runtimes.find(target)
    if rules is not None:
        findings += [
            Finding(node.name, broken.rule, broken.fix)
            for node, plain in _described(view)
            for broken in rules.rules(plain)
        ]
    return findings


class _View:
    """Finds the tensors of a model, and the nodes that compute or read them, by tensor name."""

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


def _described(view: _View) -> Iterator[tuple[onnx.NodeProto, runtimes.Node]]:
    for node in view.qdq():
        yield node, _quantize_node(view, node)
    for node in view.nodes:
        if node.op_type in LAYERS:
            yield node, _layer_node(view, node)
        elif node.op_type == "Clip":
            yield node, runtimes.ClipNode(_float_clip_before_quantizer(view, node))


def _quantize_node(view: _View, node: onnx.NodeProto) -> runtimes.Node:
    zero_point = view.zero_point(node)
    return runtimes.QuantizeNode(
        of_constant=node.input[0] in view.tensors,
        zero_point_type=None if zero_point is None else TensorProto.DataType.Name(zero_point.data_type),
        zero_point_is_zero=zero_point is None or not view.array(zero_point.name).any(),
        scalar_scale=view.array(node.input[1]).ndim == 0 if node.input[1] in view.tensors else None,
    )


def _layer_node(view: _View, node: onnx.NodeProto) -> runtimes.Node:
    input_quantized, weight_quantized = _quantized_operands(view, node)
    constant_bias = len(node.input) > 2 and node.input[2] in view.tensors
    plain = runtimes.LayerNode(node.op_type, input_quantized, weight_quantized, constant_bias=constant_bias)
    x, w = view.producer.get(node.input[0]), view.producer.get(node.input[1])
    if x is None or w is None or x.op_type != "DequantizeLinear" or w.op_type != "DequantizeLinear":
        return plain
    if w.input[0] not in view.tensors:
        return replace(plain, stored_as_codes=False)
    weight = view.array(w.input[0]).astype(np.int64)
    group = next((a.i for a in node.attribute if a.name == "group"), 1)
    return replace(
        plain,
        stored_as_codes=True,
        largest_input=_largest_code(view, x.input[0]),
        largest_weight=int(np.abs(weight).max(initial=0)),
        depthwise=node.op_type == "Conv" and runtimes.is_depthwise(weight.shape, group),
    )


def _quantized_operands(view: _View, node: onnx.NodeProto) -> list[bool]:
    quantized = []
    for name in node.input[:2]:
        source = view.producer.get(name)
        while source is not None and source.op_type in _COMMUTING:
            source = view.producer.get(source.input[0])
        quantized.append(source is not None and source.op_type == "DequantizeLinear")
    return quantized


def left_in_float(model: onnx.ModelProto) -> dict[str, str]:
    """Return the operands of each layer and MatMul that have no quantizer: node name to "input", "weight" or both.

    A runtime is not expected to compute these nodes in integers. The operands of a MatMul are called first and second.
    """
    view, result = _View(model), {}
    for node in view.nodes:
        if node.op_type in {*LAYERS, "MatMul"}:
            kinds = ("first", "second") if node.op_type == "MatMul" else ("input", "weight")
            quantized = _quantized_operands(view, node)
            missing = [kind for kind, there in zip(kinds, quantized, strict=True) if not there]
            if missing:
                result[node.name] = " and ".join(missing)
    return result


def int8_share(model: onnx.ModelProto) -> float | None:
    """Return the share of multiply-accumulates with two quantized operands, which a runtime can compute in INT8.

    Returns:
        The share in 0..1; None if a size that the count needs is unknown, as with dynamic image sizes.
    """
    amounts = file_macs(model)
    if not amounts:
        return None
    return 1.0 - sum(amounts[name] for name in left_in_float(model)) / sum(amounts.values())


def _largest_code(view: _View, name: str) -> int:
    """Return the largest code that a tensor can hold: the bound of its integer Clip, otherwise that of its type."""
    node = view.producer.get(name)
    while node is not None and node.op_type not in {"Clip", "QuantizeLinear"}:
        node = view.producer.get(node.input[0])
    bounded = node is not None and node.op_type == "Clip" and len(node.input) > 2 and node.input[2] in view.tensors
    return int(view.array(node.input[2])) if node is not None and bounded else 255


def _float_clip_before_quantizer(view: _View, node: onnx.NodeProto) -> bool:
    if len(node.input) < 2 or node.input[1] not in view.tensors:
        return False
    is_float = view.tensors[node.input[1]].data_type in (TensorProto.FLOAT, TensorProto.FLOAT16)
    source = view.producer.get(node.input[0])
    if source is None or source.op_type not in {*LAYERS, "Add", "Relu"}:
        return False  # the network's own clamp of dequantized codes, or of values that stay float anyway
    readers = view.readers.get(node.output[0], [])
    return is_float and any(reader.op_type == "QuantizeLinear" for reader in readers)
