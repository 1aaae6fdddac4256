"""The claim that no kernel saturates on x86 without VNNI, checked on such a CPU whatever this one is.

Most machines that run these tests have VNNI, where U8S8 kernels are exact anyway. qemu's user mode gives an AVX2 CPU
without it: ONNX Runtime then picks the kernels that add two products in 16 bits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from bench import onnxruntime_process
from bench.onnxruntime_process import WITHOUT_VNNI
from crqat.core.compare_codes import compare_codes
from crqat.export.simulator.run import simulate
from crqat.train.data import sources
from crqat.train.models import build as models
from tests.export.conftest import quantize
from tests.needs import require


def outputs_without_vnni(
    folder: Path, model: onnx.ModelProto, images: np.ndarray, names: list[str]
) -> list[np.ndarray]:
    require("qemu")  # no CPU without VNNI to check on
    onnx.save(model, folder / "model.onnx")
    return onnxruntime_process.outputs(folder / "model.onnx", names, images, folder, WITHOUT_VNNI)


def test_full_range_codes_do_saturate_there(tmp_path: Path) -> None:
    """The control: without it, a CPU that does not saturate would prove anything."""
    rng = np.random.default_rng(0)
    weight = rng.choice([-127, 127], (8, 16, 3, 3)).astype(np.int8)
    codes = rng.choice([0, 255], (1, 16, 8, 8)).astype(np.uint8)
    constants = {
        "x_scale": np.float32(1), "x_zero": np.uint8(0), "w": weight, "w_scale": np.ones(8, np.float32),
        "w_zero": np.zeros(8, np.int8), "y_scale": np.float32(4096), "y_zero": np.uint8(128),
    }  # fmt: skip
    inputs = ["input", "x_scale", "x_zero", "w", "w_scale", "w_zero", "y_scale", "y_zero"]
    graph = helper.make_graph(
        [helper.make_node("QLinearConv", inputs, ["y"], pads=[1, 1, 1, 1])],
        "saturating",
        [helper.make_tensor_value_info("input", TensorProto.UINT8, [1, 16, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [1, 8, 8, 8])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    sums = torch.nn.functional.conv2d(torch.from_numpy(codes).double(), torch.from_numpy(weight).double(), padding=1)
    exact = np.clip(np.rint(sums.numpy() / 4096) + 128, 0, 255).astype(np.int64)
    (saturated,) = outputs_without_vnni(tmp_path, model, codes, ["y"])
    assert compare_codes({"y": (exact, saturated)}).wrong > 100


@pytest.mark.parametrize("bits", [8, 4])
def test_our_codes_are_exact_there(tmp_path: Path, bits: int) -> None:
    dataset = sources.load("digits", None, False)
    images = dataset.preprocessing(dataset.train_images[:64].numpy())
    torch.manual_seed(0)
    network = models.build("cifar/resnet20", 10, 1).eval()
    file = quantize(network, torch.from_numpy(images), bits).file("onnxruntime")
    simulation = simulate(file.model, images)
    tensors = [(name, edge) for edge, names in file.codes.items() for name in names]
    expected = {}
    for name, edge in tensors:
        file.model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.UINT8, None))
        expected[name] = simulation.codes[name] + file.activations[edge].grid.zero_point
    ran = outputs_without_vnni(tmp_path, file.model, images, list(expected))
    counted = compare_codes({name: (codes, own) for (name, codes), own in zip(expected.items(), ran, strict=True)})
    assert counted.codes > 100_000 and counted.differing == 0
