from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from crqat.core.errors import UsageError
from crqat.core.targets.scale_rounding import BIAS_LIMIT
from crqat.train.config import QuantizationConfig
from crqat.train.data import sources
from crqat.train.data.batches import evaluation_batches
from crqat.train.graph.operations import parameter
from crqat.train.models import build as models
from crqat.train.placement.insert import weight_node
from crqat.train.quantized_model import QuantizedModel, quantize_model
from crqat.train.quantizers import LSQQuantizer, quantizer_of
from crqat.train.quantizers.calibration import calibrate
from crqat.train.quantizers.finalize import make_representable

pytestmark = pytest.mark.usefixtures("one_thread")
BOTH = ("onnxruntime", "tensorrt")


class Net(nn.Module):
    """A convolution with BN, one with a bias and BN, a linear layer; small images of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


@functools.cache
def images(n: int = 200) -> Tensor:
    digits = sources.load("digits", None, download=False)
    (batch,) = evaluation_batches(digits.train_images[:n], digits.preprocessing, n)
    return batch


def network(targets: Sequence[str] = BOTH, bits: int = 8, **norm: Sequence[float]) -> QuantizedModel:
    """Net on digits with statistics of its own, calibrated; `norm` sets the first entries of a tensor of bn1."""
    torch.manual_seed(0)
    model, x = Net(), images()
    for layer in (model.bn1, model.bn2):
        nn.init.uniform_(layer.weight, 0.3, 2.0)
        nn.init.normal_(layer.bias)
        layer.momentum = None
    with torch.no_grad():
        model(x)
        for name, values in norm.items():
            getattr(model.bn1, name)[: len(values)] = torch.tensor(values)
    config = QuantizationConfig(weights=bits, activations=bits)
    student = quantize_model(model.eval(), x[:2], config, targets, LSQQuantizer)
    student.calibrate([x])
    return student


def scales(quantized: QuantizedModel) -> dict[str, Tensor]:
    model, specs = quantized, quantized.specs
    return {spec.edge: quantizer_of(model, spec).scale.detach().clone().flatten() for spec in specs}


def folded(quantized: QuantizedModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Edge of each weight -> BN's multiplier and the folded bias, from the network's own layers."""
    model, specs = quantized, quantized.specs
    result = {}
    for spec in specs:
        if spec.kind != "weight":
            continue
        name = spec.operation
        state = model.state_dict()
        bias = state.get(f"{name}.bias", torch.zeros(len(state[f"{name}.weight"])))
        multiplier = torch.ones_like(bias)
        if spec.bn is not None:
            bn = {key: state[f"{spec.bn}.{key}"] for key in ("weight", "bias", "running_mean", "running_var")}
            multiplier = bn["weight"] / torch.sqrt(bn["running_var"] + 1e-5)
            bias = bn["bias"] + (bias - bn["running_mean"]) * multiplier
        result[spec.edge] = (multiplier, bias)
    return result


def is_float16(values: Tensor, ulps: int = 0) -> Tensor:
    """Whether each value is a finite float16, up to some float32 roundings."""
    nearest = values.half().float()
    return nearest.isfinite() & ((nearest - values).abs() <= ulps * 2.0**-23 * values)


def logits(quantized: QuantizedModel) -> Tensor:
    with torch.no_grad():
        result: Tensor = quantized(images())
    return result


# Channels as training and old checkpoints leave them: negative, off, dying, dead but for a denormal, and no variance.
GAMMA = (-1.3, 0.0, 1e-12, -1e-30, 1e-41)
VARIANCE = (1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1e-12, 3e8)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("norm", [{}, {"weight": GAMMA, "running_var": VARIANCE}], ids=["plain", "odd"])
def test_what_tensorrt_stores_is_float16_and_no_scale_got_smaller(bits: int, norm: dict[str, Sequence[float]]) -> None:
    quantized = network(BOTH, bits, **norm)
    before = scales(quantized)
    make_representable(quantized, BOTH)
    after, fold = scales(quantized), folded(quantized)
    for spec in quantized.specs:
        new, old = after[spec.edge], before[spec.edge]
        assert new.isfinite().all() and (new >= old).all(), spec.edge
        if spec.kind == "activation":
            assert is_float16(new).all(), spec.edge
            assert (new <= old * (1 + 2.0**-10)).all(), spec.edge
        else:
            multiplier = fold[spec.edge][0].abs()
            used = multiplier != 0
            # One rounding of the division here and one of the product that the lowering computes.
            assert is_float16((new * multiplier)[used], ulps=2).all(), spec.edge
            normal = used & (old * multiplier >= 2.0**-14)
            assert (new <= old * (1 + 2.0**-10) * (1 + 2.0**-22))[normal].all(), spec.edge
            assert torch.equal(new[~used], old[~used]), spec.edge


