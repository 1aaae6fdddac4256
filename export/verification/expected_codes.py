"""Writes the integer codes of a few images; on a board, `measure.codes` compares the runtime's codes with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from crqat.core.targets import ONNXRUNTIME
from crqat.export.qdq.write import QDQModel
from crqat.export.simulator.run import simulate
from crqat.export.simulator.values import NotSimulated
from crqat.export.verification.fusion import in_float

# Number of images. All codes are stored: 0.3 million per image for a CIFAR ResNet-20, 11 million for a ResNet-50.
IMAGES = 2


def expected_codes(file: QDQModel, images: npt.NDArray[np.float32], out: Path) -> bool:
    """Write the simulator's codes for each CPU family of the runtime.

    Args:
        file: The file for ONNX Runtime.
        images: Normalized images, float32 [N, C, H, W]; only the first few are used.
        out: Path of the .npz file.

    Returns:
        Whether the file was written. No file is written if the simulator does not support an operation, or if all codes
        depend on inexact ones.
    """
    images = np.ascontiguousarray(images[:IMAGES])
    first, *others = ONNXRUNTIME.cpus
    try:
        simulations = [simulate(file.model, images, add_kernel=first.add_kernel)]
        seen = in_float(file.model)
        if seen:
            simulations = [simulate(file.model, images, in_float=seen, add_kernel=first.add_kernel)]
        simulations += [simulate(file.model, images, in_float=seen, add_kernel=each.add_kernel) for each in others]
    except NotSimulated:
        return False
    zero_points = {name: file.activations[edge].grid.zero_point for edge, names in file.codes.items() for name in names}
    # The board has no simulator, so codes that depend on an inexact code cannot be recomputed there and are left out.
    doubtful = _behind(file.model, simulations[0].inexact)
    exact = [name for name in zero_points if name not in doubtful]
    if not exact:
        return False
    shown = onnx.ModelProto()
    shown.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.UINT8, None) for name in exact)
    codes = [
        np.concatenate([(simulation.codes[name] + zero_points[name]).astype(np.uint8).reshape(-1) for name in exact])
        for simulation in simulations
    ]
    np.savez_compressed(
        out,
        images=images,
        names=np.array(exact),
        codes=codes[0],
        families=np.array([family.name for family in ONNXRUNTIME.cpus]),
        changes=np.array([codes[0] ^ own for own in codes[1:]]),
        left_out=np.array(len(zero_points) - len(exact)),
        outputs=np.frombuffer(shown.SerializeToString(), np.uint8),
    )
    return True


def _behind(model: onnx.ModelProto, tensors: set[str]) -> set[str]:
    """Return the given tensors and all tensors computed from them."""
    reached = set(tensors)
    for node in model.graph.node:  # in topological order, as ONNX requires
        if reached.intersection(node.input):
            reached.update(node.output)
    return reached
