"""Parses the layers of a TensorRT engine from the builder's verbose log or the engine inspector's JSON.

The log's plan lines are the only source on a machine without a GPU, where an engine is built but cannot be loaded. The
inspector's JSON has had three layouts: one key "Format/Datatype" (8.x, 10.x), separate keys (late 10.x), and "I/O
Tensors" instead of "Bindings" (11.x). The code for the first was tested on engines that NVIDIA published.
The code for the other two was written from descriptions of the layouts and has not been tested on an engine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["matmul", "pointwise", "pooling", "reformat", "copy", "opaque", "sync", "shape", "other"]
INT8 = "Int8"

_LINE = re.compile(
    r"\s*Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[(?P<constants>.*?)\], Outputs: \[(?P<outputs>.*?)\], "
    r"TacticName: (?P<tactic>.*?), StreamId: \d+(?:, EventId: \d+)?, Metadata: ?(?P<nodes>.*)"
)
_TENSOR = re.compile(r"\{ Name: .*?, Dimensions: \[(?P<dimensions>[^\]]*)\], Strides: .*?Datatype: (?P<type>[^,}]+?), ")
_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=\[|$|[\x1e\x1f])")
_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("correlation", "conv", "convolution", "convactpool", "deconvolution"), "matmul"),
    **dict.fromkeys(("gemm", "matmul", "batch_gemm", "bmm", "matrixmultiply", "fullyconnected"), "matmul"),
    **dict.fromkeys(("kgen", "pointwise", "pointwisev2", "elementwise", "activation", "scale"), "pointwise"),
    **dict.fromkeys(("maxpool", "avgpool", "pooling"), "pooling"),
    **dict.fromkeys(("signal", "wait"), "sync"),
    **dict.fromkeys(("shape", "shape_call"), "shape"),
    **dict.fromkeys(("noop", "copy", "slice", "concat"), "copy"),
    **dict.fromkeys(("runtime_fusion", "myelin", "foreignnode"), "opaque"),
    "reformat": "reformat",
}
# A generated kernel is named by its operations. A kernel with only these operations computes nothing.
_LAYOUT = {"Tran", "Cast"}
_MOVEMENT = _LAYOUT | {"Slic", "Conc", "Repl", "Resh", "Copy", "Move"}
# Parts of the names of kernels that multiply INT8 by INT8.
_INT8_TACTIC = re.compile(r"i8i8|int8|imma", re.IGNORECASE)
_FORMATS = (("Int8", INT8), ("INT8", INT8), ("FP16", "Half"), ("FP32", "Float"), ("BF16", "BFloat16"), ("FP8", "FP8"),
            ("Int32", "Int32"), ("INT32", "Int32"), ("Bool", "Bool"))  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One layer of an engine.

    Attributes:
        name: Name of the layer in the engine.
        kind: "matmul" for Conv and Gemm, which coverage counts; "opaque" for a layer that fuses operations and does not
            report how it computes them; `Kind` lists the others.
        type: Layer type in the engine's own words.
        inputs: Precision of each input in the engine's spelling: Int8, Half, Float.
        outputs: Precision of each output, in the engine's spelling.
        weights: Precision of a matmul's second operand; None if there is none or it is not reported.
        nodes: Names of the ONNX nodes that the layer came from, if the engine reports them.
    """

    name: str
    kind: Kind
    type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: str | None
    nodes: tuple[str, ...]

    @property
    def int8(self) -> bool:
        """Whether the layer multiplies INT8 by INT8; its output may be of another type."""
        return self.kind == "matmul" and self.weights == INT8 and self.inputs[:1] == (INT8,)


@dataclass(frozen=True)
class _Tensor:
    dimensions: tuple[int, ...]
    type: str

    @property
    def wide(self) -> bool:
        """Whether at least two dimensions are not 1, as in an operand of a matmul.

        At most one dimension of a scale or a bias is not 1.
        """
        return sum(abs(size) != 1 for size in self.dimensions) >= 2

    @property
    def elements(self) -> int:
        product = 1
        for size in self.dimensions:
            product *= abs(size)
        return product


def from_log(messages: Sequence[str]) -> tuple[list[Layer], list[str]]:
    """Return the layers in the plan of a verbose log, and the lines of the plan that could not be parsed, if any."""
    layers, unread = [], []
    for message in messages:
        for line in message.splitlines():
            if not line.lstrip().startswith("Name: ") or ", LayerType: " not in line:
                continue
            match = _LINE.fullmatch(line)
            if match is None:
                unread.append(line)
            else:
                layers.append(_from_line(match))
    return layers, unread


