"""Converts a float32 file to float16, using ONNX's schemas for the types of each operation.

Input and output stay float32. The image also stays float32 up to its quantizer or the first layer with weights, because
rounding it to float16 first would change codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, defs, helper, numpy_helper

from crqat.export.graph.onnx_graph import OPSET, Graph, build_model

# QuantizeLinear accepts float16 scales from opset 19 on.
OPSET_FLOAT16 = 19
_MULTIPLIES = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum"}
_LARGEST, _SMALLEST = 65504.0, 2.0**-24


def float16_model(
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, npt.NDArray[Any]],
    graph: Graph,
    metadata: Mapping[str, str],
) -> onnx.ModelProto:
    """Return a checked model in float16.

    Args:
        nodes: Nodes of a float32 file, in topological order. They are not changed.
        constants: Constants of the file by name.
        graph: Graph that has the shapes of input and output.
        metadata: Content of the file's metadata_props.
    """
    nodes, constants = for_opset(nodes, constants, OPSET, OPSET_FLOAT16)
    model = build_model(nodes, constants, graph, {}, OPSET_FLOAT16)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    kinds = {
        value.name: value.type.tensor_type.elem_type
        for value in [*inferred.input, *inferred.value_info, *inferred.output]
    }
    converter = _Converter(constants, {name for name, kind in kinds.items() if kind == TensorProto.FLOAT})
    for node in nodes:
        converter.convert(node)
    return build_model(converter.nodes, converter.constants, graph, dict(metadata), OPSET_FLOAT16)


def as_float16(value: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Round a constant to float16.

    Finite values stay finite. A constant of one element that is not 0 does not become 0, because it may be a divisor.
    """
    value = np.where(np.isfinite(value), np.clip(value, -_LARGEST, _LARGEST), value)
    if value.size == 1:
        value = np.where((value != 0) & (np.abs(value) < _SMALLEST), np.copysign(_SMALLEST, value), value)
    return np.asarray(value.astype(np.float16))


def for_opset(
    nodes: Sequence[onnx.NodeProto], constants: Mapping[str, npt.NDArray[Any]], old: int, new: int
) -> tuple[list[onnx.NodeProto], dict[str, npt.NDArray[Any]]]:
    """Return copies of nodes in the form of a later opset, in which some attributes have become inputs."""
    result, constants = [], dict(constants)
    for node in nodes:
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        result.append(copied)
        schema = defs.get_schema(node.op_type, new, node.domain)
        if schema.since_version <= old:
            continue
        places = [formal.name for formal in schema.inputs]
        for attribute in list(copied.attribute):
            if attribute.name in schema.attributes or attribute.name not in places:
                continue
            name = f"{node.output[0]}.{attribute.name}"
            constants[name] = np.asarray(helper.get_attribute_value(attribute), np.int64)
            place = places.index(attribute.name)
            copied.input.extend([""] * (place - len(copied.input)))
            copied.input.insert(place, name)
            copied.attribute.remove(attribute)
        if node.op_type == "Split" and len([name for name in node.input if name]) == 1:
            copied.attribute.append(helper.make_attribute("num_outputs", len(node.output)))
    return result, constants


class _Converter:
    """Converts one node after another to float16.

    Attributes:
        nodes: Converted nodes.
        constants: Converted constants by name.
    """

    def __init__(self, constants: Mapping[str, npt.NDArray[Any]], floats: set[str]) -> None:
        self.source = constants
        # Tensors that are float32 in the source; and those that stay float32 because they hold the image's own values.
        self.floats, self.single = floats, {"input"}
        self.nodes: list[onnx.NodeProto] = []
        self.constants = {name: value for name, value in constants.items() if value.dtype != np.float32}
        self.made: set[str] = set()

    def convert(self, node: onnx.NodeProto) -> None:
        """Append a node in float16 if its operation supports that, otherwise in float32 between casts."""
        schema = defs.get_schema(node.op_type, OPSET_FLOAT16, node.domain)
        inputs, outputs = (_types(names, formal) for names, formal in ((node.input, schema.inputs),
                                                                       (node.output, schema.outputs)))  # fmt: skip
        takes_half = {
            variable.type_param_str: "tensor(float16)" in variable.allowed_type_strs
            for variable in schema.type_constraints
        }
        read = [name for name in node.input if self._computed(name)]
        of_the_image = bool(read) and self.single.issuperset(read) and node.op_type not in _MULTIPLIES
        half = {
            kind: takes_half.get(kind, False) and not (of_the_image and kind in inputs) for kind in (*inputs, *outputs)
        }
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        copied.input[:] = [self._read(name, half[kind]) for name, kind in zip(node.input, inputs, strict=True)]
        _type_attributes(copied)
        self.nodes.append(copied)
        for index, (name, kind) in enumerate(zip(node.output, outputs, strict=True)):
            if name not in self.floats:
                continue
            if half[kind]:
                if name == "logits":
                    copied.output[index] = "logits.float16"
                    self._cast("logits.float16", name, TensorProto.FLOAT)
            elif name == "logits" or (of_the_image and takes_half.get(kind, False)):
                self.single.add(name)
            else:  # it supports float32 only
                copied.output[index] = f"{name}.float32"
                self._cast(f"{name}.float32", name, TensorProto.FLOAT16)

    def _computed(self, name: str) -> bool:
        """Whether a tensor holds computed float values."""
        return name in self.floats and name not in self.source

    def _read(self, name: str, half: bool) -> str:
        """Return the name under which a tensor exists in the requested type."""
        value = self.source.get(name)
        if value is not None:
            if value.dtype != np.float32:
                return name
            stored = name if half else f"{name}.float32"
            self.constants[stored] = as_float16(value) if half else value
            return stored
        if not name or name not in self.floats or half != (name in self.single):
            return name
        other = f"{name}.float16" if half else f"{name}.float32"
        if other not in self.made:
            self._cast(name, other, TensorProto.FLOAT16 if half else TensorProto.FLOAT)
        return other

    def _cast(self, source: str, result: str, kind: int) -> None:
        base = source if result.startswith(source) else result
        self.made.update((source, result))
        self.nodes.append(helper.make_node("Cast", [source], [result], f"{base}/Cast", to=kind))


def _types(names: Sequence[str], formal: Sequence[Any]) -> list[str]:
    """Return the type variable or fixed type, such as "T", of each input or output of a node.

    Args:
        names: The node's inputs or outputs.
        formal: Inputs or outputs in the operation's schema; the last one also describes all further `names`.
    """
    return [formal[min(index, len(formal) - 1)].type_str for index in range(len(names))]


def _type_attributes(node: onnx.NodeProto) -> None:
    """Convert attributes that determine a node's output type: `to`, `dtype`, and the tensor `value`."""
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
        if attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(numpy_helper.from_array(as_float16(numpy_helper.to_array(attribute.t))))
