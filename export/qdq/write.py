"""Writes a target's ONNX file with QuantizeLinear and DequantizeLinear nodes, from a float graph and Grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from crqat.core import targets as runtimes
from crqat.core.errors import UsageError
from crqat.core.grid import Grid
from crqat.core.results.export import Claim
from crqat.export.graph.data_movement import moves_codes
from crqat.export.graph.onnx_graph import LAYERS, OPSET, Graph, build_model
from crqat.export.qdq.float16 import float16_model
from crqat.export.qdq.lower import Activation, Weight, clip_bound, lower_activation, lower_weight
from crqat.train.placement.quantizer_spec import QuantizerSpec

_Lowered = TypeVar("_Lowered", Activation, Weight)


@dataclass
class QDQModel:
    """ONNX model of a target, with the quantizers' parameters as they are stored in it.

    Attributes:
        model: The ONNX model.
        activations: Converted activations by edge name.
        weights: Converted weights by edge name.
        codes: Tensors that hold the codes of each activation, in the order of computation, by edge name; there are
            several if edges share a quantizer.
        float_constants: Constants of the float parts before they are rounded to the file's type.
    """

    model: onnx.ModelProto
    activations: dict[str, Activation] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    codes: dict[str, list[str]] = field(default_factory=dict)
    float_constants: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)

    def claims(self) -> dict[str, Claim]:
        """Return a `Claim` by edge name: whether the file stores the edge's trained Grid exactly, and what differs."""
        result = {edge: Claim(own.claim, own.note or None) for edge, own in self.activations.items()}
        for edge, weight in self.weights.items():
            result[edge] = Claim(weight.claim, weight.note or None, weight.bias_error)
        return result


def float_model(graph: Graph, metadata: Mapping[str, str], precision: str = "float32") -> onnx.ModelProto:
    """Return the float network with BN folded, in ONNX: the baseline for every runtime.

    Args:
        graph: Float graph with a marker node on every quantized edge; the markers are left out.
        metadata: Content of the file's metadata_props.
        precision: "float32" or "float16", the type of weights and values; input and output stay float32.
    """
    alias: dict[str, str] = {}
    nodes = []
    for node in graph.nodes:
        copied = _copy(node, [alias.get(name, name) for name in node.input])
        if node.op_type == "Edge":
            alias[node.output[0]] = copied.input[0]
        else:
            nodes.append(copied)
    if precision == "float32":
        return build_model(nodes, graph.constants, graph, dict(metadata), OPSET)
    return float16_model(nodes, graph.constants, graph, dict(metadata))


def qdq_model(
    graph: Graph,
    specs: Sequence[QuantizerSpec],
    grids: Mapping[str, Grid],
    latent: Mapping[str, npt.NDArray[np.float32]],
    target: str,
    precision: str,
    metadata: Mapping[str, str],
    weights: str = "int8",
) -> QDQModel:
    """Return a target's ONNX model with QuantizeLinear and DequantizeLinear nodes.

    Args:
        graph: Float graph with a marker node on every quantized edge.
        specs: Specs of the network's quantizers.
        grids: Trained Grids by edge name.
        latent: Unfolded float32 weights by edge name.
        target: Name of a runtime; see `crqat.core.targets`.
        precision: "float32" or "float16": the type of everything that is not INT8. Input and output stay float32.
        metadata: Content of the file's metadata_props.
        weights: "int8" or "float"; see `ExportConfig`.
    """
    return _Writer(graph, specs, grids, latent, target, precision, weights).write(metadata)


def _copy(node: onnx.NodeProto, inputs: Sequence[str]) -> onnx.NodeProto:
    copied = onnx.NodeProto()
    copied.CopyFrom(node)
    del copied.input[:]
    copied.input.extend(inputs)
    return copied