@pytest.mark.parametrize("targets", [BOTH, ("onnxruntime",)])
def test_the_bias_fits_int32_in_units_of_the_scales(targets: Sequence[str]) -> None:
    quantized = network(targets, weight=GAMMA, running_var=VARIANCE, bias=(3.0, 2.0, -5.0, 40.0, 0.7))
    before = scales(quantized)
    notes = make_representable(quantized, targets)
    after, fold = scales(quantized), folded(quantized)
    needed = 0
    for spec in quantized.specs:
        if spec.kind != "weight":
            continue
        assert spec.input_edge is not None
        multiplier, bias = fold[spec.edge]
        used = multiplier != 0
        unit = after[spec.input_edge].double() * after[spec.edge].double() * multiplier.abs().double()
        assert (bias.double().abs() <= BIAS_LIMIT * unit * (1 + 1e-6))[used].all(), spec.edge
        old_unit = before[spec.input_edge] * before[spec.edge] * multiplier.abs()
        needed += int((bias.abs() > BIAS_LIMIT * old_unit)[used].sum())
    assert needed == 3  # the test is about something: the three tiny gammas would have overflowed
    assert notes == ["conv1: scale of 3 channels raised to what the targets can store"]


def test_a_bias_outside_of_bn_counts_too() -> None:
    quantized = network(("onnxruntime",))
    model, specs = quantized, quantized.specs
    (spec,) = [spec for spec in specs if spec.operation == "fc"]
    with torch.no_grad():
        model.get_parameter("fc.weight")[3] *= 1e-6
        model.get_parameter("fc.bias")[3] = 1e4
        quantizer_of(model, spec).scale[3] = 1e-8
    assert spec.input_edge is not None
    assert make_representable(model, ("onnxruntime",)) == [
        "fc: scale of 1 channels raised to what the targets can store"
    ]
    after = scales(quantized)
    assert after[spec.edge][3] == pytest.approx(1e4 / BIAS_LIMIT / after[spec.input_edge].item(), rel=1e-5)


def test_bns_running_mean_is_part_of_the_bias() -> None:
    quantized = network(("onnxruntime",), running_mean=(1e5,), bias=(0.0,))
    model, specs = quantized, quantized.specs
    (spec,) = [spec for spec in specs if spec.operation == "conv1" and spec.kind == "weight"]
    quantizer_of(model, spec).scale.data[0] = 1e-8
    make_representable(model, ("onnxruntime",))
    after = scales(quantized)
    assert spec.input_edge is not None
    # |bias| / |m| is the mean: the scale before folding does not depend on gamma.
    assert after[spec.edge][0] == pytest.approx(1e5 / BIAS_LIMIT / after[spec.input_edge].item(), rel=1e-4)


def test_without_tensorrt_nothing_that_fits_is_touched() -> None:
    quantized = network(("onnxruntime",))
    before = scales(quantized)
    assert make_representable(quantized, ("onnxruntime",)) == []
    after = scales(quantized)
    assert all(torch.equal(after[edge], before[edge]) for edge in before)
    assert not all(is_float16(scale).all() for scale in after.values())


def test_without_onnxruntime_no_bias_raises_a_scale() -> None:
    quantized = network(("tensorrt",), bias=(1e6,))
    assert make_representable(quantized, ("tensorrt",)) == []


def test_done_twice_is_done_once() -> None:
    quantized = network(BOTH, weight=GAMMA, running_var=VARIANCE)
    make_representable(quantized, BOTH)
    first = scales(quantized)
    assert make_representable(quantized, BOTH) == []
    for edge, scale in scales(quantized).items():
        assert torch.equal(scale, first[edge]), edge


