from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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


CANDIDATES = np.arange(80, 0, -1) / 80
# What a tensor of shape [channels or batches, values] holds, of its generator.
KINDS: dict[str, Callable[[np.random.Generator, tuple[int, int]], npt.NDArray[np.float64]]] = {
    "normal": lambda g, shape: g.standard_normal(shape),
    "heavy-tailed": lambda g, shape: g.standard_t(2.5, shape),
    "behind ReLU": lambda g, shape: np.maximum(g.standard_normal(shape), 0),
    "behind SiLU": lambda g, shape: (x := 2 * g.standard_normal(shape)) / (1 + np.exp(-x)),
    "constant": lambda g, shape: np.full(shape, g.standard_normal()),
    "few values": lambda g, shape: g.choice(g.standard_normal(4), shape),
    "one outlier": lambda g, shape: np.where(np.arange(shape[1]) == 3, 50.0, g.standard_normal(shape)),
    "unlike each other": lambda g, shape: g.standard_normal(shape) * 10.0 ** g.uniform(-4, 2, (shape[0], 1)),
    "one sign": lambda g, shape: -np.abs(g.standard_normal(shape)) - 0.1,
    "zeros": lambda g, shape: np.zeros(shape),
}
Drawn = npt.NDArray[np.float32]


def drawn(kind: str, seed: int, shape: tuple[int, int], size: float) -> Drawn:
    return np.asarray(KINDS[kind](np.random.default_rng(seed), shape) * size, np.float32)


def true_errors(values: Drawn, scales: npt.NDArray[np.float64], qmin: int, qmax: int) -> npt.NDArray[np.float64]:
    """The squared error of all values at each scale."""
    wide, steps = values.astype(np.float64).reshape(1, -1), np.asarray(scales, np.float64).reshape(-1, 1)
    result: npt.NDArray[np.float64] = np.square(np.clip(np.rint(wide / steps), qmin, qmax) * steps - wide).sum(axis=1)
    return result


def not_worse(found: float, values: Drawn, best: float) -> bool:
    """By the last term what float32 rounds values and scales by is no error."""
    return found <= 1.001 * best + 1e-12 * float(np.square(values.astype(np.float64)).sum())


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from(sorted(KINDS)), st.integers(0, 2**32 - 1), st.sampled_from([r for r in RANGES if r[0] < 0]),
    st.sampled_from([(1, 9), (700, 9), (5, 27), (3, 400), (2, 5000)]), st.sampled_from([1e-6, 1e-3, 1.0, 1e4]),
)  # fmt: skip
def test_no_candidate_for_a_weights_step_has_a_smaller_error(
    kind: str, seed: int, codes: tuple[int, int], shape: tuple[int, int], size: float
) -> None:
    """Of 80 candidates, tried one by one on all weights: the search that leaves out the hopeless ones loses nothing."""
    weights = drawn(kind, seed, shape, size)
    lsq = quantizer(*codes, channels=shape[0], ndim=2)
    calibrate_weight(lsq, torch.from_numpy(weights))
    found = lsq.scale.detach().numpy().reshape(-1)
    for channel in range(min(shape[0], 40)):
        values = weights[channel]
        candidates = np.maximum(np.abs(values).max() * CANDIDATES / codes[1], MIN_SCALE)
        best = float(true_errors(values, candidates, *codes).min())
        assert not_worse(float(true_errors(values, found[channel], *codes)[0]), values, best), channel


def step_by_histogram(batches: Drawn, qmin: int, qmax: int) -> float:
    """The best of 80 candidates for the middles of 2048 bins of each sign; the limit doubles from batch to batch."""
    limit = max(float(np.abs(batches[0]).max()), MIN_SCALE)
    while limit < np.abs(batches).max():
        limit *= 2
    counts = np.stack([np.histogram(side[side > 0], 2048, (0.0, limit))[0] for side in (batches, -batches)])
    if not counts.any():
        return 1.0
    middles = (np.arange(2048) + 0.5) * limit / 2048
    scales = (middles[np.flatnonzero(counts.sum(axis=0))[-1]] + limit / 4096) * CANDIDATES / qmax
    values, steps = np.stack([middles, -middles]), scales[:, None, None]
    errors = (counts * np.square(np.clip(np.rint(values / steps), qmin, qmax) * steps - values)).sum(axis=(1, 2))
    return float(max(scales[np.argmin(errors)], MIN_SCALE))


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from(sorted(KINDS)), st.integers(0, 2**32 - 1), st.sampled_from(RANGES),
    st.sampled_from([(1, 200), (3, 20000), (20, 64)]), st.sampled_from([1e-6, 1e-3, 1.0, 1e4]),
)  # fmt: skip
def test_an_activations_step_has_the_error_of_a_search_bin_by_bin(
    kind: str, seed: int, codes: tuple[int, int], shape: tuple[int, int], size: float
) -> None:
    batches = drawn(kind, seed, shape, size)
    lsq, observer = quantizer(*codes), ActivationObserver()
    for batch in batches:
        observer.update(torch.from_numpy(batch)[None])
    assert (observer.lowest, observer.highest) == (min(batches.min(), 0), max(batches.max(), 0))
    observer.calibrate(lsq)
    steps = np.array([lsq.scale.item(), step_by_histogram(batches, *codes)])
    found, expected = true_errors(batches, steps, *codes)
    assert not_worse(float(found), batches, float(expected))


def test_a_tensor_is_counted_alike_in_every_memory_layout() -> None:
    values = torch.randn(3, 5, 7, 9, generator=torch.Generator().manual_seed(0))
    values[0, 0, 0, :4] = torch.tensor([0.0, -0.0, values.max(), values.min()])
    observers = [ActivationObserver() for _ in range(4)]
    layouts = (
        values, values.contiguous(memory_format=torch.channels_last), values.transpose(1, 3),
        values.repeat(1, 2, 1, 1)[:, ::2],
    )  # fmt: skip
    for observer, layout in zip(observers, layouts, strict=True):
        observer.update(layout)
    expected = [
        np.histogram(side, 2048, (0, observers[0].limit))[0] for side in (values[values > 0], -values[values < 0])
    ]
    assert int(observers[0].counts.sum()) == values.numel() - 2
    assert np.abs(observers[0].counts.numpy() - np.stack(expected)).sum() <= 4  # at the edges of bins
    assert all(torch.equal(observer.counts, observers[0].counts) for observer in observers)


def test_more_values_than_a_float32_counts_are_counted() -> None:
    observer = ActivationObserver()
    observer.update(torch.ones(1, (1 << 24) + 5))
    assert int(observer.counts.sum()) == (1 << 24) + 5
