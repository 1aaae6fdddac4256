"""The integer codes of a few images, for a board to compare its own with; `measure.codes` reads them there."""

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

# Every code of each image is stored: 0.3 million for a CIFAR ResNet-20, 11 million for a ResNet-50.
IMAGES = 2


def expected_codes(file: QDQModel, images: npt.NDArray[np.float32], out: Path) -> bool:
    """Write the simulator's codes, for each family of CPUs that the runtime knows.

    Args:
        file: ONNX Runtime's file.
        images: Normalized images, float32 [N, C, H, W]; the first few are taken.
        out: The .npz file.

    Returns:
        Whether it was written: not if the file has an operation that the simulator does not know, nor if none of its
        codes is exact.
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
    # One inexact code may be another's input: there is no simulator on the board to start anew from the board's own.
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
    """The tensors and all that are computed from them."""
    reached = set(tensors)
    for node in model.graph.node:  # in the order of computation, as ONNX demands
        if reached.intersection(node.input):
            reached.update(node.output)
    return reached
