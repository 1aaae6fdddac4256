"""The proof, in integer codes: torch = integer simulator = runtime, and one target = the other.

1. torch's fake quantization (BN unfolded, each quantizer fed with the simulator's codes) = simulator: up to one code,
   and only where the simulator's value lies within a stated bound of a rounding tie.
2. simulator = ONNX Runtime with all optimizations: not one differing code, the logits bit for bit. Where the file
   leaves operations in float (a SiLU between its quantizers), the codes behind them fall under the rule of link 1.
3. simulator of one target = simulator of the other, operation by operation, under the rule of link 1.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, fx, nn

from artifacts import targets as runtimes
from artifacts.grid import Grid
from crqat_train.calibration import Hook, hooked
from crqat_train.layout import QuantizerSpec
from crqat_train.methods import specs_of
from export.qdq import MOVEMENT, QDQModel
from export.simulate import simulate
from export.simulated import NotSimulated, Simulation


def verify(
    model: fx.GraphModule,
    grids: Mapping[str, Grid],
    exported: Mapping[str, QDQModel],
    images: npt.NDArray[np.float32],
) -> dict[str, dict[str, Any]]:
    """Check all links for all targets.

    Args:
        model: The delivered quantized network, CPU, eval mode.
        grids: Edge name to trained Grid.
        exported: Target to its file.
        images: Normalized, float32 of shape [N, C, H, W], from the training set.

    Returns:
        Target to {"status": "passed" | "failed: ..." | "not run: ...", "images", "codes", "differing_codes", "links"}.
        `codes` and `differing_codes` are those of the link to the runtime where it ran, else of the link to torch.
    """
    result: dict[str, dict[str, Any]] = {}
    simulations: dict[str, Simulation] = {}
    for target, file in exported.items():
        try:
            simulations[target] = simulate(file.model, images, stored_error=_rounded_constants(file))
        except NotSimulated as error:
            result[target] = {"status": f"not run: {error}", "images": len(images), "codes": 0, "differing_codes": 0}
            continue
        links: dict[str, Any] = {"torch": _torch_link(model, grids, file, simulations[target], images)}
        reason = runtimes.get(target).not_run
        links["runtime"] = _runtime_link(file, simulations[target], images) if reason is None else f"not run: {reason}"
        for other in [other for other in simulations if other != target]:
            links[other] = _target_link(file, exported[other], simulations[other], images)
        result[target] = _summary(links, len(images))
    return result


def _summary(links: dict[str, Any], images: int) -> dict[str, Any]:
    ran = {name: link for name, link in links.items() if isinstance(link, dict)}
    broken = [f"{name}: {link['violations']} codes" for name, link in ran.items() if link["violations"]]
    shown = ran.get("runtime", ran["torch"])
    return {
        "status": f"failed: {'; '.join(broken)}" if broken else "passed",
        "images": images,
        "codes": shown["codes"],
        "differing_codes": shown["differing"] if "runtime" in ran else shown["violations"],
        "links": links,
    }


def _compare(
    pairs: Mapping[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]], simulation: Simulation, slack: Mapping[str, float]
) -> dict[str, Any]:
    """Count codes that differ, and those that differ by more than one or away from a tie.

    Args:
        pairs: Tensor name to (codes of the simulator, codes of the other).
        simulation: Of the first.
        slack: Tensor name to a known difference of the two values before rounding, in codes.
    """
    codes = differing = violations = 0
    widest, where = 0.0, ""
    for name, (own, other) in pairs.items():
        codes += own.size
        different = own != other
        count = int(different.sum())
        if not count:
            continue
        differing += count
        before = simulation.before_rounding[name].reshape(own.shape)[different]
        distance = np.abs(np.abs(before - np.floor(before)) - 0.5)
        allowed = simulation.tie_bound[name] + slack.get(name, 0.0)
        bad = (np.abs(own.astype(np.int64) - other)[different] > 1) | (distance > allowed)
        violations += int(bad.sum())
        if float(distance.max()) > widest:
            widest, where = float(distance.max()), name
    bound = max((simulation.tie_bound[name] + slack.get(name, 0.0) for name in pairs), default=0.0)
    return {
        "codes": codes,
        "differing": differing,
        "violations": violations,
        "farthest_from_tie": widest,
        "at": where,
        "largest_bound": bound,
    }


def _slack(file: QDQModel, bias_error: Mapping[str, float]) -> dict[str, float]:
    """How far the biases in front of each tensor of codes are known to be off, in codes.

    Args:
        file: The target's file.
        bias_error: Weight edge name to the largest error of its operation's bias, as a real number.
    """
    producer = {output: node for node in file.model.graph.node for output in node.output}
    scales = {tensor.name: tensor for tensor in file.model.graph.initializer}

    def error(name: str) -> float:
        node = producer.get(name)
        if node is None or node.op_type == "DequantizeLinear":
            return 0.0
        if node.op_type in {"Conv", "Gemm"}:
            return bias_error.get(node.input[1].removesuffix(".dequantized"), 0.0)
        return sum(error(name) for name in node.input)

    result = {}
    for node in file.model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in scales:  # not a weight that is stored as float
            slack = error(node.input[0]) / float(onnx.numpy_helper.to_array(scales[node.input[1]]))
            for output in [node.output[0], *(n.output[0] for n in file.model.graph.node if node.output[0] in n.input)]:
                result[output] = slack
    return result


def _torch_link(
    model: fx.GraphModule,
    grids: Mapping[str, Grid],
    file: QDQModel,
    simulation: Simulation,
    images: npt.NDArray[np.float32],
) -> dict[str, Any]:
    pairs: dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]] = {}

    def replaced_by_the_file(spec: QuantizerSpec) -> Hook:
        tensors, grid = iter(file.codes[spec.edge]), grids[spec.edge]

        def replace(_: nn.Module, __: tuple[Tensor], output: Tensor) -> Tensor:
            name = next(tensors)
            # A file may quantize a pooled tensor before it is flattened, torch behind.
            codes = simulation.codes[name].reshape(output.shape)
            # Rounding a value of the Grid gives its code back; the simulator's have the zero point taken off.
            pairs[name] = (codes, grid.quantize(output.numpy()) - grid.zero_point)
            # In the output's own memory layout, which a later view may depend on.
            return torch.empty_like(output).copy_(torch.from_numpy(grid.dequantize(codes + grid.zero_point)))

        return replace

    in_file = [spec for spec in specs_of(model) if spec.kind == "activation" and spec.edge in file.codes]
    with torch.no_grad(), hooked(model, [(spec, replaced_by_the_file(spec)) for spec in in_file]):
        model(torch.from_numpy(images))
    rounded = {edge: weight.bias_error + _stored_error(file, edge) for edge, weight in file.weights.items()}
    return _compare(pairs, simulation, _slack(file, rounded))


def _runtime_link(file: QDQModel, simulation: Simulation, images: npt.NDArray[np.float32]) -> dict[str, Any]:
    names = [name for names in file.codes.values() for name in names]
    tapped = onnx.ModelProto()
    tapped.CopyFrom(file.model)
    for name in names:
        tapped.graph.output.append(helper.make_tensor_value_info(name, TensorProto.UINT8, None))
    before, after = optimized_operations(file.model), optimized_operations(tapped)
    computing = {op for op in before if op.startswith("QLinear") or op in {"QGemm", "Conv", "FusedConv", "Add", "Gemm"}}
    logits, *codes = _session(tapped.SerializeToString()).run(["logits", *names], {"input": images})
    zero_points = {name: file.activations[edge].grid.zero_point for edge, own in file.codes.items() for name in own}
    theirs = {name: own.astype(np.int64) - zero_points[name] for name, own in zip(names, codes, strict=True)}
    if simulation.inexact:
        # Each quantizer is fed with the runtime's codes: a difference shows where it arises and does not spread.
        simulation = simulate(file.model, images, theirs)
    exact = {name: codes for name, codes in theirs.items() if name not in simulation.inexact}
    wrong = {name: int((simulation.codes[name] != codes).sum()) for name, codes in exact.items()}
    near = _compare(
        {name: (simulation.codes[name], theirs[name]) for name in names if name in simulation.inexact}, simulation, {}
    )
    allowed = 0.0 if simulation.logits_bound is None else simulation.logits_bound
    differing_logits = int((np.abs(logits.astype(np.float64) - simulation.logits) > allowed).sum())
    # Looking at the codes must not have changed what is computed.
    observed = any(len(before[op]) != len(after[op]) for op in computing)
    return {
        "codes": sum(codes.size for codes in theirs.values()),
        "differing": sum(wrong.values()) + near["violations"],
        "differing_logits": differing_logits,
        "at": next((name for name, count in wrong.items() if count), near["at"] if near["violations"] else ""),
        "violations": sum(wrong.values()) + near["violations"] + differing_logits + int(observed),
        "observed_graph_is_shipped_graph": not observed,
        # Codes behind float operations, and those that lie on the other side of a tie.
        "inexact": near["codes"],
        "inexact_differing": near["differing"],
        "inexact_farthest_from_tie": near["farthest_from_tie"],
        "inexact_largest_bound": near["largest_bound"],
    }


def _target_link(
    file: QDQModel, other: QDQModel, other_simulation: Simulation, images: npt.NDArray[np.float32]
) -> dict[str, Any]:
    """This target's simulator, fed with the other's codes operation by operation, against the other's results."""
    tensors = {
        own: theirs for edge in file.codes if edge in other.codes
        for own, theirs in zip(file.codes[edge], other.codes[edge], strict=True)
    }  # fmt: skip
    forced = {own: other_simulation.codes[theirs] for own, theirs in tensors.items()}
    simulation = simulate(file.model, images, forced, stored_error=_rounded_constants(file))
    pairs = {own: (simulation.codes[own], forced[own]) for own in tensors}
    stored = {edge: _stored_error(file, edge) for edge in file.weights}
    return _compare(pairs, simulation, _slack(file, stored))


