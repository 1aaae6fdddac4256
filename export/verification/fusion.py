"""Reports which operations of a file ONNX Runtime fuses on this machine, and why others stay in float."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from crqat.core import targets as runtimes
from crqat.core.results.verification import FloatNode, Fusion
from crqat.export.graph.data_movement import ON_CODES
from crqat.export.verification import UNEXPLAINED


def session(model: bytes, optimized: Path | None = None) -> Any:
    """Return an ONNX Runtime CPU session with all optimizations; the optimized graph is written to `optimized`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def optimized_operations(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Return the nodes of ONNX Runtime's optimized graph on this machine: their names by operation."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        session(model.SerializeToString(), path)
        operations: dict[str, list[str]] = {}
        for node in onnx.load(path).graph.node:
            operations.setdefault(node.op_type, []).append(re.sub(r"_token_\d+$", "", node.name))
    return operations


# Expected fusion of each operation of the file, and operations whose result is float.
FUSED, _FLOAT_RESULT = runtimes.ONNXRUNTIME.fusions, runtimes.ONNXRUNTIME.float_results
ALWAYS_FLOAT = runtimes.ONNXRUNTIME.always_float


def fusion(model: onnx.ModelProto) -> Fusion:
    """Return the number of operations that ONNX Runtime fuses, and the reason for each node that stays in float."""
    operations = optimized_operations(model)
    counts = Counter(node.op_type for node in model.graph.node)
    dequantized = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    stayed = [
        FloatNode(node.name, node.op_type, _why_float(model, node))
        for node in model.graph.node
        if node.op_type in ALWAYS_FLOAT
        or (node.op_type == "Clip" and node.input[0] in dequantized)
        or (node.op_type in FUSED and node.name not in _computed_in_integers(operations, node.op_type))
    ]
    return Fusion(
        expected={FUSED[op]: counts[op] for op in FUSED if counts[op]},
        operations={op: len(names) for op, names in sorted(operations.items())},
        in_float=stayed,
        complete=not stayed,
    )


def in_float(model: onnx.ModelProto, operations: Mapping[str, list[str]] | None = None) -> set[str]:
    """Return the names of nodes with quantized inputs that ONNX Runtime computes in float on this machine.

    ONNX Runtime computes a node in float if it does not fuse the node with its quantizers, for example because two
    other nodes use its result.

    Args:
        model: A quantized ONNX file.
        operations: Result of `optimized_operations`, if it is available already.
    """
    optimized = dict(operations or optimized_operations(model))
    return {
        node.name
        for node in model.graph.node
        if node.op_type in FUSED and node.name not in _computed_in_integers(optimized, node.op_type)
    }


def _before_output(model: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    """Whether only data movement lies between a node and the logits."""
    names = {model.graph.output[0].name}
    for other in reversed(model.graph.node):
        if names.intersection(other.output) and (other is node or other.op_type in ON_CODES):
            if other is node:
                return True
            names.update(other.input[:1])
    return False


def _computed_in_integers(operations: dict[str, list[str]], op_type: str) -> list[str]:
    kinds = (FUSED[op_type], _FLOAT_RESULT.get(op_type, ""))
    return [name for kind in kinds for name in operations.get(kind, [])]


def _readers(model: onnx.ModelProto, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    return [reader for reader in model.graph.node if node.output[0] in reader.input]


def _why_float(model: onnx.ModelProto, node: onnx.NodeProto) -> str:
    producer = {output: n for n in model.graph.node for output in n.output}
    if node.op_type in ALWAYS_FLOAT:
        return f"ONNX Runtime has no integer kernel for {node.op_type}"
    if node.op_type == "Clip":
        return "ONNX Runtime has no integer kernel for a Clip of both signs"
    data_inputs = node.input if node.op_type in ("Add", "Mul", "MatMul") else node.input[:1]
    constants = {tensor.name for tensor in model.graph.initializer}
    for name in data_inputs:
        source = producer.get(name)
        if source is None or source.op_type != "DequantizeLinear":
            kind = source.op_type if source is not None else "constant" if name in constants else "network input"
            return f"its input {name} is not quantized ({kind})"
    if _before_output(model, node):
        return "its result is the network's output, which is not quantized"
    readers = _readers(model, node)
    relu = any(reader.op_type == "Relu" for reader in readers)
    behind = [n for reader in readers for n in (_readers(model, reader) if reader.op_type == "Relu" else [reader])]
    between = [n.op_type for n in behind if n.op_type != "QuantizeLinear"]
    if between:
        return f"{between[0]} stands between it and a quantizer"
    if len(behind) > 1:
        return f"its result goes to {len(behind)} quantizers, of which ONNX Runtime fuses none"
    zero_points = [t for t in model.graph.initializer if behind and t.name == behind[0].input[2]]
    if relu and any(onnx.numpy_helper.to_array(tensor).any() for tensor in zero_points):
        return "the quantizer behind its Relu is shared with a tensor of both signs, so ONNX Runtime keeps the Relu"
    return UNEXPLAINED