def test_the_roundings_of_folding_do_not_raise_a_scale_again() -> None:
    """Of many channels some fold to one float32 above the float16 that they were made for."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 512, 3, bias=False), nn.BatchNorm2d(512), nn.ReLU(), nn.Flatten(), nn.Linear(512 * 36, 4)
    nn.init.uniform_(layers[1].weight, 0.3, 2.0)
    model = quantize_model(nn.Sequential(*layers).eval(), images()[:2], QuantizationConfig(), BOTH)
    model.calibrate([images()[:8]])
    model.finalize()
    first = scales(model)
    factors = folded(model)
    above = [~is_float16(scale * factors[edge][0].abs()) for edge, scale in first.items() if edge in factors]
    assert any(bool(channels.any()) for channels in above)
    model.finalize()
    assert all(torch.equal(scale, first[edge]) for edge, scale in scales(model).items())


def test_not_even_a_rounding_makes_a_scale_smaller() -> None:
    """A scale one unit above the representable one: the folded scale can round to the same float16."""
    quantized = network(BOTH)
    model, specs = quantized, quantized.specs
    # Factors and scales for which it does: the folded scale is just above a power of two, where units are large beside
    # the value, the scale itself just below one, where they are small.
    bn = model.get_submodule("bn1")
    assert isinstance(bn, nn.BatchNorm2d) and bn.running_var is not None
    bn.weight.data = 0.505 * (bn.running_var + bn.eps).sqrt()
    first = next(spec for spec in specs if spec.bn == "bn1")
    quantizer_of(model, first).scale.data.fill_(2.0**-6 / 0.505)
    make_representable(quantized, BOTH)
    for spec in specs:
        scale = quantizer_of(model, spec).scale.data
        scale.copy_(torch.nextafter(scale, torch.full_like(scale, torch.inf)))
    before = scales(quantized)
    make_representable(quantized, BOTH)
    after = scales(quantized)
    assert all((after[edge] >= before[edge]).all() for edge in before)
    assert (after[first.edge] == before[first.edge]).any()  # there were such


def test_channels_that_bn_switches_off_or_nearly_so_keep_their_output() -> None:
    """Their codes may all become 0; what they add to the network is BN's bias, before and after."""
    quantized = model = network(BOTH, weight=GAMMA)
    seen: list[Tensor] = []
    model.get_submodule("bn1").register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    logits(quantized)
    make_representable(model, BOTH)
    logits(quantized)
    torch.testing.assert_close(seen[0][:, 1:5], seen[1][:, 1:5], rtol=0, atol=1e-9)
    torch.testing.assert_close(
        seen[1][:, 1], torch.full_like(seen[1][:, 1], model.get_parameter("bn1.bias")[1].item()), rtol=0, atol=0
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_each_quantizer_changes_its_values_by_less_than_the_theory_allows(bits: int) -> None:
    """A scale s grows to at most s (1 + 2^-10).

    A code q then stands for a value that is at most |q| s 2^-10 away, and a value that was within a rounding of a tie
    takes the next code: |y' - y| <= s (|q| 2^-10 + 1). All but a share of codes of about the largest |q| times 2^-10
    stay what they were.
    """
    quantized = network(BOTH, bits)
    model, specs = quantized, quantized.specs
    inputs: dict[str, Tensor] = {}
    for spec in specs:
        quantizer_of(model, spec).register_forward_hook(
            lambda _, args, __, edge=spec.edge: inputs.__setitem__(edge, args[0].detach())
        )
    logits(quantized)
    seen = dict(inputs)
    grids = {spec.edge: quantizer_of(model, spec).grid() for spec in specs}
    make_representable(model, BOTH)
    for spec in specs:
        values, old, new = seen[spec.edge].numpy(), grids[spec.edge], quantizer_of(model, spec).grid()
        codes, moved = old.quantize(values), new.quantize(values)
        assert np.abs(codes - moved).max() <= 1, spec.edge
        largest = max(-spec.qmin, spec.qmax)
        assert (codes != moved).mean() <= 2 * largest * 2.0**-10, spec.edge
        change = np.abs(new.dequantize(moved) - old.dequantize(codes))
        step = old.scale.reshape([-1] + [1] * (values.ndim - 1)) if old.axis == 0 else old.scale
        assert (change <= step * (np.abs(codes) * 2.0**-10 + 1) * (1 + 1e-5)).all(), spec.edge


def test_the_predictions_of_a_real_network_stay(cifar10_root: Path, shared_data: Path) -> None:
    """Published CIFAR-10 weights at 8 bits: the logits move by far less than quantization moved them."""
    dataset = sources.load("cifar10", str(cifar10_root), download=False)
    model = models.build("cifar/resnet20", 10, 3)
    models.load_weights(model, shared_data / "weights" / "resnet20-12fca82f.th")
    model.eval()
    batches = list(evaluation_batches(dataset.train_images[:300], dataset.preprocessing, 150))
    student = quantize_model(model, batches[0][:2], QuantizationConfig(), BOTH, LSQQuantizer)
    calibrate(student, batches[:1])
    with torch.no_grad():
        exact, before = model(batches[1]), student(batches[1])
        notes = make_representable(student, BOTH)
        after = student(batches[1])
    # Some channels of these weights are dead behind their BN; only they have scales that no file could hold.
    assert all(note.endswith("scale of 1 channels raised to what the targets can store") for note in notes)
    assert not torch.equal(before, after)
    assert (after - before).square().mean() < (before - exact).square().mean()
    assert (after - exact).square().mean() < 1.2 * (before - exact).square().mean()
    assert (after.argmax(1) == before.argmax(1)).float().mean() > 0.98


def test_a_weight_with_two_quantizers_gets_each_call_its_own_bias() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(4, 1, 3, 3))
            self.small, self.large = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.full((4,), 1e6))
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            a = functional.relu(functional.conv2d(x, self.weight, self.small))
            b = functional.relu(functional.conv2d(x * 2, self.weight, bias=self.large))
            return self.fc((a + b).mean((2, 3)))  # type: ignore[no-any-return]

    model = quantize_model(Twice().eval(), images(2), QuantizationConfig(), ("onnxruntime",), LSQQuantizer)
    specs = model.specs
    for spec in specs:
        quantizer_of(model, spec).scale.data.fill_(1e-4)
    weights = [spec for spec in specs if spec.kind == "weight" and spec.ndim == 4]
    assert weight_node(model, weights[0]) is weight_node(model, weights[1])
    assert parameter(model, weight_node(model, weights[0])) is model.get_parameter("weight")
    make_representable(model, ("onnxruntime",))
    # 1e6 / 2^30 / 1e-4 = 9.3 in the call with the large bias alone, though both share the weight.
    assert [round(quantizer_of(model, spec).scale[0].item(), 4) for spec in weights] == [1e-4, 9.3132]


