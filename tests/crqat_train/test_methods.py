from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from crqat_train import data
from crqat_train.batches import evaluation_batches
from crqat_train.layout import QuantizerSpec
from crqat_train.methods import (
    METHODS,
    MIN_SCALE,
    ActivationObserver,
    LSQQuantizer,
    MinMaxQuantizer,
    calibrate_weight,
    quantizer_of,
)

Floats = npt.NDArray[Any]
# Every kind of code range in the layout: 8-bit weights and activations, both signs of low widths.
RANGES = [(-127, 127), (-128, 127), (0, 127), (-64, 63), (-8, 7), (0, 15), (-2, 1), (0, 3)]


def quantizer(qmin: int, qmax: int, channels: int | None = None, ndim: int = 4) -> LSQQuantizer:
    kind = "activation" if channels is None else "weight"
    return LSQQuantizer(QuantizerSpec("post_hooks.x__0.0", ("post_hooks.x__0.0",), kind, 8, qmin, qmax, channels, ndim))


def set_scale(lsq: LSQQuantizer, scale: Any) -> None:
    with torch.no_grad():
        lsq.scale.copy_(torch.as_tensor(scale, dtype=torch.float32).reshape(lsq.scale.shape))


def lsq_reference(
    x: Floats, s: Floats, qmin: int, qmax: int, upstream: Floats, grad_scale: float
) -> tuple[Floats, Floats, Floats]:
    """Equations 1 to 3 of arXiv 1902.08153 in the arrays' own precision; the sum over a scale's group in float64."""
    with np.errstate(over="ignore"):
        v = x / s
    out = np.clip(np.rint(v), qmin, qmax) * s
    inside = (v > qmin) & (v < qmax)
    grad_x = np.where(inside, upstream, 0)
    with np.errstate(invalid="ignore"):
        step = np.where(v <= qmin, qmin, np.where(v >= qmax, qmax, np.rint(v) - v))
    axes = tuple(range(x.ndim)) if s.size == 1 else tuple(range(1, x.ndim))
    grad_s = (upstream.astype(np.float64) * step).sum(axis=axes) * grad_scale
    return out, grad_x, grad_s


def probe_values(scale: float, qmin: int, qmax: int) -> npt.NDArray[np.float32]:
    """Every code, every tie, the numbers next to them, the ends of the range, zeros, and what is far outside."""
    codes = np.arange(qmin - 2, qmax + 3, dtype=np.float32)
    s = np.float32(scale)
    on = np.concatenate([codes * s, (codes + np.float32(0.5)) * s]).astype(np.float32)
    near = [np.nextafter(on, np.float32(end)) for end in (-np.inf, np.inf)]
    special = np.array(
        [0.0, -0.0, 1e-45, -1e-45, 1e-40, -1e-40, 1e30, -1e30, 3.4e38, -3.4e38, np.inf, -np.inf], np.float32
    )
    return np.concatenate([on, *near, special]).astype(np.float32)


@pytest.mark.parametrize("scale", [0.1, 2.0**-5, 0.3337])
@pytest.mark.parametrize(("qmin", "qmax"), RANGES)
def test_forward_and_gradients_are_those_of_lsq(qmin: int, qmax: int, scale: float) -> None:
    values = probe_values(scale, qmin, qmax)
    upstream = np.random.default_rng(0).standard_normal(values.shape).astype(np.float32)
    lsq = quantizer(qmin, qmax, ndim=1)
    set_scale(lsq, scale)
    lsq.grad_scale = 0.37
    x = torch.from_numpy(values).requires_grad_()
    y = lsq(x)
    y.backward(torch.from_numpy(upstream))
    s = np.array([scale], np.float32)
    expected, grad_x, grad_s = lsq_reference(values, s, qmin, qmax, upstream, 0.37)
    np.testing.assert_array_equal(y.detach().numpy(), expected)
    assert x.grad is not None
    np.testing.assert_array_equal(x.grad.numpy(), grad_x)
    assert lsq.scale.grad is not None
    # One float32 rounding per summand and addition: far less than one part in 10^4 of the largest summand.
    np.testing.assert_allclose(lsq.scale.grad.numpy(), [grad_s], atol=1e-4 * max(-qmin, qmax), rtol=1e-5)


def test_ties_go_to_the_even_code() -> None:
    lsq = quantizer(-8, 7, ndim=1)
    set_scale(lsq, 0.25)
    ties = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]) * 0.25
    assert (lsq(ties) / 0.25).tolist() == [-2.0, -2.0, 0.0, 0.0, 2.0, 2.0]


