"""Multiplications of known networks, counted from their graphs."""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from crqat.export.graph.from_torch import marked_graph
from crqat.export.graph.macs import file_macs, macs
from crqat.export.graph.onnx_graph import Graph
from crqat.train.config import QuantizationConfig
from crqat.train.models import build as models
from crqat.train.quantized_model import quantize_model
from crqat.train.quantizers import LSQQuantizer
from tests.export.conftest import quantize, random_images, sane_bn


def graph_of(name: str, size: int, classes: int = 1000) -> Graph:
    network = models.build(name, classes, 3).eval()
    example = torch.zeros(2, 3, size, size)
    model = quantize_model(network, example, QuantizationConfig(), ("onnxruntime",), LSQQuantizer)
    return marked_graph(model, [3, size, size], classes)


def test_macs_of_resnet18() -> None:
    counted = macs(graph_of("torchvision/resnet18", 224))
    assert (len(counted), sum(counted.values())) == (21, 1_814_073_344)
    assert counted["conv1"] == 112 * 112 * 64 * 7 * 7 * 3
    assert counted["fc"] == 512 * 1000


def test_macs_of_resnet20() -> None:
    """By hand: 3x3 convolutions on 32, 16 and 8 pixels with 16, 32 and 64 channels."""
    stages = [(32, 16, 16), (16, 16, 32), (8, 32, 64)]
    by_hand = 32 * 32 * 3 * 9 * 16 + 64 * 10
    by_hand += sum(size * size * 9 * (inner * width + 5 * width * width) for size, inner, width in stages)
    counted = macs(graph_of("cifar/resnet20", 32, 10))
    assert (len(counted), sum(counted.values())) == (20, by_hand)
    assert round(by_hand / 1e6, 2) == 40.55


def test_macs_of_resnet8() -> None:
    """MLPerf Tiny's: by hand; its paper (arXiv 2106.07597) has 12.5 million and 78,000 parameters."""
    by_hand = 32 * 32 * 9 * (3 * 16 + 2 * 16 * 16) + 64 * 10
    by_hand += 16 * 16 * (9 * (16 * 32 + 32 * 32) + 16 * 32) + 8 * 8 * (9 * (32 * 64 + 64 * 64) + 32 * 64)
    counted = macs(graph_of("cifar/resnet8", 32, 10))
    assert (len(counted), sum(counted.values())) == (10, by_hand)
    assert round(by_hand / 1e6, 1) == 12.5
    assert round(sum(p.numel() for p in models.build("cifar/resnet8", 10, 3).parameters()) / 1e3) == 78


def test_macs_of_grouped_convolutions() -> None:
    """mobilenet_v2 at 224 px: 300.8 million."""
    assert round(sum(macs(graph_of("torchvision/mobilenet_v2", 224)).values()) / 1e6, 1) == 300.8


def test_macs_of_a_file_are_those_of_the_graph_that_it_was_made_from() -> None:
    for name in ("cifar/resnet20", "cifar/mobilenet_v2"):
        images = random_images(2, 3, 32, 32)
        quantized = quantize(sane_bn(models.build(name, 10, 3), images), images)
        expected = macs(quantized.graph)
        assert file_macs(quantized.file("tensorrt", "float16").model) == expected
        assert file_macs(quantized.file("onnxruntime").model) == expected


def test_macs_of_nodes_without_names_and_of_files_that_do_not_tell() -> None:
    def model(height: int | str, batch: int | str = "batch") -> onnx.ModelProto:
        sizes = {"w": (8, 3, 3, 3), "m": (5, 7), "h": (8, 2)}
        nodes = [
            helper.make_node("Conv", ["input", "w"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("MatMul", ["c", "m"], ["d"], "matmul"),
            helper.make_node("GlobalAveragePool", ["d"], ["p"]),
            helper.make_node("Flatten", ["p"], ["f"]),
            helper.make_node("Gemm", ["f", "h"], ["logits"], "gemm"),
        ]
        constants = [numpy_helper.from_array(np.ones(size, np.float32), name) for name, size in sizes.items()]
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, height, 5])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 2])],
            constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    conv, matmul, gemm = 8 * 4 * 5 * 3 * 9, 8 * 4 * 7 * 5, 2 * 8
    assert file_macs(model(4)) == {"node_of_c": conv, "matmul": matmul, "gemm": gemm}
    assert file_macs(model("height")) is None
    assert file_macs(model(4, 6)) == file_macs(model(4))  # of one image, whatever the batch


def test_macs_of_a_linear_layer_on_a_sequence_count_each_of_its_rows() -> None:
    """A dynamic batch leaves the rows of a flattened sequence open; they count for one image all the same."""
    constants: dict[str, np.ndarray] = {"rows": np.array([-1, 4], np.int64), "w": np.ones((8, 4), np.float32)}
    graph = helper.make_graph(
        [
            helper.make_node("Reshape", ["input", "rows"], ["flat"]),
            helper.make_node("Gemm", ["flat", "w"], ["logits"], "linear", transB=1),
        ],
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 5, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", 8])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    assert file_macs(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])) == {"linear": 5 * 4 * 8}


def test_macs_of_transposed_convolutions() -> None:
    """Each of the 4 x 8 x 8 inputs meets the 3 x 2 x 2 weights of its channel in its group."""
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU(), torch.nn.ConvTranspose2d(4, 6, 2, 2, groups=2),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
    )  # fmt: skip
    graph = quantize(network, random_images(2, 3, 8, 8)).graph
    assert macs(graph) == {"0": 3 * 4 * 64, "2": 4 * 64 * 3 * 4}