@pytest.mark.parametrize("targets", [["onnxruntime"], BOTH])
def test_the_true_cause_is_named_by_its_module(targets: Sequence[str]) -> None:
    model = network(targets)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    name, norm = next(iter(norms.items()))
    assert norm.running_var is not None
    right = norm.running_var.clone()
    norm.running_var[1] = -0.25
    with pytest.raises(UsageError, match=rf"^the network: {name}\.running_var is negative in 1 of \d+ .*-0\.25"):
        make_representable(model, targets, trained=False)
    norm.running_var[1] = float("nan")
    with pytest.raises(UsageError, match=rf"1 of \d+ in {name}\.running_var; nothing was trained"):
        make_representable(model, targets, trained=False)
    norm.running_var.copy_(right)
    quantizer_of(model, model.specs[0]).scale.data.fill_(float("nan"))
    for trained, words in ((False, "nothing was trained"), (True, "training diverged; lower qat.lr")):
        with pytest.raises(UsageError, match=rf"scale of its \w+ is infinite or NaN: {words}"):
            make_representable(model, targets, trained)


def test_a_scale_beyond_float16_is_a_users_error() -> None:
    for edge in ("post_hooks.x__0.0", "pre_hooks.fc/linear/0__1.0"):
        model = network(BOTH)
        specs = model.specs
        (spec,) = [spec for spec in specs if spec.edge == edge]
        quantizer_of(model, spec).scale.data.fill_(7e4)
        with pytest.raises(UsageError, match=rf"^{spec.operation}: a scale of 70000 is more than .*; lower qat\.lr"):
            make_representable(model, BOTH)
        assert make_representable(model, ("onnxruntime",)) == []


def test_a_scale_that_all_channels_share_holds_the_largest_of_their_biases() -> None:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 8, 2, groups=2)
    with torch.no_grad():
        layer.weight.mul_(1e-6)
        nn.init.zeros_(layer.bias)[-1] = -1e6  # type: ignore[arg-type]
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    student = quantize_model(net, images()[:2], QuantizationConfig(), BOTH)
    student.calibrate([images()])
    (note,) = student.finalize()
    assert note == "2: scale of 1 channels raised to what the targets can store"
    (spec,) = [spec for spec in student.specs if spec.operation == "2" and spec.kind == "weight"]
    fed = scales(student)[spec.input_edge or ""]
    assert float(1e6 / (fed * scales(student)[spec.edge])) <= BIAS_LIMIT
