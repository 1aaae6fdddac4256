from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.special import log_softmax, rel_entr  # type: ignore[import-untyped]
from torch import Tensor, fx, nn
from torch.nn import functional

from crqat.train.config import ConsistencyConfig, QuantizationConfig
from crqat.train.data import sources
from crqat.train.data.batches import evaluation_batches
from crqat.train.placement.quantizer_spec import QuantizerSpec
from crqat.train.quantized_model import quantize_model
from crqat.train.quantizers import LSQQuantizer
from crqat.train.training import loop
from crqat.train.training.consistency import (
    ConsistencyTraining,
    WeightAverage,
    consistency_loss,
    consistency_weight,
    ema_alpha,
)


def logits(seed: int, n: int = 32, classes: int = 10, spread: float = 4.0) -> Tensor:
    return spread * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))


def kl(teacher: Tensor, student: Tensor, temperature: float) -> float:
    def softened(values: Tensor) -> npt.NDArray[np.float64]:
        result: npt.NDArray[np.float64] = np.exp(log_softmax(values.double().numpy() / temperature, axis=1))
        return result

    return float(rel_entr(softened(teacher), softened(student)).sum(axis=1).mean())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_loss_is_kl_times_the_temperature_squared(temperature: float) -> None:
    student, teacher = logits(0), logits(1)
    loss = consistency_loss(student, teacher, temperature)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(kl(teacher, student, temperature) * temperature**2, rel=1e-5)
    # The direction matters: KL(student || teacher) is another number.
    assert abs(kl(student, teacher, temperature) / kl(teacher, student, temperature) - 1) > 0.05


def test_equal_predictions_cost_nothing() -> None:
    values = logits(0)
    assert consistency_loss(values, values + 3.0, 2.0).item() == pytest.approx(0, abs=1e-6)  # softmax ignores a shift


def test_certain_predictions_stay_finite() -> None:
    certain = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    loss = consistency_loss(certain, torch.tensor([[-200.0, 200.0, 0.0]]), 1.0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(400.0)
    assert certain.grad is not None and certain.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_gradient_goes_to_the_student_alone(temperature: float) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    consistency_loss(student, teacher, temperature).backward()  # type: ignore[no-untyped-call]
    assert teacher.grad is None
    # d KL / d student = (softmax(s / T) - softmax(t / T)) / (T N), and the loss has the factor T^2.
    with torch.no_grad():
        expected = functional.softmax(student / temperature, 1) - functional.softmax(teacher / temperature, 1)
    assert student.grad is not None
    torch.testing.assert_close(student.grad, expected * temperature / len(student), rtol=1e-4, atol=1e-7)


def test_the_gradient_hardly_depends_on_a_large_temperature() -> None:
    sizes = []
    for temperature in (20.0, 80.0):
        student = logits(0).requires_grad_()
        consistency_loss(student, logits(1), temperature).backward()  # type: ignore[no-untyped-call]
        assert student.grad is not None
        sizes.append(student.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_lambda_rises_like_a_sigmoid_and_stays() -> None:
    config = ConsistencyConfig(weight=2.0, ramp_up=0.3)
    expected = {0: 2 * math.exp(-5), 15: 2 * math.exp(-1.25), 29: 2 * math.exp(-5 / 900), 30: 2.0, 31: 2.0, 100: 2.0}
    assert {step: consistency_weight(step, 100, config) for step in expected} == pytest.approx(expected)
    curve = [consistency_weight(step, 100, config) for step in range(101)]
    assert curve == sorted(curve)


@pytest.mark.parametrize(("ramp_up", "at_zero"), [(0.0, 1.0), (1.0, math.exp(-5))])
def test_lambda_at_the_ends_of_the_ramp_ups_range(ramp_up: float, at_zero: float) -> None:
    config = ConsistencyConfig(weight=1.0, ramp_up=ramp_up)
    assert consistency_weight(0, 10, config) == pytest.approx(at_zero)
    assert consistency_weight(10, 10, config) == 1.0


def test_alpha_is_an_average_at_first() -> None:
    expected = {0: 0.0, 1: 1 / 2, 2: 2 / 3, 9: 9 / 10, 98: 98 / 99, 99: 0.99, 100: 0.99, 10**6: 0.99}
    assert {step: ema_alpha(step, 0.99) for step in expected} == pytest.approx(expected)
    assert ema_alpha(0, 0.0) == ema_alpha(50, 0.0) == 0.0  # the teacher is the student of one step before


class Net(nn.Module):
    """All kinds of state: weights, BN affine and statistics, a step, other buffers, a layer under two names."""

    steps: Tensor
    mask: Tensor

    def __init__(self, order: int = 1) -> None:
        super().__init__()
        spec = QuantizerSpec("post_hooks.x__0.0", ("post_hooks.x__0.0",), "activation", 8, -128, 127, None, 4)
        layers = {"conv": nn.Conv2d(2, 3, 3), "norm": nn.BatchNorm2d(3), "quantizer": LSQQuantizer(spec)}
        for name in list(layers)[::order]:
            self.add_module(name, layers[name])
        self.again = self.get_submodule("conv")
        self.register_buffer("steps", torch.zeros(4, dtype=torch.int64))
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]), persistent=False)