def _from_line(match: re.Match[str]) -> Layer:
    inputs, constants, outputs = (_tensors(match[part]) for part in ("inputs", "constants", "outputs"))
    kind = _kind(match["type"])
    if kind == "pointwise":
        kind = _kind_of_generated(match["name"])
    return Layer(
        match["name"],
        kind,
        match["type"],
        tuple(tensor.type for tensor in inputs),
        tuple(tensor.type for tensor in outputs),
        _weights(inputs, constants) if kind == "matmul" else None,
        tuple(_NODE.findall(match["nodes"])),
    )


def _tensors(text: str) -> list[_Tensor]:
    return [
        _Tensor(tuple(int(size) for size in found["dimensions"].split(",") if size), found["type"])
        for found in _TENSOR.finditer(text)
    ]


def _kind(kind: str) -> Kind:
    return _KINDS.get(kind.lower(), "other")


def _kind_of_generated(name: str) -> Kind:
    words = set(re.findall("[A-Z][a-z]*", re.sub(r"^__myl_|_myl\d+_\d+$", "", name)))
    if words and words <= _LAYOUT:
        return "reformat"
    return "copy" if words and words <= _MOVEMENT else "pointwise"


def _weights(inputs: Sequence[_Tensor], constants: Sequence[_Tensor]) -> str | None:
    """Return the data type of a matmul's weights, its second operand; None if it has none.

    The weights are a constant, or an input if they are given at run time.
    """
    for candidates in (constants, inputs[1:]):
        wide = [tensor for tensor in candidates if tensor.wide]
        if wide:
            return max(wide, key=lambda tensor: tensor.elements).type
    # With a single output channel one dimension is left, which still has more elements than the scalars next to it.
    rest = [tensor for tensor in (*constants, *inputs[1:]) if tensor.elements > 1]
    return max(rest, key=lambda tensor: tensor.elements).type if rest else None


def from_inspector(information: Mapping[str, Any]) -> list[Layer]:
    """Return the layers that the engine inspector's JSON describes, in any of the layouts that TensorRT has used.

    An engine built without detailed profiling verbosity reports only the names of its layers.

    Raises:
        ValueError: The JSON has no list of layers.
    """
    layers = information.get("Layers")
    if not isinstance(layers, list):
        msg = "no list `Layers`: not the JSON of an engine inspector"
        raise ValueError(msg)
    return [_from_entry(entry) if isinstance(entry, dict) else _named(str(entry)) for entry in layers]


def _named(name: str) -> Layer:
    return Layer(name, "other", "unknown", (), (), None, _nodes_of_name(name))


def _from_entry(entry: Mapping[str, Any]) -> Layer:
    name, layer_type = str(entry.get("Name", "")), str(entry.get("LayerType", "unknown"))
    kind = _kind(layer_type)
    if kind == "other":
        # The name is a kernel library's (CaskConvolution); the parameters' type gives the operation.
        kind = _kind(str(entry.get("ParameterType", "")))
    if kind == "other" and "ForeignNode" in name:
        kind = "opaque"
    if kind == "pointwise" and name.startswith("__myl_"):
        kind = _kind_of_generated(name)
    inputs, outputs = (tuple(_datatype(tensor) for tensor in entry.get(key, [])) for key in ("Inputs", "Outputs"))
    metadata = _NODE.findall(str(entry.get("Metadata") or ""))
    moved = kind in ("reformat", "copy") and not metadata
    return Layer(
        name,
        kind,
        layer_type,
        inputs,
        outputs,
        _weights_of_entry(entry) if kind == "matmul" else None,
        tuple(metadata) or (() if moved else _nodes_of_name(name)),
    )


def _nodes_of_name(name: str) -> tuple[str, ...]:
    """Return the ONNX node names that a fused layer's name joins by " + ", without a final "[profile 1]"."""
    return tuple(part.strip() for part in re.sub(r" ?\[profile \d+\]$", "", name).split(" + ") if part.strip())


def _datatype(tensor: Mapping[str, Any]) -> str:
    for key in ("Datatype", "DataType"):
        if key in tensor:
            return str(tensor[key])
    text = str(tensor.get("Format/Datatype", "unknown"))
    return next((datatype for word, datatype in _FORMATS if word in text), text)


def _weights_of_entry(entry: Mapping[str, Any]) -> str | None:
    for key in ("Weights", "ConvWeights"):
        if isinstance(entry.get(key), dict) and "Type" in entry[key]:
            return str(entry[key]["Type"])
    if _INT8_TACTIC.search(str(entry.get("TacticName", ""))):
        return INT8
    tensors = [
        [_Tensor(tuple(tensor.get("Dimensions", ())), _datatype(tensor)) for tensor in entry.get(key, [])]
        for key in ("Inputs", "Constants")
    ]
    return _weights(*tensors)
