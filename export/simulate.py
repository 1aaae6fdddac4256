"""An integer simulator of a QDQ file: the codes that an exact integer runtime computes, from the file alone.

The arithmetic between codes is that of ONNX Runtime's CPU kernels, in float32 where they use float32: requantization
multiplies an int32 sum by (s_x s_w) / s_y and rounds half to even. Where a file asks for something else, a SiLU or a
residual Add of a float convolution for instance, values are computed in float64, together with a bound of how far a
correct float32 computation may lie from them; codes behind such values are `inexact`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from export import float_operations, integer_operations, movement, products
from export.simulated import UNIT_ROUNDOFF, Array, NotSimulated, Simulation, Sum, Value, as_float, column


def simulate(
    model: onnx.ModelProto,
    images: npt.NDArray[np.float32],
    forced: Mapping[str, Array] | None = None,
    stored_error: Mapping[str, Array] | None = None,
    grids: Mapping[str, tuple[Array, int]] | None = None,
) -> Simulation:
    """Run a QDQ file in integers.

    Args:
        model: An ONNX file written by `export.qdq`.
        images: Normalized input, float32 of shape [N, C, H, W].
        forced: See `Simulation`; with it, a difference shows where it arises and does not spread (teacher forcing).
        stored_error: See `Simulation`.
        grids: See `Simulation`.

    Raises:
        NotSimulated: The file contains an operation that is not known here.
    """
    result = Simulation(forced=forced or {}, stored_error=stored_error or {}, grids=grids or {})
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    values: dict[str, Value] = {"input": images.astype(np.float32)}
    for node in model.graph.node:
        operation = _OPERATIONS.get(node.op_type)
        if operation is None:
            msg = f"{node.name or node.output[0]}: the simulator does not know {node.op_type}"
            raise NotSimulated(msg)
        if node.op_type == "QuantizeLinear" and node.input[0] in constants:
            constants[node.output[0]] = integer_operations.quantized_constant(*(constants[name] for name in node.input))
            continue
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            continue  # a weight or a bias: read where it is used
        try:
            computed = operation(node, values, constants, model, result)
        except KeyError as missing:
            msg = f"{node.name}: the simulator does not know {node.op_type} with {missing} as it is here"
            raise NotSimulated(msg) from missing
        outputs = computed if isinstance(computed, list) else [computed]
        values.update(zip(node.output, outputs, strict=False))  # outputs that are optional
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
            msg = "logits: float32 leaves nothing of their values, so nothing is proven"
            raise NotSimulated(msg)
        result.logits_bound = approximate.error + UNIT_ROUNDOFF * np.abs(approximate.values)
        logits = approximate.values
    result.logits = logits.astype(np.float32)
    return result


_OPERATIONS: dict[str, Any] = {
    **dict.fromkeys(float_operations.FLOAT_OPERATIONS, float_operations.compute),
    "QuantizeLinear": integer_operations.quantize,
    "DequantizeLinear": integer_operations.dequantize,
    "Clip": integer_operations.clip,
    "Relu": integer_operations.relu,
    "Add": integer_operations.add,
    "GlobalAveragePool": integer_operations.global_average_pool,
    "Conv": products.conv_or_gemm,
    "Gemm": products.conv_or_gemm,
    "MatMul": products.matmul,
    "Concat": movement.concat,
    "Shape": movement.batch_shape,
    "Expand": movement.expand,
    "Cast": movement.cast,
    "Split": movement.split,
    "Resize": movement.resize,
    **dict.fromkeys(movement.SELECTING, movement.select),
    **dict.fromkeys(movement.MOVING, movement.move),
}