def scramble(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator))
            else:
                tensor.copy_(torch.randint(0, 100, tensor.shape, generator=generator))


@pytest.mark.parametrize("order", [1, -1])
def test_the_teacher_is_the_average_by_name(order: int) -> None:
    """A teacher whose layers were registered in another order: pairing tensors by position would mix them up."""
    student, teacher = Net(), Net(order)
    teacher.load_state_dict(student.state_dict())
    average = WeightAverage(teacher, student)
    slow: dict[str, Any] = {name: tensor.double().clone() for name, tensor in teacher.state_dict().items()}
    for step in range(8):
        scramble(student, step)
        alpha = ema_alpha(step, 0.7)
        average.update(alpha)
        for name, tensor in student.state_dict().items():
            averaged = alpha * slow[name] + (1 - alpha) * tensor.double()
            slow[name] = averaged if tensor.is_floating_point() else tensor.double()
        for name, tensor in teacher.state_dict().items():
            torch.testing.assert_close(tensor.double(), slow[name], rtol=1e-5, atol=1e-6, msg=f"{name} at {step}")
    for name in ("norm.running_mean", "norm.running_var"):
        assert not torch.equal(teacher.state_dict()[name], student.state_dict()[name])
    for name in ("norm.num_batches_tracked", "steps"):
        assert torch.equal(teacher.state_dict()[name], student.state_dict()[name])  # copied, not averaged
    assert teacher.steps.dtype == torch.int64 and teacher.steps.any()
    assert torch.equal(teacher.mask, torch.tensor([0.0, -math.inf]))  # infinity less infinity is no number


