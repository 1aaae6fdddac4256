"""Activations, joins and pools other than ResNet's: what they become in ONNX Runtime, and their verification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crqat.core.typed_json import to_json
from crqat.export.qdq.write import QDQModel
from crqat.export.simulator import float_ops
from crqat.export.simulator import run as simulate
from crqat.export.simulator.values import Float, Pooled
from crqat.export.verification.checks import verify
from crqat.export.verification.fusion import fusion, in_float
from crqat.train.config import QuantizationConfig, Target
from tests.export.conftest import BOTH, Quantized, edited_file, initializer, quantize, random_images

ALONE: tuple[Target, ...] = ("onnxruntime",)


class Net(nn.Module):
    """Two convolutions with something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.between = between
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def middle(self, x: Tensor) -> Tensor:
        """From the first convolution to the second."""
        return self.between(self.bn1(self.conv1(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        return self.fc(F.relu(self.conv2(self.middle(x))).mean([2, 3]))  # type: ignore[no-any-return]


class Joined(Net):
    """Both halves of a tensor are convolved and joined."""

    def __init__(self) -> None:
        super().__init__(nn.ReLU())
        self.conv3 = nn.Conv2d(8, 4, 1)

    def middle(self, x: Tensor) -> Tensor:
        """As above."""
        x = super().middle(x)
        return torch.cat([F.relu(self.conv3(x)), x[:, :4]], dim=1)


class Shuffled(Net):
    """A channel shuffle whose sizes come from the tensor, and the halves in turn."""

    def middle(self, x: Tensor) -> Tensor:
        """As above."""
        x = super().middle(x)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        first, second = x.chunk(2, dim=1)
        return torch.cat([second, first], dim=1)


class SqueezeExcite(Net):
    """Channels weighted by what a small network makes of their means."""

    def __init__(self) -> None:
        super().__init__(nn.SiLU())
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def middle(self, x: Tensor) -> Tensor:
        """As above."""
        x = super().middle(x)
        return x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class JoinedBy(Net):
    """A tensor and its convolution, joined by a function of two."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(nn.ReLU())
        self.join, self.conv3 = join, nn.Conv2d(8, 8, 1)

    def middle(self, x: Tensor) -> Tensor:
        """As above."""
        x = super().middle(x)
        return self.join(x, self.conv3(x))


class EndsInPool(Net):
    """Like SqueezeNet: the logits are means of a convolution's output."""

    def __init__(self) -> None:
        super().__init__(nn.ReLU())
        self.last = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        """As above."""
        return torch.flatten(F.adaptive_avg_pool2d(F.relu(self.last(self.middle(x))), 1), 1)


class Rows(nn.Module):
    """Convolutions and pools of one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(48, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        x = F.max_pool1d(F.relu(self.first(x.flatten(1, 2))), 3, 2, ceil_mode=True)
        x = F.relu(self.second(F.avg_pool1d(x, 3, 2, 1)))
        return self.fc(F.max_pool1d(x, 4).flatten(1))  # type: ignore[no-any-return]


class Volumes(Net):
    """Pools of three dimensions."""

    def middle(self, x: Tensor) -> Tensor:
        """As above."""
        x = F.relu(super().middle(x)).reshape(-1, 2, 4, 16, 16)
        return (F.max_pool3d(x, 3, 1, 1, dilation=1) + F.avg_pool3d(x, 3, 1, 1)).flatten(1, 2)


class Transposed(Net):
    """A transposed convolution with uneven edges, one in groups, one with a BatchNorm behind."""

    def __init__(self) -> None:
        super().__init__(nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 8, 3, 2, 1, output_padding=1)
        self.grouped = nn.ConvTranspose2d(8, 8, 3, 1, 1, groups=2)
        self.last, self.bn2 = nn.ConvTranspose2d(8, 8, 2, 1, dilation=2, bias=False), nn.BatchNorm2d(8)

    def middle(self, x: Tensor) -> Tensor:
        """As above."""
        x = F.relu(self.grouped(F.relu(self.up(super().middle(x)))))
        return F.relu(self.bn2(self.last(x)))


class EndsIn(Net):
    """Behind the last layer comes a function."""

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__(nn.ReLU())
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        """As above."""
        return self.end(super().forward(x))


def proven(network: nn.Module, targets: tuple[Target, ...]) -> tuple[Quantized, dict[str, Any], dict[str, Any]]:
    """A quantized network, its verification and what ONNX Runtime fuses."""
    quantized = quantize(network, random_images(8, 3, 16, 16), targets=targets)
    files: dict[str, QDQModel] = {target: quantized.file(target) for target in targets}
    proof = verify(quantized.model, quantized.grids, files, quantized.images)
    return quantized, to_json(proof), to_json(fusion(files["onnxruntime"].model))


FUSED: dict[str, Callable[[], nn.Module]] = {
    "relu6": lambda: Net(nn.ReLU6()),
    "clamp of negative values": lambda: Net(lambda x: x.clamp(min=0)),
    "clamp to six": lambda: Net(lambda x: torch.clamp(x, 0, 6)),
    "clamp to one": lambda: Net(lambda x: x.clip(0.0, 1.0)),
    "hardtanh from zero": lambda: Net(nn.Hardtanh(0, 4)),
    "padded to the same size": lambda: Net(
        nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, (5, 2), padding="same"), nn.ReLU())
    ),
    "average pool": lambda: Net(lambda x: F.avg_pool2d(F.relu(x), 2)),
    "padded average pool": lambda: Net(lambda x: F.avg_pool2d(F.relu(x), 3, 2, 1)),
    "average pool up to the last pixel": lambda: Net(lambda x: F.avg_pool2d(F.relu(x), 3, 2, 0, ceil_mode=True)),
    "average pool beyond its padding": lambda: Net(lambda x: F.avg_pool2d(F.relu(x), 3, 2, 1, ceil_mode=True)),
    "average pool without its padding": lambda: Net(lambda x: F.avg_pool2d(F.relu(x), 3, 2, 1, True, False)),
    "average pool that skips pixels": lambda: Net(lambda x: F.avg_pool2d(F.relu(x), 1, 4, 0, ceil_mode=True)),
    "pad": lambda: Net(lambda x: F.pad(F.relu(x), (1, 2, 0, 1))),
    "reflect": lambda: Net(lambda x: F.pad(x, (1, 1, 2, 2), "reflect")),
    "leaky relu": lambda: Net(nn.LeakyReLU(0.1)),
    "concat": Joined,
    "shuffle": lambda: Shuffled(nn.ReLU()),
}


@pytest.mark.parametrize("targets", [ALONE, BOTH])
@pytest.mark.parametrize("name", FUSED)
def test_these_run_in_integers(name: str, targets: tuple[Target, ...]) -> None:
    torch.manual_seed(0)
    _, proof, fused = proven(FUSED[name](), targets)
    assert {target: entry["status"] for target, entry in proof.items()} == dict.fromkeys(targets, "passed")
    assert proof["onnxruntime"]["differing_codes"] == 0
    assert fused["float"] == [] and fused["complete"]
    operations = fused["operations"]
    assert operations["QLinearConv"] == (3 if name in ("concat", "padded to the same size") else 2)
    assert operations.get("QLinearAveragePool", 0) == ("average" in name)
    assert operations.get("QLinearLeakyRelu", 0) == (name == "leaky relu")
    # Sizes that the forward pass computes are constants in the file.
    assert not {"Shape", "Gather", "Unsqueeze", "Div", "Mul"}.intersection(operations)


FLOAT: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "hardswish": (lambda: Net(nn.Hardswish()), {"HardSwish": "ONNX Runtime has no integer kernel for HardSwish"}),
    "silu": (lambda: Net(nn.SiLU()), {"Sigmoid": "Mul stands between it and a quantizer"}),
    "hardsigmoid": (
        lambda: Net(nn.Hardsigmoid()),
        {"HardSigmoid": "ONNX Runtime has no integer kernel for HardSigmoid"},
    ),
    "hardtanh": (lambda: Net(nn.Hardtanh()), {"Clip": "ONNX Runtime has no integer kernel for a Clip of both signs"}),
    "clamp": (
        lambda: Net(lambda x: x.clamp(-1, 2)),
        {"Clip": "ONNX Runtime has no integer kernel for a Clip of both signs"},
    ),
    "elu": (lambda: Net(nn.ELU(0.5)), {"Elu": "ONNX Runtime has no integer kernel for Elu"}),
    "gelu": (lambda: Net(nn.GELU()), {"Erf": "ONNX Runtime has no integer kernel for Erf"}),
    "prelu": (lambda: Net(nn.PReLU(8)), {"PRelu": "ONNX Runtime has no integer kernel for PRelu"}),
    "tanh": (lambda: Net(nn.Tanh()), {"Tanh": "ONNX Runtime has no integer kernel for Tanh"}),
    "squeeze and excite": (SqueezeExcite, {"Sigmoid": "Mul stands between it and a quantizer"}),
    "ends in a pool": (EndsInPool, {"GlobalAveragePool": "its result is the network's output, which is not quantized"}),
}


@pytest.mark.parametrize("targets", [ALONE, BOTH])
@pytest.mark.parametrize("name", FLOAT)
def test_these_stay_float_with_a_reason_and_a_bound(name: str, targets: tuple[Target, ...]) -> None:
    torch.manual_seed(0)
    make, reasons = FLOAT[name]
    _, proof, fused = proven(make(), targets)
    assert {target: entry["status"] for target, entry in proof.items()} == dict.fromkeys(targets, "passed")
    stayed = {entry["operation"]: entry["reason"] for entry in reversed(fused["float"])}
    assert reasons.items() <= stayed.items()
    # The convolutions around the activation are integer all the same, and those of squeeze-and-excitation.
    assert fused["operations"]["QLinearConv"] == (4 if name == "squeeze and excite" else 2)
    link = proof["onnxruntime"]["links"]["runtime"]
    if name != "ends in a pool":
        assert 0 < link["inexact"] < link["codes"]
        assert link["inexact_farthest_from_tie"] <= link["inexact_largest_bound"] < 0.02


COMPUTED: dict[str, Callable[[], nn.Module]] = {
    "log softmax at the end": lambda: EndsIn(nn.LogSoftmax(1)),
    "normalized at the end": lambda: EndsIn(lambda x: F.normalize(x, dim=1)),
    "layer norm by hand at the end": lambda: EndsIn(
        lambda x: (x + 30 - (x + 30).mean(1, True)) / torch.sqrt(((x - x.mean(1, True)) ** 2).mean(1, True) + 1e-5)
    ),
    "instance norm": lambda: Net(lambda x: F.relu(F.instance_norm(x))),
    "max": lambda: JoinedBy(torch.maximum),
    "subtraction": lambda: JoinedBy(torch.sub),
    "quotient": lambda: JoinedBy(lambda a, b: a / (1 + b.abs())),
    "power": lambda: Net(lambda x: F.relu(x) ** 1.5),
    "mish": lambda: Net(nn.Mish()),
    "softshrink": lambda: Net(nn.Softshrink(0.3)),
    "bilinear": lambda: Net(lambda x: F.interpolate(F.relu(x), scale_factor=2, mode="bilinear")),
    "pad": lambda: Net(lambda x: F.pad(F.relu(x), (1, 1, 1, 1), value=-1.0)),
    "pixel shuffle": lambda: Net(lambda x: F.pixel_shuffle(F.relu(x).repeat(1, 4, 1, 1), 2)),
    "zeros of a computed size": lambda: Net(
        lambda x: F.relu(x) + torch.cat([torch.zeros_like(x[:, :4]), x.new_ones(x.shape[0], 4, 16, 16)], 1)
    ),
    "pool of another divisor": lambda: Net(
        lambda x: (
            F.avg_pool2d(F.relu(x), 3, 2, 1, divisor_override=4)
            + F.avg_pool2d(x.abs(), 3, 2, 1, ceil_mode=True, divisor_override=7)[..., :8, :8]
        )
    ),
    "transposed convolutions": Transposed,
    "rows": Rows,
    "volumes": lambda: Volumes(nn.ReLU()),
    "split": lambda: Net(lambda x: torch.cat(torch.split(F.relu(x), [2, 6], 1)[::-1], 1)),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_what_the_table_knows_is_proven_for_both_targets(name: str) -> None:
    torch.manual_seed(0)
    _, proof, _ = proven(COMPUTED[name](), BOTH)
    assert {target: entry["status"] for target, entry in proof.items()} == dict.fromkeys(BOTH, "passed")


class TwoReaders(Net):
    """The sum of two tensors is quantized, and read as it is, too: ONNX Runtime adds in float."""

    def middle(self, x: Tensor) -> Tensor:
        """As above."""
        x = super().middle(x)
        total = x + torch.roll(x, (2, -2), (2, 3))
        return F.relu(total) - total


def test_what_the_runtime_leaves_in_float_is_seen_in_its_graph() -> None:
    torch.manual_seed(0)
    quantized, proof, _ = proven(TwoReaders(nn.ReLU()), ALONE)
    assert proof["onnxruntime"]["status"] == "passed"
    file = quantized.file("onnxruntime")
    left = in_float(file.model)
    assert left
    exact = simulate.simulate(file.model, quantized.images)
    seen = simulate.simulate(file.model, quantized.images, in_float=left)
    assert exact.inexact < seen.inexact


def test_a_scale_behind_the_last_quantizer_is_found() -> None:
    """Logits have no quantizer behind them that would show it."""
    torch.manual_seed(0)
    quantized = quantize(EndsIn(nn.LogSoftmax(1)), random_images(8, 3, 16, 16))
    files = quantized.files()
    (edge,) = [edge for edge in files["onnxruntime"].weights if "fc" in edge]
    for target, file in files.items():
        scale = initializer(file.model, f"{edge}.scale")
        wrong = edited_file(file, f"{edge}.scale", (scale * 1.01).astype(scale.dtype))
        found = to_json(verify(quantized.model, quantized.grids, {target: wrong}, quantized.images))[target]
        checks = found["links"]
        assert found["status"].startswith("failed: torch: ") and checks["torch"]["differing_logits"] > 0
        assert target == "tensorrt" or checks["runtime"]["differing_logits"] > 0


def test_a_bound_that_nothing_can_break_is_no_proof() -> None:
    """Values of 1e9 whose difference is quantized: float32 leaves nothing of it."""
    torch.manual_seed(0)
    _, proof, _ = proven(Net(lambda x: F.relu((x + 1e9) - 1e9 + x * 0)), ALONE)
    assert proof["onnxruntime"]["status"].startswith("not run: ")


def test_what_only_helps_fusion_has_eight_bits_and_is_not_there_for_tensorrt_alone() -> None:
    config = QuantizationConfig(weights=4, activations=4)
    images = random_images(8, 3, 16, 16)
    extra, without = (
        {spec.edge: spec.bits for spec in quantize(Net(nn.SiLU()), images, config=config, targets=targets).specs}
        for targets in (ALONE, ("tensorrt",))
    )
    assert {edge: bits for edge, bits in extra.items() if edge not in without} == {
        "post_hooks.bn1/batch_norm/0__0.0": 8
    }
    assert extra["post_hooks.between/silu/0__0.0"] == 4


@pytest.mark.parametrize(("name", "operation"), [("silu", "Sigmoid"), ("hardswish", "HardSwish"), ("elu", "Elu")])
def test_a_simulator_that_is_wrong_by_a_thousandth_fails(
    monkeypatch: pytest.MonkeyPatch, name: str, operation: str
) -> None:
    """The rule of the tie is narrow enough to find what is no rounding."""
    known = float_ops.FLOAT_OPERATIONS[operation]
    wrong = replace(known, function=lambda attributes, x: known.function(attributes, x) * 1.001)
    monkeypatch.setitem(float_ops.FLOAT_OPERATIONS, operation, wrong)
    torch.manual_seed(0)
    _, proof, _ = proven(FLOAT[name][0](), ALONE)
    assert proof["onnxruntime"]["status"].startswith("failed: ")
    assert proof["onnxruntime"]["links"]["runtime"]["violations"] > 0


def test_logits_behind_a_pool_have_a_bound_that_can_be_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    quantized, proof, _ = proven(EndsInPool(), ALONE)
    assert proof["onnxruntime"]["links"]["runtime"]["differing_logits"] == 0
    file = quantized.file("onnxruntime")
    simulation = simulate.simulate(file.model, quantized.images)
    assert simulation.logits_bound is not None
    assert float(simulation.logits_bound.max()) < 1e-5 * float(np.abs(simulation.logits).max())
    original = simulate._OPERATIONS["GlobalAveragePool"]

    def larger(*arguments: Any) -> Any:
        pooled = original(*arguments)
        if isinstance(pooled, Pooled):
            return replace(pooled, scale=pooled.scale * np.float32(1 + 1e-5))
        assert isinstance(pooled, Float)  # where the runtime was seen to compute it in float
        return replace(pooled, values=pooled.values * (1 + 1e-5))

    monkeypatch.setitem(simulate._OPERATIONS, "GlobalAveragePool", larger)
    broken = verify(quantized.model, quantized.grids, {"onnxruntime": file}, quantized.images)
    assert "runtime: " in broken["onnxruntime"].status
