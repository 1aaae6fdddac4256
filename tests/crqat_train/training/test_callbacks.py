"""Each switch of training at few bits, in real trainings of a small depthwise network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional

from crqat.core.grid import load_grids
from crqat.core.progress import quiet
from crqat.train.config import (
    ConsistencyConfig,
    DataConfig,
    FloatConfig,
    ModelConfig,
    Override,
    QATConfig,
    QuantizationConfig,
    TrainConfig,
)
from crqat.train.placement.quantizer_spec import QuantizerSpec
from crqat.train.quantized_model import quantize_model
from crqat.train.quantizers import LSQQuantizer, MinMaxQuantizer
from crqat.train.quantizers.calibration import calibrate
from crqat.train.training import loop
from crqat.train.training.callbacks import (
    Callback,
    OscillationDamping,
    damping_weight,
    low_bit_callbacks,
    quantizers,
    set_width,
    width_of_step,
)
from crqat.train.training.consistency import ConsistencyTraining
from crqat.train.training.optimizer import Fit
from crqat.train.training.stage import train

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS_PER_EPOCH = 9  # of 100 of the 900 training digits
W3A4 = QuantizationConfig(weights=3, activations=4, first_layer=4, last_layer=4, calibration_images=100)


class Depthwise(nn.Module):
    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.max_pool2d(functional.relu(self.bn2(self.conv2(x))), 2)
        return self.fc(torch.flatten(x, 1))  # type: ignore[no-any-return]


def network(classes: int, channels: int) -> nn.Module:
    return Depthwise(classes, channels)


def recipe(**qat: Any) -> TrainConfig:
    return TrainConfig(
        seed=0,
        targets=("onnxruntime", "tensorrt"),
        data=DataConfig("digits", crop_padding=0, flip=False),
        model=ModelConfig(f"{__name__}:network"),
        float_training=FloatConfig(epochs=3, batch_size=100, lr=0.1),
        quantization=W3A4,
        qat=QATConfig(**{"epochs": 2, "batch_size": 100, "lr": 0.02, **qat}),
        consistency=ConsistencyConfig(weight=0.0),
        device="cpu",
        compile="never",
    )


@dataclass
class Trained:
    """A finished training and what it looked like after each step of QAT.

    Attributes:
        out: The train directory.
        states: Copies of the student's state dict, the first from before the first step.
        codes: Edge to (qmin, qmax) of each step.
    """

    out: Path
    states: list[dict[str, Tensor]] = field(default_factory=list)
    codes: list[dict[str, tuple[float, float]]] = field(default_factory=list)

    def values(self, *endings: str) -> list[Tensor]:
        """Of each step, all tensors whose names end so, as one vector."""
        return [
            torch.cat([tensor.flatten().float() for name, tensor in state.items() if name.endswith(endings)])
            for state in self.states
        ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """Train by switches of `qat`, once for each set of them; all start from the same float weights."""
    made: dict[str, Trained] = {}
    base = tmp_path_factory.mktemp("float")
    train(recipe(epochs=0), base, quiet)

    def of(**qat: Any) -> Trained:
        config = replace(recipe(**qat), model=ModelConfig(f"{__name__}:network", str(base / "float.safetensors")))
        if str(qat) in made:
            return made[str(qat)]
        result = made[str(qat)] = Trained(tmp_path_factory.mktemp("run"))
        step = loop.update

        def spy(fit: Fit, loss: Tensor) -> None:
            if fit.name == "qat" and not result.states:
                result.states.append({name: tensor.clone() for name, tensor in fit.model.state_dict().items()})
            step(fit, loss)
            if fit.name == "qat":
                result.states.append({name: tensor.clone() for name, tensor in fit.model.state_dict().items()})
                result.codes.append({q.spec.edge: (q.qmin, q.qmax) for q in quantizers(fit.model)})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "update", spy)
            train(config, result.out, quiet)
        return result

    return of


def moved(values: list[Tensor]) -> list[bool]:
    """Whether each step changed them."""
    return [not torch.equal(before, after) for before, after in itertools.pairwise(values)]


def test_without_switches_everything_moves_in_every_step(trained: Callable[..., Trained]) -> None:
    plain = trained()
    assert len(plain.states) == 1 + 2 * STEPS_PER_EPOCH
    for name in ("running_mean", ".scale", "conv2.weight", "bn2.weight"):
        # The first copy is of behind the first forward pass; the last step's learning rate is next to nothing.
        assert moved(plain.values(name)[1:])[:-1] == [True] * (2 * STEPS_PER_EPOCH - 2)


def test_bn_statistics_stay_after_the_point(trained: Callable[..., Trained]) -> None:
    """Also behind the validation at the end of an epoch, which puts the network into eval mode and back."""
    frozen, plain = trained(freeze_bn_at=0.25), trained()
    point = math.ceil(0.25 * 2 * STEPS_PER_EPOCH)
    statistics = frozen.values("running_mean", "running_var", "num_batches_tracked")
    assert moved(statistics[1:]) == [True] * (point - 1) + [False] * (2 * STEPS_PER_EPOCH - point)
    assert all(moved(frozen.values("bn1.weight", "bn2.bias"))[:-1])
    weights = frozen.values("conv1.weight"), plain.values("conv1.weight")
    same = [torch.equal(a, b) for a, b in zip(*weights, strict=True)]
    # Up to the point it is the same training; then the forward pass takes the running statistics.
    assert same == [True] * (point + 1) + [False] * (2 * STEPS_PER_EPOCH - point)


def test_ranges_stay_after_the_point(trained: Callable[..., Trained]) -> None:
    frozen = trained(freeze_ranges_at=0.5)
    expected = [True] * STEPS_PER_EPOCH + [False] * STEPS_PER_EPOCH
    assert moved(frozen.values(".scale")) == expected
    assert all(moved(frozen.values("conv2.weight"))[:-1])


def test_scales_have_a_learning_rate_of_their_own(trained: Callable[..., Trained]) -> None:
    plain, slow = trained(), trained(scale_lr=0.125)
    scales = [run.values(".scale") for run in (plain, slow)]
    first = [(values[1] - values[0]).numpy() for values in scales]
    assert np.abs(first[0]).max() > 0
    np.testing.assert_allclose(first[1], 0.125 * first[0], rtol=1e-3, atol=1e-7)
    weights = [run.values("conv1.weight", "conv2.weight", "bn1.bias")[1] for run in (plain, slow)]
    assert torch.equal(*weights)


def quantized(make: Callable[[QuantizerSpec], nn.Module] = LSQQuantizer) -> fx.GraphModule:
    torch.manual_seed(0)
    images = torch.randn(16, 1, 8, 8)
    model = quantize_model(Depthwise(10, 1).eval(), images, W3A4, ("onnxruntime", "tensorrt"), make)
    calibrate(model, [images])
    return model


def test_damping_pulls_to_the_centres_and_leaves_clipped_weights_and_scales_alone() -> None:
    model = quantized()
    loss = OscillationDamping(model)()
    loss.backward()
    total, clipped = 0.0, 0
    for quantizer in quantizers(model):
        assert quantizer.scale.grad is None
        if quantizer.spec.kind != "weight":
            continue
        weight = model.get_parameter(f"{quantizer.spec.operation}.weight")
        w, s = weight.detach().double().numpy(), quantizer.scale.detach().double().numpy()
        bounded = np.clip(w, s * quantizer.qmin, s * quantizer.qmax)
        centre = np.clip(np.rint(w / s), quantizer.qmin, quantizer.qmax) * s
        inside = bounded == w
        clipped += int((~inside).sum())
        total += float(np.square(centre - bounded).sum())
        assert weight.grad is not None
        np.testing.assert_allclose(weight.grad.numpy(), np.where(inside, 2 * (w - centre), 0.0), rtol=1e-4, atol=1e-6)
    assert clipped > 0
    assert loss.item() == pytest.approx(total, rel=1e-4)


def test_damping_rises_as_half_a_cosine() -> None:
    weights = [damping_weight(step, 100, 0.5) for step in (0, 25, 50, 75, 100)]
    assert weights == pytest.approx([0.0, 0.25 * (1 - math.sqrt(0.5)), 0.25, 0.25 * (1 + math.sqrt(0.5)), 0.5])


def oscillations(run: Trained) -> int:
    """Changes of a weight's code that undo the direction of its last change, arXiv 2203.11086, in conv1 and conv2."""
    count = 0
    for layer in ("conv1", "conv2"):
        edge = next(edge for edge in run.codes[0] if f".{layer}/" in edge and edge.startswith("pre_hooks"))
        name = f"quantizers.{edge.replace('/', '_').replace('.', '_')}.scale"
        weights = torch.stack([state[f"{layer}.weight"] / state[name] for state in run.states])
        codes = weights.clamp(*run.codes[0][edge]).round().flatten(1)
        changes = (codes[1:] - codes[:-1]).sign()
        last = torch.zeros_like(changes[0])
        for change in changes:
            count += int(((change * last) < 0).sum())
            last = torch.where(change != 0, change, last)
    return count