class _Writer:
    def __init__(
        self,
        graph: Graph,
        specs: Sequence[QuantizerSpec],
        grids: Mapping[str, Grid],
        latent: Mapping[str, npt.NDArray[np.float32]],
        target: str,
        precision: str,
        weights: str,
    ) -> None:
        self.graph, self.target, self.grids, self.latent, self.weights = graph, target, grids, latent, weights
        self.rules = runtimes.get(target)
        self.specs = {spec.edge: spec for spec in specs}
        self.float_type = np.float16 if precision == "float16" else np.float32
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, npt.NDArray[Any]] = {}
        self.alias: dict[str, str] = {}
        # Maps a tensor of the float graph to (tensor of codes, edge) if it exists as codes.
        self.coded: dict[str, tuple[str, str]] = {}
        self.dequantized: dict[str, str] = {}
        self.result = QDQModel(onnx.ModelProto())

    def write(self, metadata: Mapping[str, str]) -> QDQModel:
        consumers = self.graph.consumers()
        for node in map(self._as_relu, self.graph.nodes):
            if node.op_type == "Edge":
                self._edge(node)
            elif moves_codes(node, self.graph.constants) and node.input[0] in self.coded and self.rules.moves_codes:
                self._move_codes(node)
            elif node.op_type == "Concat" and self.rules.moves_codes and self._same_edge(node.input):
                self._concat_codes(node)
            elif node.op_type == "Clip" and self.rules.integer_clip and self._becomes_integer(node, consumers):
                self.alias[node.output[0]] = self.alias.get(node.input[0], node.input[0])
            else:
                self._float_node(node)
        if self.float_type is np.float16:
            self.result.model = float16_model(self.nodes, self.constants, self.graph, metadata)
        else:
            self.result.model = build_model(self.nodes, self.constants, self.graph, dict(metadata), OPSET)
        return self.result

    def _constant(self, name: str, value: Any, dtype: Any) -> str:
        self.constants[name] = np.asarray(value, dtype=dtype)
        return name

    def _read(self, name: str) -> str:
        """Return the tensor of the file that holds, in float, the value of a tensor of the float graph."""
        name = self.alias.get(name, name)
        if name in self.coded:
            codes, edge = self.coded[name]
            if codes not in self.dequantized:
                output = f"{codes}.dequantized"
                inputs = [codes, f"{edge}.scale", f"{edge}.zero_point"]
                self.nodes.append(helper.make_node("DequantizeLinear", inputs, [output], f"{codes}/DequantizeLinear"))
                self.dequantized[codes] = output
            return self.dequantized[codes]
        if name in self.graph.constants and name not in self.constants:
            value = self.graph.constants[name]
            if value.dtype == np.float32:
                self.result.float_constants[name] = value
            self._constant(name, value, value.dtype)
        return name

    def _edge(self, node: onnx.NodeProto) -> None:
        edge = node.attribute[0].s.decode()
        if self.specs[edge].kind == "activation":
            self._activation(edge, node)
            return
        # A weight is written with its Conv or Gemm, because its bias needs both scales.
        readers = [reader for reader in self.graph.nodes if node.output[0] in reader.input]
        if any(reader.op_type not in LAYERS for reader in readers):
            kinds = ", ".join(sorted({reader.op_type for reader in readers}))
            msg = (
                f"model.name: {self.specs[edge].operation}: its weight is an input of {kinds}, but a quantized weight "
                f"can only be one of {', '.join(LAYERS)}; use a layer such as nn.Linear with a bias"
            )
            raise UsageError(msg)

    def _activation(self, edge: str, node: onnx.NodeProto) -> None:
        lowered = lower_activation(self.grids[edge], self.target)
        clip = lowered.clip
        producer = self.graph.producers().get(node.input[0])
        if producer is not None and producer.op_type == "Clip" and producer.output[0] in self.alias:
            bound = clip_bound(float(self.graph.constants[producer.input[2]]), lowered.grid)
            clip = (0, bound) if bound < np.iinfo(lowered.dtype).max else None
        lowered = self._stored(lowered, lowered.grid.scale)
        scale = self._constant(f"{edge}.scale", lowered.grid.scale[0], np.float32)
        zero_point = self._constant(f"{edge}.zero_point", lowered.grid.zero_point, lowered.dtype)
        tensors = self.result.codes.setdefault(edge, [])
        base = f"{edge}.{len(tensors)}" if tensors else edge
        codes = f"{base}.codes"
        inputs = [self._read(node.input[0]), scale, zero_point]
        raw = codes if clip is None else f"{base}.unclipped"
        self.nodes.append(helper.make_node("QuantizeLinear", inputs, [raw], f"{base}/QuantizeLinear"))
        if clip is not None:
            bounds = [
                self._constant(f"{base}.qm{n}", v, lowered.dtype) for n, v in zip(("in", "ax"), clip, strict=True)
            ]
            self.nodes.append(helper.make_node("Clip", [raw, *bounds], [codes], f"{base}/Clip"))
        self.coded[node.output[0]] = (codes, edge)
        self.result.activations[edge] = lowered
        tensors.append(codes)

    def _stored(self, lowered: _Lowered, scale: npt.NDArray[np.float32]) -> _Lowered:
        """Return the converted Grid, with the claim "lossy" if the file's float type cannot hold its scale."""
        if (scale.astype(self.float_type).astype(np.float32) == scale).all():
            return lowered
        return replace(lowered, claim="lossy", note="float16 does not hold its scale")

    def _same_edge(self, names: Sequence[str]) -> bool:
        """Whether all tensors are codes of one quantizer; NNCF gives one to all inputs of a Concat before a layer."""
        return all(name in self.coded for name in names) and len({self.coded[name][1] for name in names}) == 1

    def _concat_codes(self, node: onnx.NodeProto) -> None:
        codes = [self.coded[name][0] for name in node.input]
        joined = _copy(node, codes)
        joined.output[0] = f"{node.output[0]}.codes"
        self.nodes.append(joined)
        self.coded[node.output[0]] = (joined.output[0], self.coded[node.input[0]][1])

    def _input_edge(self, name: str) -> str | None:
        """Return the edge whose codes a tensor of the float graph holds; None if it is not quantized."""
        producers = self.graph.producers()
        node = producers.get(name)
        while node is not None and moves_codes(node, self.graph.constants):
            node = producers.get(node.input[0])
        if node is not None and node.op_type == "Concat":
            edges = {self._input_edge(part) for part in node.input}
            return edges.pop() if len(edges) == 1 else None
        return node.attribute[0].s.decode() if node is not None and node.op_type == "Edge" else None

    def _move_codes(self, node: onnx.NodeProto) -> None:
        codes, edge = self.coded[node.input[0]]
        moved = _copy(node, [codes, *(self._read(name) if name else "" for name in node.input[1:])])
        if node.op_type == "Pad":
            # A float graph pads with 0.0, a graph of codes with the code of 0.0.
            del moved.input[2:]
            moved.input.append(f"{edge}.zero_point")
        moved.output[0] = f"{node.output[0]}.codes"
        self.nodes.append(moved)
        self.coded[node.output[0]] = (moved.output[0], edge)

    def _becomes_integer(self, node: onnx.NodeProto, consumers: Mapping[str, list[onnx.NodeProto]]) -> bool:
        """Whether a float Clip(0, high) has its quantizer as the only consumer: an integer Clip can then replace it."""
        readers = consumers[node.output[0]]
        low = self.graph.constants.get(node.input[1])
        if len(readers) != 1 or readers[0].op_type != "Edge" or low is None or float(low) != 0.0:
            return False
        grid = self.grids[readers[0].attribute[0].s.decode()]
        return grid.qmin == 0 and len(node.input) > 2 and node.input[2] in self.graph.constants

    def _as_relu(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """Convert a Clip with 0 as its only bound to a ReLU, which runtimes fuse."""
        low, high = [*node.input[1:], "", ""][:2] if node.op_type == "Clip" else ("", "")
        if high or low not in self.graph.constants or self.graph.constants[low].any():
            return node
        return helper.make_node("Relu", node.input[:1], node.output, node.name)

    def _float_node(self, node: onnx.NodeProto) -> None:
        weight_marker = self.graph.producers().get(node.input[1]) if len(node.input) > 1 else None
        is_weight = (
            weight_marker is not None
            and weight_marker.op_type == "Edge"
            and self.specs[weight_marker.attribute[0].s.decode()].kind == "weight"
        )
        if is_weight and weight_marker is not None:
            inputs = [self._read(node.input[0]), *self._weight(node, weight_marker.attribute[0].s.decode())]
        else:
            inputs = [self._read(name) if name else "" for name in node.input]
        self.nodes.append(_copy(node, inputs))

    def _weight(self, node: onnx.NodeProto, edge: str) -> list[str]:
        """Write a layer's weight and bias, and return the tensor names."""
        weight, trained = self.latent[edge], self.grids[edge]
        transposed, shape = node.op_type == "ConvTranspose", weight.shape
        if transposed:  # put the channels that share a scale first, as in other layers
            weight = weight.reshape(1, -1) if trained.axis is None else np.swapaxes(weight, 0, 1)
            trained = replace(trained, axis=None if trained.axis is None else 0)
        channels = weight.shape[0]
        multiplier = self.graph.fold.get(edge, np.ones(channels, np.float32))
        has_bias = len(node.input) > 2
        bias = self.graph.constants[node.input[2]] if has_bias else np.zeros(channels, np.float32)
        group = next((a.i for a in node.attribute if a.name == "group"), 1)
        depthwise = not transposed and runtimes.is_depthwise(weight.shape, group)
        fed = self.result.activations.get(self._input_edge(node.input[0]) or "")
        lowered = lower_weight(trained, weight, multiplier, bias, fed, depthwise, self.target)
        lowered = self.result.weights[edge] = self._stored(lowered, lowered.scale)
        # A scale per channel needs a zero point per channel.
        whole = transposed and trained.axis is None
        scales = lowered.scale.reshape(()) if whole else lowered.scale
        grid = [
            self._constant(f"{edge}.scale", scales, np.float32),
            self._constant(f"{edge}.zero_point", np.zeros(scales.shape), np.int8),
        ]
        axis: dict[str, Any] = {} if whole else {"axis": int(transposed)}

        def stored(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return values.reshape(shape) if whole or not transposed else np.swapaxes(values, 0, 1)

        codes = f"{edge}.codes"
        if self.weights == "float":
            # code * scale is rounded by less than half a scale, in float16 too, so the codes are recovered.
            scale = lowered.scale.reshape(-1, *[1] * (weight.ndim - 1))
            values = self._constant(f"{edge}.values", stored(lowered.codes * scale), np.float32)
            self.nodes.append(
                helper.make_node("QuantizeLinear", [values, *grid], [codes], f"{edge}/QuantizeLinear", **axis)
            )
        else:
            self._constant(codes, stored(lowered.codes), np.int8)
        names = [codes, *grid]
        output = f"{edge}.dequantized"
        self.nodes.append(helper.make_node("DequantizeLinear", names, [output], f"{edge}/DequantizeLinear", **axis))
        if not has_bias:
            return [output]
        if self.rules.bias_type == "float" or fed is None:
            return [output, self._constant(f"{edge}.bias", lowered.bias, np.float32)]
        unit = np.asarray(fed.grid.scale[0] * scales, np.float32)
        names = [
            self._constant(f"{edge}.bias_codes", lowered.bias_codes, np.int32),
            self._constant(f"{edge}.bias_scale", unit, np.float32),
        ]
        name = f"{edge}.bias/DequantizeLinear"
        axis = axis and {"axis": 0}
        self.nodes.append(helper.make_node("DequantizeLinear", names, [f"{edge}.bias"], name, **axis))
        return [output, f"{edge}.bias"]