def test_the_gradient_at_the_ends_of_the_range() -> None:
    """At the outermost codes themselves equation 3 has left its middle case: the end's value and no gradient for x."""
    for code, inside in ((-4, False), (-3, True), (2, True), (3, False)):
        lsq = quantizer(-4, 3, ndim=1)
        set_scale(lsq, 0.5)
        x = torch.tensor([code * 0.5], requires_grad=True)
        lsq(x).backward()
        assert x.grad is not None and lsq.scale.grad is not None
        assert x.grad.item() == (1.0 if inside else 0.0), code
        assert lsq.scale.grad.item() == (0.0 if inside else code), code


def test_per_channel_steps_get_their_own_gradients() -> None:
    rng = np.random.default_rng(1)
    values = (rng.standard_normal((5, 3, 4, 2)) * 0.7).astype(np.float32)
    values[2] = 0.0
    upstream = rng.standard_normal(values.shape).astype(np.float32)
    scale = np.array([0.02, 0.3, 0.05, 0.11, 1.0], np.float32).reshape(5, 1, 1, 1)
    lsq = quantizer(-8, 7, channels=5)
    set_scale(lsq, scale)
    lsq.set_grad_scale(24)
    x = torch.from_numpy(values).requires_grad_()
    y = lsq(x)
    y.backward(torch.from_numpy(upstream))
    grad_scale = 1 / (math.sqrt(24) * 7)
    expected, grad_x, _ = lsq_reference(values, scale, -8, 7, upstream, grad_scale)
    _, _, grad_s = lsq_reference(
        values.astype(np.float64), scale.astype(np.float64), -8, 7, upstream.astype(np.float64), grad_scale
    )
    assert x.grad is not None and lsq.scale.grad is not None
    np.testing.assert_array_equal(y.detach().numpy(), expected)
    np.testing.assert_array_equal(x.grad.numpy(), grad_x)
    assert lsq.scale.grad.shape == (5, 1, 1, 1)
    np.testing.assert_allclose(lsq.scale.grad.numpy().ravel(), grad_s, rtol=1e-4, atol=1e-6)
    assert lsq.scale.grad[2].item() == 0.0  # a channel of zeros asks for no other step


def test_the_gradient_scale_is_one_over_the_root_of_n_times_qmax() -> None:
    lsq = quantizer(-8, 7)
    lsq.set_grad_scale(576)
    assert lsq.grad_scale == pytest.approx(1 / (math.sqrt(576) * 7))
    observer = ActivationObserver()
    observer.update(torch.rand(4, 3, 5, 5))
    observer.calibrate(lsq)
    assert lsq.grad_scale == pytest.approx(1 / (math.sqrt(3 * 5 * 5) * 7))  # features of one sample, whatever the batch
    weights = quantizer(-127, 127, channels=6)
    calibrate_weight(weights, torch.randn(6, 3, 5, 5))
    assert weights.grad_scale == pytest.approx(1 / (math.sqrt(3 * 5 * 5) * 127))  # weights of one channel


def test_nan_stays_nan_and_spoils_the_step_alone() -> None:
    """No code stands for NaN: it passes through, so that the loss shows it; other values keep theirs."""
    lsq = quantizer(-8, 7, ndim=1)
    x = torch.tensor([1.2, math.nan, -3.0], requires_grad=True)
    y = lsq(x)
    assert y[1].isnan() and y[0] == 1.0 and y[2] == -3.0
    y.sum().backward()
    assert x.grad is not None and lsq.scale.grad is not None
    assert x.grad.isfinite().all()
    assert lsq.scale.grad.isnan()