@pytest.mark.usefixtures("one_thread")
def test_the_teachers_batchnorm_statistics_are_those_of_its_weights() -> None:
    """Stored statistics against those that all training images give, after 40 steps that shake the student.

    With the student's statistics copied, the mean error of a layer's log variance is 0.39, 0.66 and 0.96, and the
    teacher knows 78 % of the images instead of 98 %; averaged they are off by 0.14, 0.10 and 0.17.
    """
    digits, size = sources.load("digits", None, False), 50
    count = len(digits.train_images) // size
    batches = list(evaluation_batches(digits.train_images, digits.preprocessing, size))[:count]
    labels = list(digits.train_labels[: size * count].view(count, size))
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10),
    )  # fmt: skip

    def fit(
        model: nn.Module, lr: float, steps: int, loss: Callable[[int], Tensor], after: Callable[[int], None]
    ) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
        for step in range(steps):
            optimizer.zero_grad()
            loss(step % len(batches)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            after(step)

    fit(network, 0.05, 60, lambda i: functional.cross_entropy(network(batches[i]), labels[i]), lambda _: None)
    student: Any = fx.symbolic_trace(network).train()
    training = ConsistencyTraining(student, network, ConsistencyConfig(weight=0.0), lambda model: model)
    fit(student, 0.3, 40, lambda i: loop.objective([batches[i]], labels[i], training, 0.0), training.update_teacher)
    teacher = training.teacher
    assert teacher is not None
    anew = copy.deepcopy(teacher)
    torch.optim.swa_utils.update_bn(batches, anew)
    norms = [
        (own, anew.get_submodule(name)) for name, own in teacher.named_modules() if "BatchNorm" in type(own).__name__
    ]
    assert len(norms) == 3
    for own, other in norms:
        own_variance, variance = own.running_var, other.running_var
        assert isinstance(own_variance, Tensor) and isinstance(variance, Tensor)
        assert float((own_variance / variance).log().abs().mean()) < 0.28
    images, expected = torch.cat(batches), torch.cat(labels)
    known = [float((model.eval()(images).argmax(1) == expected).float().mean()) for model in (teacher, anew)]
    assert known[0] > known[1] - 0.02 and known[1] > 0.95


def test_the_first_update_makes_the_teacher_the_student() -> None:
    student = Net()
    teacher = copy.deepcopy(student)
    average = WeightAverage(teacher, student)
    scramble(student, 0)
    average.update(ema_alpha(0, 0.99))
    assert all(torch.equal(tensor, student.state_dict()[name]) for name, tensor in teacher.state_dict().items())


def test_an_update_changes_the_teacher_alone_and_follows_the_optimizer() -> None:
    student = Net()
    teacher = copy.deepcopy(student).requires_grad_(False)
    average = WeightAverage(teacher, student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    average.update(0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    torch.testing.assert_close(
        teacher.get_parameter("conv.weight"), student.get_parameter("conv.weight") + 0.05, rtol=0, atol=1e-6
    )


def test_networks_that_differ_are_refused() -> None:
    other: dict[str, nn.Module] = {"less": Net(), "more": Net(), "shape": Net(), "buffer": Net()}
    del other["less"].quantizer
    other["more"].extra = nn.Linear(1, 1)
    other["shape"].conv.bias = nn.Parameter(torch.zeros(1))  # type: ignore[union-attr]
    other["buffer"].register_buffer("statistics", torch.zeros(1))
    names = {
        "less": r"quantizer\.scale",
        "more": r"extra\.bias', 'extra\.weight",
        "shape": r"conv\.bias",
        "buffer": "statistics",
    }
    for kind, name in names.items():
        for pair in ((other[kind], Net()), (Net(), other[kind])):
            with pytest.raises(ValueError, match=rf"^teacher and student differ: \['{name}'\]$"):
                WeightAverage(*pair)


@pytest.mark.parametrize("teacher", ["ema", "float"])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_teacher_without_weight_costs_no_forward_pass(teacher: Literal["ema", "float"], weight: float) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3))
    compiled: list[nn.Module] = []
    student = quantize_model(network, torch.zeros(2, 4), QuantizationConfig(), ("onnxruntime",))
    student.calibrate([torch.randn(8, 4)])

    def count(model: nn.Module) -> Callable[[Tensor], Tensor]:
        compiled.append(model)
        return model

    training = ConsistencyTraining(student, network, ConsistencyConfig(teacher=teacher, weight=weight), count)
    x, labels = torch.randn(5, 4), torch.arange(5) % 3
    assert (training.views, len(compiled)) == ((2, 2) if weight else (1, 1))
    loss = loop.objective([x, x + 1][: training.views], labels, training, weight)
    plain = functional.cross_entropy(student(x), labels)
    assert torch.equal(loss, plain) == (weight == 0)
    # The average is kept all the same.
    with torch.no_grad():
        student.get_parameter("0.weight").add_(1.0)
    training.update_teacher(0)
    if teacher == "ema":
        assert training.teacher is not None
        assert torch.equal(training.teacher.get_parameter("0.weight"), student.get_parameter("0.weight"))
    else:
        assert training.teacher is None