def _stored_error(file: QDQModel, edge: str) -> float:
    """What storing a float bias cost: nothing in float32, half of its last place in float16."""
    stored = next((t for t in file.model.graph.initializer if t.name == f"{edge}.bias"), None)
    if stored is None:
        return 0.0
    # Of the bias that was to be written, not of the one in the file: that one is to be proven.
    bias = file.weights[edge].bias
    values = bias.astype(helper.tensor_dtype_to_np_dtype(stored.data_type)).astype(np.float64)
    return float(np.abs(values - bias).max())


def _rounded_constants(file: QDQModel) -> dict[str, npt.NDArray[np.float64]]:
    """How far the file's type moves each constant of the float parts; nothing in float32."""
    types = {tensor.name: helper.tensor_dtype_to_np_dtype(tensor.data_type) for tensor in file.model.graph.initializer}
    return {
        # Of the constant that was to be written, not of the one in the file: that one is to be proven.
        name: np.abs(value.astype(types[name]).astype(np.float64) - value)
        for name, value in file.float_constants.items()
        if types.get(name, value.dtype) != value.dtype
    }


def _session(model: bytes, optimized: Path | None = None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def optimized_operations(model: onnx.ModelProto) -> dict[str, list[str]]:
    """What ONNX Runtime makes of a file on this machine: operation to the names of its nodes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        _session(model.SerializeToString(), path)
        operations: dict[str, list[str]] = {}
        for node in onnx.load(path).graph.node:
            operations.setdefault(node.op_type, []).append(re.sub(r"_token_\d+$", "", node.name))
    return operations


# What each operation of the file is to become, and which stay float.
FUSED, _FLOAT_RESULT = runtimes.ONNXRUNTIME.fusions, runtimes.ONNXRUNTIME.float_results
ALWAYS_FLOAT = runtimes.ONNXRUNTIME.always_float


def fusion(model: onnx.ModelProto) -> dict[str, Any]:
    """Count what ONNX Runtime fuses, and say of the rest why it stayed float.

    Returns:
        {"operations": optimized counts, "expected": {fused operation: count in the file}, "complete": bool,
        "float": [{"node", "operation", "reason"}]}.
    """
    operations = optimized_operations(model)
    counts = Counter(node.op_type for node in model.graph.node)
    dequantized = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    stayed = [
        {"node": node.name, "operation": node.op_type, "reason": _why_float(model, node)}
        for node in model.graph.node
        if node.op_type in ALWAYS_FLOAT
        or (node.op_type == "Clip" and node.input[0] in dequantized)
        or (node.op_type in FUSED and node.name not in _computed_in_integers(operations, node.op_type))
    ]
    return {
        "operations": {op: len(names) for op, names in sorted(operations.items())},
        "expected": {FUSED[op]: counts[op] for op in FUSED if counts[op]},
        "complete": not stayed,
        "float": stayed,
    }


def _before_output(model: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    """Whether nothing but movement lies between a node and the logits."""
    names = {model.graph.output[0].name}
    for other in reversed(model.graph.node):
        if names.intersection(other.output) and (other is node or other.op_type in MOVEMENT):
            if other is node:
                return True
            names.update(other.input[:1])
    return False


def _computed_in_integers(operations: dict[str, list[str]], op_type: str) -> list[str]:
    kinds = (FUSED[op_type], _FLOAT_RESULT.get(op_type, ""))
    return [name for kind in kinds for name in operations.get(kind, [])]


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
    readers = [n for n in model.graph.node if node.output[0] in n.input]
    if _before_output(model, node):
        return "its result is the network's output, which is not quantized"
    between = [n.op_type for n in readers if n.op_type not in {"QuantizeLinear", "Relu"}]
    if between:
        return f"{between[0]} stands between it and a quantizer"
    return "ONNX Runtime did not fuse it"