def test_damping_makes_oscillations_fewer(trained: Callable[..., Trained]) -> None:
    plain, damped = (oscillations(trained(epochs=6, lr=0.05, damping=weight)) for weight in (0.0, 1.0))
    assert plain > 30
    assert damped < 0.7 * plain


def test_equal_shares_of_the_steps_and_the_last_is_the_width_asked_for() -> None:
    assert [width_of_step(step, 9, (8, 6, 4)) for step in range(9)] == [8] * 3 + [6] * 3 + [None] * 3
    assert [width_of_step(step, 5, (8, 2)) for step in range(5)] == [8, 8, 8, None, None]
    assert [width_of_step(step, 3, ()) for step in range(3)] == [None] * 3
    assert width_of_step(0, 3, (8,)) is None


def test_progressive_bits_end_at_the_grid_that_was_asked_for(trained: Callable[..., Trained]) -> None:
    run, plain = trained(progressive_bits=(8, 5, 3)), trained()
    third = 2 * STEPS_PER_EPOCH // 3
    edges = {layer: next(e for e in run.codes[0] if f".{layer}/" in e and "pre" in e) for layer in ("conv2", "fc")}
    assert [codes[edges["conv2"]] for codes in run.codes] == [(-127, 127)] * third + [(-16, 15)] * third + [
        (-4, 3)
    ] * third
    assert [codes[edges["fc"]] for codes in run.codes] == [(-127, 127)] * third + [(-16, 15)] * third + [
        (-8, 7)
    ] * third
    after_relu = next(edge for edge in run.codes[0] if "relu" in edge)
    assert [codes[after_relu] for codes in run.codes] == [(0, 255)] * third + [(0, 31)] * third + [(0, 15)] * third
    assert run.codes[-1] == plain.codes[0]
    for name in ("student", "teacher"):
        grids, expected = (load_grids(directory / f"{name}.grids.json") for directory in (run.out, plain.out))
        assert {edge: (grid.qmin, grid.qmax) for edge, grid in grids.items()} == {
            edge: (grid.qmin, grid.qmax) for edge, grid in expected.items()
        }
        # The teacher averages scales of one width only: else they would be far from those of a training at that width.
        ratios = np.concatenate([grids[edge].scale / expected[edge].scale for edge in grids])
        assert ratios.min() > 0.3 and ratios.max() < 3
        state = load_file(run.out / f"{name}.safetensors")
        assert all(bool(tensor.isfinite().all()) for tensor in state.values())