def test_infinity_takes_the_last_code_and_gives_a_finite_gradient() -> None:
    lsq = quantizer(-8, 7, ndim=1)
    x = torch.tensor([math.inf, -math.inf], requires_grad=True)
    y = lsq(x)
    y.sum().backward()
    assert y.tolist() == [7.0, -8.0]
    assert x.grad is not None and lsq.scale.grad is not None
    assert x.grad.tolist() == [0.0, 0.0]
    assert lsq.scale.grad.item() == -1.0


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("channels", [None, 8])
def test_compiled_and_eager_agree(channels: int | None) -> None:
    """A compiler that multiplied by the reciprocal would flip codes near ties; half of the values are there."""
    torch.manual_seed(0)
    lsq = quantizer(-64, 63, channels=channels)
    set_scale(lsq, torch.rand(lsq.scale.shape) * 0.1 + 0.003)
    lsq.set_grad_scale(100)
    shape = (8, 8, 33, 35)
    ties = (torch.randint(-70, 70, shape) + 0.5) * lsq.scale.detach()
    nudged = ties * (1 + torch.randint(-2, 3, shape) * 2.0**-23)
    values = torch.where(torch.rand(shape) < 0.5, nudged, torch.randn(shape) * 3)
    values[0, 0, 0, :7] = torch.tensor([0.0, -0.0, 1e-40, -1e-40, math.inf, -math.inf, 3e38])
    upstream = torch.randn(shape)

    def run(function: Any) -> tuple[Tensor, Tensor, Tensor]:
        lsq.scale.grad, x = None, values.clone().requires_grad_()
        y = function(x)
        y.backward(upstream)
        assert x.grad is not None and lsq.scale.grad is not None
        return y.detach(), x.grad, lsq.scale.grad

    eager, compiled = run(lsq), run(torch.compile(lsq, fullgraph=True))
    assert torch.equal(eager[0].view(torch.int32), compiled[0].view(torch.int32))
    assert torch.equal(eager[1], compiled[1])
    # The sums run in another order; summands are up to 64, and some 70,000 of them partly cancel.
    torch.testing.assert_close(eager[2], compiled[2], rtol=1e-4, atol=1e-2)


@pytest.fixture(scope="module")
def features() -> Iterator[tuple[Tensor, Tensor]]:
    """What a convolution makes of real images, before and behind ReLU."""
    digits = data.load("digits", None, download=False)
    torch.manual_seed(0)
    weight = torch.randn(8, 1, 3, 3) / 3
    (images,) = evaluation_batches(digits.train_images[:400], digits.preprocessing, 400)
    out = functional.conv2d(images, weight, padding=1)
    yield out, out.relu()


@pytest.mark.parametrize(("qmin", "qmax"), RANGES)
def test_the_grid_is_what_forward_computes(features: tuple[Tensor, Tensor], qmin: int, qmax: int) -> None:
    values = features[0] if qmin < 0 else features[1]
    lsq, observer = quantizer(qmin, qmax), ActivationObserver()
    observer.update(values)
    observer.calibrate(lsq)
    out, grid = lsq(values).detach().numpy(), lsq.grid()
    assert (grid.zero_point, grid.qmin, grid.qmax, grid.axis) == (0, qmin, qmax, None)
    assert len(np.unique(out)) > (qmax - qmin) // 2  # the range is used, so equality below says something
    # Bit for bit, but for the sign of zero: a code has none.
    np.testing.assert_array_equal(grid.dequantize(grid.quantize(values.numpy())), out)


def test_the_grid_of_a_weight_has_its_channels_on_axis_0() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 4, 3, 3) * torch.tensor([1e-4, 0.1, 1, 3, 0, 40.0]).reshape(6, 1, 1, 1)
    for shape in ((6, 4, 3, 3), (6, 36)):
        lsq = quantizer(-127, 127, channels=6, ndim=len(shape))
        values = weight.reshape(shape)
        calibrate_weight(lsq, values)
        grid = lsq.grid()
        assert grid.axis == 0 and grid.scale.shape == (6,)
        np.testing.assert_array_equal(grid.dequantize(grid.quantize(values.numpy())), lsq(values).detach().numpy())


