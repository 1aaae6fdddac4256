"""Compares ONNX Runtime's time for each layer in the float and the INT8 file, and says what limits the INT8 file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from crqat.core.results.benchmark import NodeTime, Results
from crqat.core.results.export import ExportedModel, ExportPayload, LayerSummary

_LAYERS = re.compile(r"(Conv|Gemm|MatMul)")
_CONVERSIONS = re.compile(r"^(Dynamic)?(Quantize|Dequantize)Linear|^Cast|^Reorder|^Transpose")
# What ONNX Runtime fuses into the layer in front of it.
_FUSED_BEHIND = (
    "BatchNormalization",
    "Clip",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "LeakyRelu",
    "Relu",
    "Sigmoid",
    "Tanh",
)
KINDS = ("layers that multiply", "conversion and layout", "clipping codes to the bit width", "all other operations")
# Three limits: a layer counts as hardly faster from this share of its float time on; a node with at most so many times
# the cheapest node's time is mostly call overhead; with so few products per output there is little arithmetic to save.
_HARDLY, _CALLS, _FEW_PRODUCTS = 0.8, 3.0, 32


@dataclass(frozen=True)
class LayerTime:
    """Time of one layer in the float file and in the INT8 file.

    Attributes:
        layer: Name of the layer.
        float_microseconds: Time in the float file, in microseconds.
        microseconds: Time in the INT8 file, in microseconds.
        limit: Why the layer is hardly faster in INT8, in words; "" if it is faster.
    """

    layer: str
    float_microseconds: float
    microseconds: float
    limit: str


@dataclass(frozen=True)
class OperationTime:
    """Time of all nodes of one operation in a file.

    Attributes:
        operation: ONNX Runtime's name of the operation.
        nodes: Number of nodes of the operation.
        microseconds: Time of all these nodes, in microseconds.
    """

    operation: str
    nodes: int
    microseconds: float


@dataclass(frozen=True)
class TimeSpent:
    """Comparison of the times of the nodes of an INT8 file with those of the float file.

    Attributes:
        file: Name of the file.
        latency_ratio: Latency divided by that of the float file; None if it was not measured.
        kinds: Maps each of `KINDS` to the microseconds and number of nodes in the float file, and the same in this
            file.
        others: Operations of the INT8 file that belong to no layer, those with the longest time first.
        layers: Layers that both files have, those with the longest time first.
        unmatched: Number of layers that could not be found by name in both files.
    """

    file: str
    latency_ratio: float | None
    kinds: dict[str, tuple[float, int, float, int]]
    others: list[OperationTime]
    layers: list[LayerTime]
    unmatched: int

    @property
    def costly(self) -> list[OperationTime]:
        """The operations outside layers that take at least a twentieth of the INT8 file's time."""
        total = sum(own for _, _, own, _ in self.kinds.values())
        return [row for row in self.others if row.microseconds >= total / 20]

    @property
    def limited(self) -> list[LayerTime]:
        """The layers in `layers` that are hardly faster in the INT8 file than in the float file."""
        return [row for row in self.layers if row.limit]


def time_spent(export_dir: Path, export: ExportPayload, results: Results) -> list[TimeSpent]:
    """Return one comparison for each file whose nodes were timed; none if those of the float file were not timed.

    Args:
        export_dir: Directory of the export, with the files.
        export: Summary of the export, from its manifest.
        results: Results of the benchmark on this export.
    """
    name, reference = next(((file, m) for file, m in results.models.items() if m.target == "float"), ("", None))
    if reference is None or reference.node_times is None:
        return []
    found = []
    for entry in export.models:
        model = results.models.get(entry.file)
        if entry.file == name or model is None or model.node_times is None:
            continue
        try:
            behind, own = (_layers_behind(onnx.load(export_dir / file)) for file in (name, entry.file))
        except (OSError, ValueError, DecodeError):  # the report of measurements does not need them
            continue
        ratio = None if model.versus_float is None else model.versus_float.latency_ratio
        rows = _layers(reference.node_times, behind, model.node_times, own, entry, export.layers)
        kinds, others = _kinds(reference.node_times, model.node_times), _others(model.node_times)
        found.append(TimeSpent(entry.file, ratio, kinds, others, rows, len(export.layers) - len(rows)))
    return found


def _layers_behind(model: onnx.ModelProto) -> dict[str, str]:
    """Map names of nodes and of their outputs to layers; a BN or activation belongs to the layer before it."""
    producers = {output: node for node in model.graph.node for output in node.output}
    found = {}
    for node in model.graph.node:
        source: onnx.NodeProto | None = node
        while source is not None and source.op_type in _FUSED_BEHIND:
            source = producers.get(source.input[0])
        if source is not None and _LAYERS.search(source.op_type):
            found.update(dict.fromkeys((node.name, *node.output), source.name))
    return found


def _kind(row: NodeTime) -> str:
    if _LAYERS.search(row.operation):
        return KINDS[0]
    if _CONVERSIONS.search(row.operation):
        return KINDS[1]
    return KINDS[2] if row.operation == "Clip" and row.node.endswith("/Clip") else KINDS[3]


def _kinds(reference: Sequence[NodeTime], times: Sequence[NodeTime]) -> dict[str, tuple[float, int, float, int]]:
    found = {}
    for kind in KINDS:
        of_float, own = ([row.microseconds for row in rows if _kind(row) == kind] for rows in (reference, times))
        if of_float or own:
            found[kind] = (sum(of_float), len(of_float), sum(own), len(own))
    return found


def _others(times: Sequence[NodeTime]) -> list[OperationTime]:
    found: dict[str, list[float]] = {}
    for row in times:
        if _kind(row) != KINDS[0]:
            found.setdefault(row.operation, []).append(row.microseconds)
    rows = [OperationTime(operation, len(own), sum(own)) for operation, own in found.items()]
    return sorted(rows, key=lambda row: -row.microseconds)


def _layers(
    reference: Sequence[NodeTime],
    behind: Mapping[str, str],
    times: Sequence[NodeTime],
    own_behind: Mapping[str, str],
    entry: ExportedModel,
    layers: Sequence[LayerSummary],
) -> list[LayerTime]:
    of_float = {behind[row.node]: row.microseconds for row in reference if row.node in behind}
    own = {own_behind.get(row.node, row.node): row.microseconds for row in times if _LAYERS.search(row.operation)}
    cheapest = min(row.microseconds for row in (*reference, *times)) if reference and times else 0.0
    stays = {} if entry.fusion is None else {node.node: node.reason for node in entry.fusion.in_float}
    rows = []
    for layer in layers:
        if layer.layer not in of_float or layer.layer not in own:
            continue
        before, after, limit = of_float[layer.layer], own[layer.layer], ""
        if after >= _HARDLY * before:
            if layer.reason or layer.layer in stays:
                limit = f"float: {layer.reason or stays[layer.layer]}"
            elif layer.products <= _FEW_PRODUCTS:
                limit = f"{layer.products} products for each output: little arithmetic to save"
            elif before <= _CALLS * cheapest:
                limit = f"small: a call alone takes about {cheapest:g} µs, as the cheapest node shows"
            else:
                limit = "ONNX Runtime's integer kernel is no faster for this shape"
        rows.append(LayerTime(layer.layer, before, after, limit))
    return sorted(rows, key=lambda row: -row.microseconds)
