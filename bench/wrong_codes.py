"""Counts codes that ONNX Runtime computes differently from a QDQ file's definition, for files of any exporter.

ONNX Runtime runs the file with every optimization and outputs the codes of every activation. `export.simulator.run`
recomputes each code, in integers or in float64, from ONNX Runtime's own codes before it (teacher forcing: a difference
counts where it arises and does not spread). A code is wrong if no correct float32 computation of its value gives it;
see `crqat.core.compare_codes`. The same rule therefore applies to files in float and in integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from bench import onnxruntime_process
from crqat.core.compare_codes import Tie, compare_codes
from crqat.export.simulator.run import simulate
from crqat.export.simulator.values import NotSimulated


def differing_codes(
    path: Path, images: npt.NDArray[np.float32], folder: Path, cpu: str | None = None
) -> dict[str, Any]:
    """Run a file in ONNX Runtime and count the wrong codes, as the module's docstring defines them.

    Args:
        path: A QDQ file with "input" and "logits".
        images: Normalized images, float32 [N, C, H, W].
        folder: For scratch files.
        cpu: CPU model of qemu; None for this machine's CPU.

    Returns:
        {"status": "counted" | "not comparable: ..." | "not run: ...", "codes", "wrong", "largest", "images"}; `largest`
        is the largest difference among the wrong ones, in codes.
    """
    entry: dict[str, Any] = {"status": "counted", "codes": None, "wrong": None, "largest": None, "images": len(images)}
    lacking = onnxruntime_process.missing(cpu)
    if lacking is not None:
        return {**entry, "status": f"not run: {lacking}"}
    model = with_constants_folded(onnx.load(path))
    if any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer):
        # The bound of a tie holds for float32 only.
        return {**entry, "status": "not comparable: computes in float16"}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    quantizers = [n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] not in constants]
    names = [node.output[0] for node in quantizers]
    zeros = {node.output[0]: constants[node.input[2]] for node in quantizers}
    try:
        ran = shown_codes(path, zeros, images, folder, cpu)
        integers = {name: codes.astype(np.int32) - int(zeros[name]) for name, codes in zip(names, ran, strict=True)}
        simulation = simulate(model, images, forced=integers)
    except onnxruntime_process.NotRun as reason:
        return {**entry, "status": str(reason)}
    except NotSimulated as reason:
        return {**entry, "status": f"not comparable: {reason}"}
    ties = {name: Tie(simulation.before_rounding[name], simulation.bounds[name]) for name in names}
    counted = compare_codes({name: (simulation.codes[name], integers[name]) for name in names}, ties)
    return {**entry, "codes": counted.codes, "wrong": counted.wrong, "largest": counted.largest}


def shown_codes(
    path: Path,
    zeros: Mapping[str, npt.NDArray[Any]],
    images: npt.NDArray[np.float32],
    folder: Path,
    cpu: str | None = None,
) -> list[npt.NDArray[Any]]:
    """Run a file in ONNX Runtime and return the codes of each tensor in `zeros`, in that order.

    Args:
        path: A QDQ file with "logits".
        zeros: Zero points by tensor of codes; their type is that of the codes.
        images: Normalized images, float32 [N, C, H, W].
        folder: For scratch files.
        cpu: CPU model of qemu; None for this machine's CPU.

    Raises:
        NotRun: There are no codes to compare; see `onnxruntime_process.outputs`.
    """
    model = onnx.load(path)
    for name, zero in zeros.items():
        kind = helper.np_dtype_to_tensor_dtype(zero.dtype)
        model.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    shown = folder / "shown.onnx"
    onnx.save(model, shown)
    logits, *codes = onnxruntime_process.outputs(shown, ["logits", *zeros], images, folder, cpu)
    (shipped,) = onnxruntime_process.outputs(path, ["logits"], images, folder, cpu)
    if not (logits == shipped).all():
        msg = "not comparable: with its codes shown the file computes other logits than as it ships"
        raise onnxruntime_process.NotRun(msg)
    return codes


def with_constants_folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a model in which initializers of the same names replace nodes that only have constant inputs.

    QuantizeLinear and DequantizeLinear nodes stay.
    """
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