def squared_error(values: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    rounded = torch.clamp(torch.round(values / scale), qmin, qmax) * scale
    return (rounded - values).double().square().flatten(1).sum(dim=1)


@pytest.mark.parametrize(("qmin", "qmax"), [r for r in RANGES if r[0] < 0])
def test_weight_calibration_beats_min_max_and_neighbouring_steps(qmin: int, qmax: int) -> None:
    torch.manual_seed(0)
    # Real kernels are not Gaussian: channels with a few large weights among small ones gain from a clipped range.
    weight = torch.randn(64, 32, 3, 3) * torch.rand(64, 1, 1, 1)
    weight[:16] = weight[:16] ** 3
    lsq = quantizer(qmin, qmax, channels=64)
    calibrate_weight(lsq, weight)
    scale = lsq.scale.detach()
    found = squared_error(weight, scale, qmin, qmax)
    min_max = weight.abs().amax(dim=(1, 2, 3), keepdim=True) / qmax
    assert (found <= squared_error(weight, min_max, qmin, qmax) * (1 + 1e-5)).all()
    if qmax < 8:  # with more codes there is little to gain by clipping
        assert found.sum() < 0.9 * squared_error(weight, min_max, qmin, qmax).sum()
    for factor in (0.95, 1.05):
        # In sum: the error of one channel's few weights jumps about, and candidates are 1/80 of the range apart.
        assert found.sum() <= squared_error(weight, scale * factor, qmin, qmax).sum(), factor


@pytest.mark.parametrize(("qmin", "qmax"), RANGES)
def test_activation_calibration_beats_min_max_and_neighbouring_steps(
    features: tuple[Tensor, Tensor], qmin: int, qmax: int
) -> None:
    values = features[0] if qmin < 0 else features[1]
    lsq, observer = quantizer(qmin, qmax), ActivationObserver()
    for batch in torch.split(values, 64):
        observer.update(batch)
    observer.calibrate(lsq)

    def error(scale: Tensor) -> float:
        return float(squared_error(values, scale, qmin, qmax).sum())

    found, scale = error(lsq.scale.detach()), lsq.scale.detach()
    assert found < error(values.abs().max() / qmax)
    assert found <= min(error(scale * 0.95), error(scale * 1.05))


def test_an_observer_gives_the_same_step_whatever_the_order_of_batches(features: tuple[Tensor, Tensor]) -> None:
    """A late batch with much larger values widens the histogram and loses nothing."""
    values = features[1] * torch.linspace(0.01, 1, 400).reshape(-1, 1, 1, 1)
    steps = []
    for batches in (torch.split(values, 50), tuple(reversed(torch.split(values, 50))), (values,)):
        lsq, observer = quantizer(0, 15), ActivationObserver()
        for batch in batches:
            observer.update(batch)
        assert observer.counts.sum() == (values > 0).sum()  # every value is counted once
        observer.calibrate(lsq)
        steps.append(lsq.scale.item())
    assert max(steps) / min(steps) < 1.03  # the bins' edges differ


def test_negative_values_are_counted_apart() -> None:
    """The signed range reaches one code further down; unsigned codes clip every negative value to 0."""
    lsq, observer = quantizer(0, 3), ActivationObserver()
    observer.update(torch.cat([torch.full((1, 1000), -50.0), torch.tensor([1.0, 2.0, 3.0]).repeat(1, 300)], dim=1))
    observer.calibrate(lsq)
    assert lsq.scale.item() == pytest.approx(1.0, abs=0.2)  # not spread over the 50 that it cannot represent


def test_channels_and_tensors_of_zeros_get_a_harmless_step() -> None:
    weight = torch.randn(4, 3, 3, 3)
    weight[1] = 0
    lsq = quantizer(-127, 127, channels=4)
    calibrate_weight(lsq, weight)
    scale = lsq.scale.detach().flatten()
    assert scale[1] == scale[[0, 2, 3]].max()
    assert not lsq(weight)[1].any()
    calibrate_weight(lsq, torch.zeros(4, 3, 3, 3))
    assert lsq.scale.detach().flatten().tolist() == [1.0] * 4
    observer, activation = ActivationObserver(), quantizer(0, 127)
    observer.update(torch.zeros(2, 3, 4, 4))
    observer.calibrate(activation)
    assert activation.scale.item() == 1.0
    assert activation.grid().scale.tolist() == [1.0]


def test_no_step_is_smaller_than_the_smallest() -> None:
    lsq = quantizer(-127, 127, channels=2)
    calibrate_weight(lsq, torch.tensor([1e-30, 1.0]).reshape(2, 1, 1, 1))
    assert lsq.scale.min().item() == np.float32(MIN_SCALE)
    observer, activation = ActivationObserver(), quantizer(0, 127)
    observer.update(torch.full((1, 4), 1e-20))
    observer.calibrate(activation)
    assert activation.scale.item() == np.float32(MIN_SCALE)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 3e38])
def test_a_batch_that_is_not_finite_leaves_a_valid_step(bad: float) -> None:
    lsq, observer = quantizer(-128, 127), ActivationObserver()
    observer.update(torch.linspace(-1, 1, 100)[None])
    observer.update(torch.tensor([[0.5, bad]]))
    observer.calibrate(lsq)
    assert math.isfinite(lsq.grid().scale[0])


def test_quantizer_of_names_what_is_no_quantizer() -> None:
    lsq = quantizer(0, 127)
    model = torch.nn.Module()
    model.add_module("quantizers", torch.nn.ModuleDict({lsq.spec.module_name: lsq}))
    assert quantizer_of(model, lsq.spec) is lsq
    model.get_submodule("quantizers").add_module(lsq.spec.module_name, torch.nn.Identity())
    with pytest.raises(TypeError, match=r"post_hooks\.x__0\.0: not a quantizer"):
        quantizer_of(model, lsq.spec)


