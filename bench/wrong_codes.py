"""Codes that ONNX Runtime computes otherwise than a QDQ file asks, counted alike for the files of all exporters.

ONNX Runtime runs the file with every optimization and shows the codes of every activation. `export.simulator.run` then
computes each of them anew, in integers or in float64, from the codes that ONNX Runtime itself had in front of it
(teacher forcing: a difference counts where it arises and does not spread). A code is wrong if it is off by more than
one, or off by one although the exact value lies farther from a rounding tie than two correct float32 computations of
it can lie apart. So a file whose operations stay in float is judged by the same rule as one that runs in integers.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from crqat.export.simulator.run import simulate
from crqat.export.simulator.values import NotSimulated

TIME_LIMIT_SECONDS = 900.0
# A CPU model of qemu with AVX2 and without VNNI.
WITHOUT_VNNI = "Haswell"
# Runs a file and the same file with its codes shown; writes the codes, says whether both gave the same logits.
_RUN = """
import json, sys, numpy, onnxruntime
shipped, shown, arrays, names = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
options.intra_op_num_threads = 1
images = numpy.load(arrays)
def run(path, outputs):
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(outputs, {"input": images})
logits, *codes = run(shown, ["logits", *names])
numpy.savez(arrays + ".codes", *codes)
print(json.dumps(bool((logits == run(shipped, ["logits"])[0]).all())))
"""


def differing_codes(
    path: Path, images: npt.NDArray[np.float32], folder: Path, cpu: str | None = None
) -> dict[str, Any]:
    """Count a file's wrong codes.

    Args:
        path: A QDQ file with "input" and "logits".
        images: Normalized, float32 [N, C, H, W].
        folder: For scratch files.
        cpu: A CPU model of qemu, None for this machine's.

    Returns:
        {"status": "counted" | "not comparable: ..." | "not run: ...", "codes", "wrong", "largest", "images"}; `largest`
        is the largest difference among the wrong ones, in codes.
    """
    entry: dict[str, Any] = {"status": "counted", "codes": None, "wrong": None, "largest": None, "images": len(images)}
    if cpu is not None and shutil.which("qemu-x86_64") is None:
        return {**entry, "status": "not run: no qemu-x86_64"}
    model = with_constants_folded(onnx.load(path))
    if any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer):
        # The bound of a tie holds for float32.
        return {**entry, "status": "not comparable: computes in float16"}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    quantizers = [n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] not in constants]
    names = [node.output[0] for node in quantizers]
    zeros = {node.output[0]: constants[node.input[2]] for node in quantizers}
    ran = _shown(path, zeros, images, folder, cpu)
    if isinstance(ran, str):
        return {**entry, "status": ran}
    integers = {name: codes.astype(np.int32) - int(zeros[name]) for name, codes in zip(names, ran, strict=True)}
    try:
        simulation = simulate(model, images, forced=integers)
    except NotSimulated as reason:
        return {**entry, "status": f"not comparable: {reason}"}
    wrong, largest = 0, 0
    for name, theirs in integers.items():
        before = simulation.before_rounding[name].reshape(theirs.shape)
        off = np.abs(simulation.codes[name].reshape(theirs.shape) - theirs)
        from_tie = np.abs(np.abs(before - np.floor(before)) - 0.5)
        bad = (off > 1) | ((off == 1) & (from_tie > simulation.tie_bound[name]))
        wrong += int(bad.sum())
        largest = max(largest, int(off[bad].max(initial=0)))
    return {**entry, "codes": sum(codes.size for codes in integers.values()), "wrong": wrong, "largest": largest}


def _shown(
    path: Path, zeros: dict[str, npt.NDArray[Any]], images: npt.NDArray[np.float32], folder: Path, cpu: str | None
) -> list[npt.NDArray[Any]] | str:
    """The codes that ONNX Runtime computes, or why there are none to compare."""
    model = onnx.load(path)
    for name, zero in zeros.items():
        kind = helper.np_dtype_to_tensor_dtype(zero.dtype)
        model.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    shown, arrays = folder / "shown.onnx", folder / "images.npy"
    onnx.save(model, shown)
    np.save(arrays, images)
    emulator = [] if cpu is None else ["qemu-x86_64", "-cpu", cpu]
    command = [*emulator, sys.executable, "-c", _RUN, str(path), str(shown), str(arrays), json.dumps(list(zeros))]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIME_LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"not run: not finished after {TIME_LIMIT_SECONDS:g} s"
    if result.returncode:
        words = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        return f"not comparable: {words[-1] if words else f'its process ended with {result.returncode}'}"[:300]
    if not json.loads(result.stdout.splitlines()[-1]):
        return "not comparable: with its codes shown the file computes other logits than as it ships"
    with np.load(f"{arrays}.codes.npz") as codes:
        return [codes[f"arr_{index}"] for index in range(len(zeros))]


def with_constants_folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same file with all that needs no input as initializers, quantized weights excepted; names stay."""
    folded = onnx.ModelProto()
    folded.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in folded.graph.initializer}
    kept = []
    for node in folded.graph.node:
        quantization = node.op_type in ("QuantizeLinear", "DequantizeLinear")
        if quantization or not all(name in constants for name in node.input if name):
            kept.append(node)
            continue
        feeds = {name: numpy_helper.to_array(constants[name]) for name in node.input if name}
        for name, value in zip(node.output, ReferenceEvaluator(node).run(None, feeds), strict=True):
            constants[name] = numpy_helper.from_array(np.asarray(value), name)
    del folded.graph.node[:], folded.graph.initializer[:]
    folded.graph.node.extend(kept)
    folded.graph.initializer.extend(constants.values())
    return folded
