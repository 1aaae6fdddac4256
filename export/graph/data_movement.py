"""ONNX operations that put elements in other places and compute no new values, listed once for all of the export.

`crqat.train.graph.operations` has the same of torch's operations; a test exports each of those and looks for it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import onnx

# Runtimes move a DequantizeLinear from before these to after them, so the exporter writes them on codes, where one
# DequantizeLinear after them is enough and stands right before the Add or Conv that is to be fused.
ON_CODES = ("Slice", "Pad", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "MaxPool", "Gather")
# ONNX Runtime has no rule to move a DequantizeLinear past these: what reads them reads real values.
ON_REAL_VALUES = ("DepthToSpace", "SpaceToDepth", "Tile")
# All that take one tensor and give one.
DATA_MOVEMENT = ON_CODES + ON_REAL_VALUES
# Likewise on real values, but with several results, or computed only in some modes.
PARTIAL_MOVEMENT = ("Split", "Resize", "Expand")


def moves_codes(node: onnx.NodeProto, constants: Mapping[str, npt.NDArray[Any]]) -> bool:
    """Whether the node may run on codes: its values are those of its first input in other places, apart from zeros."""
    padding = constants.get(node.input[2]) if node.op_type == "Pad" and len(node.input) > 2 else None
    return node.op_type in ON_CODES and (padding is None or not padding.any())