def test_methods_make_a_quantizer_of_a_spec() -> None:
    spec = quantizer(0, 127).spec
    assert isinstance(METHODS["lsq"](spec), LSQQuantizer)


@pytest.mark.parametrize(("qmin", "qmax"), RANGES)
@pytest.mark.parametrize("scale", [1.0, 0.1, 3e-3])
def test_minmax_has_lsqs_values_and_a_straight_through_gradient(qmin: int, qmax: int, scale: float) -> None:
    spec = QuantizerSpec("post_hooks.x__0.0", ("post_hooks.x__0.0",), "activation", 8, qmin, qmax, None, 4)
    minmax = MinMaxQuantizer(spec)
    minmax.scale.fill_(scale)
    values = probe_values(scale, qmin, qmax)
    x = torch.from_numpy(values).requires_grad_()
    lsq = quantizer(qmin, qmax)
    set_scale(lsq, scale)
    out = minmax(x)
    assert torch.equal(out, lsq(x.detach()))
    upstream = np.random.default_rng(0).normal(size=values.shape).astype(np.float32)
    out.backward(torch.from_numpy(upstream))
    with np.errstate(over="ignore"):
        v = values / np.float32(scale)
    assert x.grad is not None
    np.testing.assert_array_equal(x.grad.numpy(), np.where((v >= qmin) & (v <= qmax), upstream, 0))
    assert list(minmax.parameters()) == []  # the range stays
    assert minmax.grid().scale.tolist() == [np.float32(scale)]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_minmax_compiled_and_eager_agree() -> None:
    minmax = MinMaxQuantizer(quantizer(-128, 127).spec)
    minmax.scale.fill_(0.013)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = x.detach().clone().requires_grad_()
    eager, compiled = minmax(x), torch.compile(minmax)(y)
    assert torch.equal(eager, compiled)
    eager.square().sum().backward()
    compiled.square().sum().backward()
    assert x.grad is not None and y.grad is not None and torch.equal(x.grad, y.grad)


@pytest.mark.parametrize(("qmin", "qmax"), [(-128, 127), (0, 127), (0, 255), (-8, 7), (0, 15)])
def test_minmax_and_percentile_calibration_are_numpys(features: tuple[Tensor, Tensor], qmin: int, qmax: int) -> None:
    values = (features[1] if qmin == 0 else features[0]).clone()
    if qmin == 0:
        values.clamp_(min=0)
    values.view(-1)[7] = 9 * values.max()  # one value far out, as in the field
    made = {}
    for calibration in ("minmax", "percentile", "mse"):
        observer = ActivationObserver()
        for batch in torch.split(values, 100):
            observer.update(batch)
        lsq = quantizer(qmin, qmax)
        observer.calibrate(lsq, calibration)
        made[calibration] = float(lsq.scale)
    array = values.numpy().astype(np.float64).ravel()
    largest = max(array.max() / qmax, array.min() / qmin if qmin else 0)
    assert made["minmax"] == pytest.approx(largest, rel=1e-6)
    magnitudes = np.abs(array[array != 0])
    expected = np.quantile(magnitudes, 0.9999, method="inverted_cdf")
    # To a bin of the histogram, whose limit is at most twice the largest value.
    assert expected / qmax <= made["percentile"] * (1 + 1e-6)
    assert made["percentile"] <= (expected + 2 * magnitudes.max() / 2048) / qmax
    assert made["percentile"] < made["minmax"] / 2


@pytest.mark.parametrize(("qmin", "qmax"), [(-127, 127), (-64, 63), (-8, 7)])
@pytest.mark.parametrize("calibration", ["minmax", "percentile"])
def test_minmax_calibration_clips_no_weight(qmin: int, qmax: int, calibration: str) -> None:
    weight = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[0] = -weight[0].abs()
    lsq = quantizer(qmin, qmax, 6)
    calibrate_weight(lsq, weight, calibration)
    array = weight.reshape(6, -1).numpy()
    expected = np.maximum(array.max(axis=1) / qmax, array.min(axis=1) / qmin)
    np.testing.assert_allclose(lsq.scale.detach().numpy().ravel(), expected, rtol=1e-6)
    codes = lsq.grid().quantize(weight.numpy()).reshape(6, -1)
    assert codes.min() >= qmin and codes.max() <= qmax
    assert bool(((codes.min(axis=1) == qmin) | (codes.max(axis=1) == qmax)).all())
