from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from crqat.train.data import sources
from crqat.train.data.batches import evaluation_batches
from crqat.train.quantizers import MIN_SCALE, ActivationObserver, calibrate_weight
from tests.crqat_train.quantizers.reference import RANGES, quantizer


@pytest.fixture(scope="module")
def features() -> Iterator[tuple[Tensor, Tensor]]:
    """What a convolution makes of real images, before and behind ReLU."""
    digits = sources.load("digits", None, download=False)
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
