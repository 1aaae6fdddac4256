"""What an engine's layers and its builder's words amount to: INT8 coverage, layers that only move data, warnings.

Coverage is the share of Conv and Gemm whose operands are INT8 in the plan. It is no measure of speed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from crqat.runtime_eval.trt.plan_layers import Layer

# (severity of the builder's message, its text)
Message = tuple[str, str]

# What a warning means, by the builder's words: kind, whether the engine is wrong with it, and what it says to a user.
_KNOWN = (
    (
        "uint8_read_as_int8",
        "error",
        # The second is said where several quantizers share a zero point, as in files of torch.onnx.export.
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


def summarize(layers: Sequence[Layer], macs: Mapping[str, int] | None) -> dict[str, Any]:
    """Layers, coverage and counts of an engine, as a JSON object.

    Args:
        layers: Of `crqat.runtime_eval.trt.plan_layers`.
        macs: Multiply-accumulates of each Conv and Gemm of the ONNX file by node name; None if they are not known.
    """
    return {
        "layers": [_entry(layer, macs or {}) for layer in layers],
        "coverage": coverage(layers, macs),
        "counts": counts(layers),
    }


def _entry(layer: Layer, macs: Mapping[str, int]) -> dict[str, Any]:
    own = [macs[node] for node in layer.nodes if node in macs] if layer.kind == "matmul" else []
    return {
        "name": layer.name,
        "kind": layer.kind,
        "type": layer.type,
        "inputs": list(layer.inputs),
        "outputs": list(layer.outputs),
        "weights": layer.weights,
        "int8": layer.int8 if layer.kind == "matmul" else None,
        "macs": sum(own) if own else None,
        "nodes": list(layer.nodes),
    }


def counts(layers: Sequence[Layer]) -> dict[str, int]:
    """How many layers there are of each kind; those that a rule or a table asks for are there even if 0."""
    found: Counter[str] = Counter(layer.kind for layer in layers)
    kinds = ("matmul", "pointwise", "pooling", "reformat", "copy", "opaque")
    return {"layers": len(layers), **dict.fromkeys(kinds, 0), **found}


def coverage(layers: Sequence[Layer], macs: Mapping[str, int] | None) -> dict[str, Any]:
    """How much of Conv and Gemm multiplies INT8 by INT8.

    A node is covered if every matmul layer that came from it is INT8 and there is one. A node that no such layer
    mentions may have been fused into something that does not tell, and counts as uncovered.

    Args:
        layers: Of `crqat.runtime_eval.trt.plan_layers`.
        macs: As in `summarize`. Without them the plan's own layers are counted, and there is no share by MACs.

    Returns:
        {"by_count", "by_macs": shares of 1 or None, "nodes", "int8_nodes", "macs", "int8_macs": what they are shares
        of, "uncovered": [{"node", "macs", "reason"}], the largest first}. `nodes` counts layers if `macs` is None.
    """
    matmuls = [layer for layer in layers if layer.kind == "matmul"]
    if macs is None:
        missing = [
            {"node": layer.name, "macs": None, "reason": _operands([layer])} for layer in matmuls if not layer.int8
        ]
        covered = len(matmuls) - len(missing)
        by_count = covered / len(matmuls) if matmuls else None
        return {"by_count": by_count, "by_macs": None, "nodes": len(matmuls), "int8_nodes": covered, "macs": None,
                "int8_macs": None, "uncovered": missing}  # fmt: skip
    uncovered = []
    for node, amount in macs.items():
        own = [layer for layer in matmuls if node in layer.nodes]
        if not own or not all(layer.int8 for layer in own):
            reason = _operands(own) if own else "no layer of the plan is known to compute it"
            uncovered.append({"node": node, "macs": amount, "reason": reason})
    uncovered.sort(key=lambda entry: -int(str(entry["macs"])))
    total, lost = sum(macs.values()), sum(macs[str(entry["node"])] for entry in uncovered)
    return {
        "by_count": 1 - len(uncovered) / len(macs) if macs else None,
        "by_macs": (total - lost) / total if total else None,
        "nodes": len(macs),
        "int8_nodes": len(macs) - len(uncovered),
        "macs": total,
        "int8_macs": total - lost,
        "uncovered": uncovered,
    }


def _operands(layers: Sequence[Layer]) -> str:
    layer = next(layer for layer in layers if not layer.int8)
    return f"multiplies {layer.inputs[0] if layer.inputs else 'unknown'} by {layer.weights or 'unknown'}"


def remarks(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The builder's warnings and errors, each kind once.

    Args:
        messages: All of the log in order; the verbose ones say which node was being parsed.

    Returns:
        [{"kind", "severity": "error" | "warning" | "harmless", "message", "count", "nodes": the first few}]. The
        severity is ours: a warning without which the engine computes something else is an error.
    """
    result: dict[str, dict[str, Any]] = {}
    node = None
    for severity, text in messages:
        if severity not in ("WARNING", "ERROR", "INTERNAL_ERROR"):
            match = _PARSING.search(text)
            node = match["node"] if match else node
            continue
        kind, grade, meaning = _classify(severity, text)
        entry = result.setdefault(
            f"{kind}: {meaning}", {"kind": kind, "severity": grade, "message": meaning, "count": 0, "nodes": []}
        )
        entry["count"] += 1
        of_node = node is not None and "onnxOpImporters" in text
        if of_node and node not in entry["nodes"] and len(entry["nodes"]) < _SHOWN_NODES:
            entry["nodes"].append(node)
    return list(result.values())


def _classify(severity: str, text: str) -> tuple[str, str, str]:
    for kind, grade, pattern, meaning in _KNOWN:
        if pattern.search(text):
            return kind, grade, meaning
    one_line = " ".join(text.split())
    # A builder also logs errors of attempts that it then does without; whether it failed shows in the build's result.
    return "other", "warning", one_line if severity == "WARNING" else f"logged as an error: {one_line}"


def headline(report: dict[str, Any]) -> dict[str, Any]:
    """What a benchmark's results keep of an engine report; the layers stay in the report's own file."""
    kept = ("status", "failure", "builder", "compute_capabilities", "flags", "batch", "seconds", "size_bytes", "source")
    found: dict[str, Any] = {key: report[key] for key in kept}
    covered, number = report["coverage"], report["counts"]
    found["coverage"] = covered and {key: covered[key] for key in covered if key != "uncovered"}
    found["uncovered"] = [] if covered is None else covered["uncovered"][:_SHOWN_NODES]
    found["counts"], found["remarks"], found["notices"] = number, report["remarks"], report["notices"]
    return found
