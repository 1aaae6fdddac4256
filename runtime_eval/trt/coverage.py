"""Summarizes an engine's layers and its builder's messages: INT8 coverage, reformat layers, warnings.

Coverage is the share of Conv and Gemm whose operands are INT8 in the plan. It does not measure speed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from crqat.core.results.engine import (
    BuilderMessage,
    Coverage,
    EngineLayer,
    EngineReport,
    EngineSummary,
    LayerCounts,
    Severity,
    Uncovered,
)
from crqat.runtime_eval.trt.plan_layers import Layer

# (severity of the builder's message, its text)
Message = tuple[str, str]

# Known warnings, by the builder's text: kind, whether the engine is then wrong, and the message for the user.
_KNOWN: tuple[tuple[str, Severity, re.Pattern[str], str], ...] = (
    (
        "uint8_read_as_int8",
        "error",
        # The second text appears if several quantizers share a zero point, as in files of torch.onnx.export.
        re.compile(r"UINT8 (zero_point|data .* is being converted to INT32)"),
        "UINT8 codes are read as INT8 with the same scale: all above 127 are clipped, half of the range",
    ),
    (
        "float16_scales",
        "harmless",
        re.compile(r"Converting conv (activation|weight) scales to fp32"),
        "a float16 scale is widened to float32, which changes no value",
    ),
    (
        "subnormal_weights",
        "warning",
        re.compile(r"subnormal"),
        "weights are so small that their type rounds them coarsely or to 0",
    ),
)
_PARSING = re.compile(r"Parsing node: (?P<node>.*) \[\w+\]")
_SHOWN_NODES = 5


def described(layers: Sequence[Layer], macs: Mapping[str, int] | None) -> list[EngineLayer]:
    """Return the layers of an engine as they are stored in an engine report.

    Args:
        layers: Layers from `crqat.runtime_eval.trt.plan_layers`.
        macs: Multiply-accumulates of each Conv and Gemm of the ONNX file by node name; None if they are not known.
    """
    return [_described(layer, macs or {}) for layer in layers]


def _described(layer: Layer, macs: Mapping[str, int]) -> EngineLayer:
    own = [macs[node] for node in layer.nodes if node in macs] if layer.kind == "matmul" else []
    return EngineLayer(
        name=layer.name,
        kind=layer.kind,
        type=layer.type,
        inputs=list(layer.inputs),
        outputs=list(layer.outputs),
        weights=layer.weights,
        int8=layer.int8 if layer.kind == "matmul" else None,
        macs=sum(own) if own else None,
        nodes=list(layer.nodes),
    )


def counts(layers: Sequence[Layer]) -> LayerCounts:
    """Return the number of an engine's layers of each kind."""
    return LayerCounts(**{"layers": len(layers), "reformat": 0, **Counter[str](layer.kind for layer in layers)})


def coverage(layers: Sequence[Layer], macs: Mapping[str, int] | None) -> Coverage:
    """Return the share of Conv and Gemm, by count and by MACs, that an engine multiplies in INT8.

    A node is covered if at least one matmul layer came from it and all such layers are INT8. A node that no such layer
    mentions may be fused into a layer that does not report it, and counts as uncovered.

    Args:
        layers: Layers from `crqat.runtime_eval.trt.plan_layers`.
        macs: As in `described`. Without them, the plan's own layers are counted, and the share by MACs is None.
    """
    matmuls = [layer for layer in layers if layer.kind == "matmul"]
    if macs is None:
        missing = [Uncovered(layer.name, _operands([layer])) for layer in matmuls if not layer.int8]
        covered = len(matmuls) - len(missing)
        by_count = covered / len(matmuls) if matmuls else None
        return Coverage(None, len(matmuls), covered, by_count, None, None, missing)
    uncovered = []
    for node, amount in macs.items():
        own = [layer for layer in matmuls if node in layer.nodes]
        if not own or not all(layer.int8 for layer in own):
            reason = _operands(own) if own else "no layer of the plan is known to compute it"
            uncovered.append(Uncovered(node, reason, amount))
    uncovered.sort(key=lambda entry: -macs[entry.node])
    total, lost = sum(macs.values()), sum(macs[entry.node] for entry in uncovered)
    return Coverage(
        by_macs=(total - lost) / total if total else None,
        nodes=len(macs),
        int8_nodes=len(macs) - len(uncovered),
        by_count=1 - len(uncovered) / len(macs) if macs else None,
        macs=total,
        int8_macs=total - lost,
        uncovered=uncovered,
    )


def _operands(layers: Sequence[Layer]) -> str:
    layer = next(layer for layer in layers if not layer.int8)
    return f"multiplies {layer.inputs[0] if layer.inputs else 'unknown'} by {layer.weights or 'unknown'}"


def warnings(messages: Sequence[Message]) -> list[BuilderMessage]:
    """Return the builder's warnings and errors, each kind once, with its count and the first few nodes.

    The severity is crqat's own: a warning that means a wrong result counts as an error.

    Args:
        messages: All messages of the log in order; the verbose ones say which node was being parsed.
    """
    result: dict[str, BuilderMessage] = {}
    node = None
    for severity, text in messages:
        if severity not in ("WARNING", "ERROR", "INTERNAL_ERROR"):
            match = _PARSING.search(text)
            node = match["node"] if match else node
            continue
        kind, grade, meaning = _classify(severity, text)
        said = result.setdefault(f"{kind}: {meaning}", BuilderMessage(grade, meaning, 0, [], kind))
        nodes = said.nodes
        if node is not None and "onnxOpImporters" in text and node not in nodes and len(nodes) < _SHOWN_NODES:
            nodes = [*nodes, node]
        result[f"{kind}: {meaning}"] = replace(said, count=said.count + 1, nodes=nodes)
    return list(result.values())


def _classify(severity: str, text: str) -> tuple[str, Severity, str]:
    for kind, grade, pattern, meaning in _KNOWN:
        if pattern.search(text):
            return kind, grade, meaning
    one_line = " ".join(text.split())
    # A builder also logs errors of attempts that it does not need; whether the build failed shows in its result.
    return "other", "warning", one_line if severity == "WARNING" else f"logged as an error: {one_line}"


def headline(report: EngineReport) -> EngineSummary:
    """Return the summary of an engine report for results.json, without the layers, which engine.json holds."""
    covered = report.coverage
    return EngineSummary(
        status=report.status,
        failure=report.failure,
        builder=report.builder,
        compute_capabilities=report.compute_capabilities,
        flags=report.flags,
        batch=report.batch,
        seconds=report.seconds,
        size_bytes=report.size_bytes,
        source=report.source,
        coverage=None if covered is None else replace(covered, uncovered=None),
        uncovered=[] if covered is None else (covered.uncovered or [])[:_SHOWN_NODES],
        counts=report.counts,
        messages=report.messages,
        notices=report.notices,
    )
