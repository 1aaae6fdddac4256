"""Simulates a QDQ file with exact integers: computes, from the file alone, the codes of an integer runtime.

Operations on codes are computed as in ONNX Runtime's CPU kernels, in float32 where these kernels use float32:
requantization multiplies an int32 sum by (s_x s_w) / s_y and rounds half to even. The kernel that adds codes differs
between CPU families; `Simulation.add_kernel` chooses the one to simulate. Other operations, such as a SiLU or a
residual Add of a float convolution, are computed in float64, with a bound on the error of a correct float32
computation; the codes that a quantizer computes from such values are `inexact`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from crqat.core.targets import AddKernel
from crqat.export.graph.data_movement import DATA_MOVEMENT
from crqat.export.simulator import float_ops, integer_ops, matmul_ops, movement_ops
from crqat.export.simulator.values import UNIT_ROUNDOFF, Array, NotSimulated, Simulation, Sum, Value, as_float, column


def simulate(
    model: onnx.ModelProto,
    images: npt.NDArray[np.float32],
    forced: Mapping[str, Array] | None = None,
    stored_error: Mapping[str, Array] | None = None,
    grids: Mapping[str, tuple[Array, int]] | None = None,
    in_float: Collection[str] = (),
    add_kernel: AddKernel = "float32",
) -> Simulation:
    """Run a QDQ file in integers.

    Args:
        model: An ONNX file written by `crqat.export.qdq.write`.
        images: Normalized input, float32 of shape [N, C, H, W].
        forced: Codes by tensor name, integers minus the zero point: later operations receive them instead of the
            computed codes. A difference from the computed codes then appears only in the tensor where it arises, and
            does not spread to later tensors (teacher forcing).
        stored_error: Errors of the file's constants and biases against the network's values, by name; see
            `Simulation.stored_error`.
        grids: Scale and zero point, by name of a tensor of codes, that replace those in the file.
        in_float: Names of nodes that the runtime computes in float although their inputs are codes.
        add_kernel: How the runtime adds two tensors of codes; see `crqat.core.targets.CpuFamily`.

    Raises:
        NotSimulated: The simulator does not support an operation of the file.
    """
    result = Simulation(
        forced=forced or {},
        stored_error=stored_error or {},
        grids=grids or {},
        in_float=in_float,
        add_kernel=add_kernel,
    )
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    values: dict[str, Value] = {"input": images.astype(np.float32)}
    for node in model.graph.node:
        integers = movement_ops.sizes(node, values, constants)
        if integers is not None:
            values[node.output[0]] = integers
            continue
        operation = _OPERATIONS.get(node.op_type)
        if operation is None:
            msg = f"{node.name or node.output[0]}: the simulator does not support {node.op_type}"
            raise NotSimulated(msg)
        if node.op_type == "QuantizeLinear" and node.input[0] in constants:
            constants[node.output[0]] = integer_ops.quantized_constant(node, constants)
            continue
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            continue  # a weight or a bias: evaluated where it is used
        try:
            computed = operation(node, values, constants, model, result)
        except KeyError as missing:
            msg = f"{node.name}: the simulator does not know {missing}, an input or attribute that {node.op_type} needs"
            raise NotSimulated(msg) from missing
        outputs = computed if isinstance(computed, list) else [computed]
        values.update(zip(node.output, outputs, strict=False))  # some outputs are optional
    logits = values["logits"]
    result.real_logits = as_float(logits)
    if isinstance(logits, Sum):
        # QGemm: one multiplication of the int32 sum.
        total = (logits.sums + column(logits.bias, logits.sums)).astype(np.float32)
        total = total * column(logits.unit, total)
        logits = np.maximum(total, 0) if logits.relu else total
    if not isinstance(logits, np.ndarray):
        approximate = as_float(logits)
        if approximate.error.size and not np.isfinite(approximate.error).any():
            msg = "logits: the possible float32 error has no bound for any value, so they cannot be verified"
            raise NotSimulated(msg)
        result.logits_bound = approximate.error + UNIT_ROUNDOFF * np.abs(approximate.values)
        logits = approximate.values
    result.logits = logits.astype(np.float32)
    return result


_OPERATIONS: dict[str, Any] = {
    **dict.fromkeys(float_ops.FLOAT_OPERATIONS, float_ops.compute),
    "QuantizeLinear": integer_ops.quantize,
    "DequantizeLinear": integer_ops.dequantize,
    "Clip": integer_ops.clip,
    "Relu": integer_ops.relu,
    "Add": integer_ops.add,
    "GlobalAveragePool": integer_ops.global_average_pool,
    "Conv": matmul_ops.conv_or_gemm,
    "ConvTranspose": matmul_ops.conv_or_gemm,
    "Gemm": matmul_ops.conv_or_gemm,
    "MatMul": matmul_ops.matmul,
    "Concat": movement_ops.concat,
    "ConstantOfShape": movement_ops.constant_of_shape,
    "Expand": movement_ops.expand,
    "Cast": movement_ops.cast,
    "Split": movement_ops.split,
    "Resize": movement_ops.resize,
    **dict.fromkeys(movement_ops.SELECTING, movement_ops.select),
    **dict.fromkeys(DATA_MOVEMENT, movement_ops.move),
}
