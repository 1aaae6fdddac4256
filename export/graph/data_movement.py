"""Lists the ONNX operations that move elements without computing new values.

`crqat.train.graph.operations` lists torch's operations of this kind; a test exports each of them and checks that this
list has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import onnx

# Runtimes move a DequantizeLinear from before these operations to after them. The exporter therefore applies them to
# codes, with one DequantizeLinear after them, directly before the Add or Conv to be fused.
ON_CODES = ("Slice", "Pad", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "MaxPool", "Gather")
# ONNX Runtime has no rule to move a DequantizeLinear past these: their consumers take float values.
ON_REAL_VALUES = ("DepthToSpace", "SpaceToDepth", "Tile")
# All operations with one input tensor and one output tensor.
DATA_MOVEMENT = ON_CODES + ON_REAL_VALUES
# Also on float values, but with several results, or data movement in some modes only.
PARTIAL_MOVEMENT = ("Split", "Resize", "Expand")


def moves_codes(node: onnx.NodeProto, constants: Mapping[str, npt.NDArray[Any]]) -> bool:
    """Whether the node may run on codes: it only moves values of its first input, possibly adding zeros."""
    padding = constants.get(node.input[2]) if node.op_type == "Pad" and len(node.input) > 2 else None
    return node.op_type in ON_CODES and (padding is None or not padding.any())