@pytest.mark.parametrize("make", [LSQQuantizer, MinMaxQuantizer])
def test_another_width_keeps_the_range(make: Callable[[QuantizerSpec], nn.Module]) -> None:
    for quantizer in quantizers(quantized(make)):
        scale, qmax, spec = quantizer.scale.detach().clone(), quantizer.qmax, quantizer.spec
        factor = quantizer.grad_scale if isinstance(quantizer, LSQQuantizer) else None
        set_width(quantizer, 7)
        assert quantizer.qmax == (127 if spec.qmin == 0 else 63) > qmax
        torch.testing.assert_close(quantizer.scale.detach() * quantizer.qmax, scale * qmax)
        x = torch.linspace(-1, 1, 101).reshape([1] * (spec.ndim - 1) + [-1]) * qmax * scale
        rounded = quantizer(x).detach() / quantizer.scale.detach()
        assert float(rounded.max()) == pytest.approx(quantizer.qmax)
        assert float(rounded.min()) == pytest.approx(quantizer.qmin if spec.qmin == 0 else -63)
        set_width(quantizer, spec.bits)
        assert (quantizer.qmin, quantizer.qmax) == (spec.qmin, spec.qmax)
        torch.testing.assert_close(quantizer.scale.detach(), scale)
        if isinstance(quantizer, LSQQuantizer):
            assert quantizer.grad_scale == pytest.approx(factor)


