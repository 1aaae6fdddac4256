"""Networks with Grids of each method, verified on their files: zero points, and weights that are transformed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from crqat.core.errors import UsageError
from crqat.core.results.verification import Verification
from crqat.export.qdq.lint import lint
from crqat.export.qdq.lower import lower_activation
from crqat.export.qdq.write import QDQModel
from crqat.export.verification.checks import verify
from crqat.export.verification.fusion import fusion
from crqat.train.config import QuantizationConfig, Target
from tests.export.conftest import Quantized, quantize, random_images, sane_bn

ALONE: tuple[Target, ...] = ("onnxruntime",)


class Residual(nn.Module):
    """Signed edges of every kind: the input, a linear bottleneck, both sides of an Add, padding, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.bn3 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.conv4, self.fc = nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of images."""
        x = self.bn1(self.conv1(x))
        y = functional.relu(self.bn2(self.conv2(x)))
        x = x + self.bn3(self.depthwise(y))
        x = functional.max_pool2d(x, 3, 2, 1)
        x = functional.pad(x, (1, 1, 1, 1))
        return self.fc(self.conv4(x).mean([2, 3]))  # type: ignore[no-any-return]


def made(config: QuantizationConfig, targets: tuple[Target, ...] = ALONE) -> Quantized:
    torch.manual_seed(0)
    images = random_images(8, 3, 16, 16) + 0.7
    network = sane_bn(Residual(), images)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.add_(0.8)  # far from symmetric
    return quantize(network, images, targets=targets, config=config)


def proof_of(quantized: Quantized, targets: tuple[Target, ...]) -> dict[str, Verification]:
    files: dict[str, QDQModel] = {target: quantized.file(target) for target in targets}
    for target, file in files.items():
        assert lint(file.model, target) == []
    return verify(quantized.model, quantized.grids, files, quantized.images)


@pytest.mark.parametrize("bits", [8, 4])
def test_learned_zero_points_are_exact_in_onnx_runtime(bits: int) -> None:
    quantized = made(QuantizationConfig("lsq+", "lsq+", weights=bits, activations=bits))
    zero_points = {edge: grid.zero_point for edge, grid in quantized.grids.items()}
    signed = {spec.edge for spec in quantized.specs if spec.kind == "activation" and spec.qmin < 0}
    assert len(signed) >= 4
    assert all(zero_points[edge] != 0 for edge in signed)
    assert not any(zero for edge, zero in zero_points.items() if edge not in signed)
    proof = proof_of(quantized, ALONE)["onnxruntime"]
    assert proof.status == "passed", proof
    assert proof.differing_codes == 0 and proof.codes > 10_000
    fused = fusion(quantized.file("onnxruntime").model)
    assert fused.complete, fused.in_float


def test_the_proof_sees_a_zero_point_that_moved() -> None:
    quantized = made(QuantizationConfig("lsq+", "lsq+"))
    edge = next(spec.edge for spec in quantized.specs if spec.kind == "activation" and spec.qmin < 0)
    offset = quantized.model.get_submodule("quantizers").get_parameter(f"{edge_module(quantized, edge)}.offset")
    with torch.no_grad():
        offset.add_(40 * float(quantized.grids[edge].scale[0]))  # a step or two only move the ends of the range
    assert proof_of(quantized, ALONE)["onnxruntime"].status.startswith("failed: torch: ")


def edge_module(quantized: Quantized, edge: str) -> str:
    return next(spec.module_name for spec in quantized.specs if spec.edge == edge)


def test_tensorrt_refuses_a_zero_point() -> None:
    quantized = made(QuantizationConfig(activation_method="lsq+"))
    with pytest.raises(UsageError, match="TensorRT refuses zero points other than 0"):
        quantized.file("tensorrt")
    assert lower_activation(next(iter(quantized.grids.values())), "onnxruntime").grid.qmin == 0


@pytest.mark.parametrize("bits", [8, 4])
def test_dorefas_codes_are_those_of_the_forward_pass(bits: int) -> None:
    targets: tuple[Target, ...] = ("onnxruntime", "tensorrt")
    quantized = made(QuantizationConfig("dorefa", "pact", weights=bits, activations=bits), targets)
    proof = proof_of(quantized, targets)
    assert {entry.status for entry in proof.values()} == {"passed"}, proof
    assert proof["onnxruntime"].differing_codes == 0
    for spec in quantized.specs:
        if spec.kind != "weight":
            continue
        module, grid = quantized.model.get_submodule(f"quantizers.{spec.module_name}"), quantized.grids[spec.edge]
        latent = dict(quantized.model.named_parameters())[f"{spec.operation}.weight"].detach()
        forward = module(latent).detach().numpy()
        np.testing.assert_array_equal(grid.dequantize(grid.quantize(quantized.latent[spec.edge])), forward)
    # Without the transformation verification would fail: tanh moves codes.
    weights = {name: value for name, value in quantized.model.named_parameters() if value.ndim > 1}
    moved = [spec for spec in quantized.specs if spec.kind == "weight" and bits == 8 and (
        quantized.grids[spec.edge].quantize(weights[f"{spec.operation}.weight"].detach().numpy())
        != quantized.grids[spec.edge].quantize(quantized.latent[spec.edge])
    ).any()]  # fmt: skip
    assert bits == 4 or len(moved) >= 3