def fit_of(model: nn.Module, section: QATConfig, steps: int) -> Fit:
    return Fit(model, section, steps, "qat", torch.device("cpu"), quiet)


def before_step(callbacks: list[Callback], fit: Fit) -> None:
    for callback in callbacks:
        callback.before_step(fit)


ALL = QATConfig(1, freeze_bn_at=0.7, freeze_ranges_at=0.8, scale_lr=0.5, damping=0.1, progressive_bits=(8, 6, 3))


def test_all_together_compile_once_for_each_width() -> None:
    model, images, labels = quantized(), torch.randn(20, 1, 8, 8), torch.arange(20) % 10
    counter = CompileCounter()
    torch._dynamo.reset()
    fit = fit_of(model, ALL, 12)
    callbacks = low_bit_callbacks(model, None, ALL, lambda module: torch.compile(module, backend=counter))
    plain = ConsistencyConfig(teacher="none")
    networks = ConsistencyTraining(model, model, plain, lambda module: torch.compile(module, backend=counter))
    frames = []
    for _ in range(12):
        model.train()
        loop.step([images], labels, networks, fit, callbacks)
        frames.append(counter.frame_count)
    # Student and damping at 8, 6 and the asked bits, and the student with BN frozen; nothing in the steps between.
    new = [after - before for before, after in zip([0, *frames], frames, strict=False)]
    assert new[0] == 2 and sum(new) <= 2 * 3 + 1
    assert [step for step, count in enumerate(new) if count] in ([0, 4, 8, 9], [0, 4, 9])
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("done", [2, 3, 4, 6])  # the width changes at 3 and at 6
def test_a_training_that_goes_on_takes_on_its_width_with_the_scales_it_loads(done: int) -> None:
    section = QATConfig(1, progressive_bits=(8, 6, 3))
    first = quantized()
    fit = fit_of(first, section, 9)
    callbacks = low_bit_callbacks(first, None, section, lambda module: module)
    for _ in range(done):
        before_step(callbacks, fit)
        fit.steps_done += 1
    second = quantized()
    second.load_state_dict(first.state_dict())
    again = fit_of(second, section, 9)
    again.steps_done = done
    before_step(callbacks, fit)
    resumed = low_bit_callbacks(second, None, section, lambda module: module)
    for callback in resumed:
        callback.on_start(again)
    before_step(resumed, again)
    for a, b in zip(quantizers(first), quantizers(second), strict=True):
        assert (a.qmin, a.qmax) == (b.qmin, b.qmax) and a.grad_scale == pytest.approx(b.grad_scale)
        assert torch.equal(a.scale, b.scale)


def test_overrides_reach_the_trained_grids(tmp_path: Path, trained: Callable[..., Trained]) -> None:
    weights = str(trained().out / "float.safetensors")
    quantization = replace(W3A4, overrides={"conv2": Override(weights=2, activations=5)})
    config = replace(recipe(epochs=1), model=ModelConfig(f"{__name__}:network", weights), quantization=quantization)
    train(config, tmp_path, quiet)
    grids = load_grids(tmp_path / "student.grids.json")
    codes = {edge: (grid.qmin, grid.qmax) for edge, grid in grids.items()}
    assert codes.pop("pre_hooks.conv2/conv2d/0__1.0") == (-2, 1)
    assert codes.pop("post_hooks./relu/0__0.0") == (0, 31)
    assert (0, 15) in codes.values() and (-2, 1) not in codes.values() and (0, 31) not in codes.values()
