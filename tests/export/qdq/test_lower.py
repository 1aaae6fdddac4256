"""Grids in the targets' encodings: the same real values bit for bit, or the claim says that they are not."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crqat.core.grid import Grid
from crqat.core.targets import INT16_MAX
from crqat.export.qdq.lower import SPREAD_LIMIT, Activation, Weight, clip_bound, lower_activation, lower_weight

TARGETS = ("onnxruntime", "tensorrt")
WIDTHS = range(2, 9)
Float32 = npt.NDArray[np.float32]


def activation_grid(bits: int, signed: bool, scale: float = 0.0371) -> Grid:
    """As the layout makes it: 8 bits without a sign are the upper half of the signed range."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, min(2**bits - 1, 127))
    return Grid(np.array([scale], np.float32), 0, low, high)


def weight_grid(bits: int, scales: Float32) -> Grid:
    """As the layout makes it: narrow at 8 bits, the full range below."""
    low, high = (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return Grid(scales, 0, low, high, 0)


def weight_of_all_codes(grid: Grid) -> Float32:
    """A weight that holds every code in every channel, [C, codes, 1, 1]."""
    codes = np.broadcast_to(np.arange(grid.qmin, grid.qmax + 1), (grid.scale.size, grid.qmax - grid.qmin + 1))
    return grid.dequantize(codes).reshape(*codes.shape, 1, 1)


def decoded(weight: Weight) -> Float32:
    """The real weights that a runtime sees."""
    return weight.codes.astype(np.float32) * weight.scale.reshape(-1, *[1] * (weight.codes.ndim - 1))


def lower(
    grid: Grid,
    weight: Float32,
    target: str,
    multiplier: Float32 | None = None,
    bias: Float32 | None = None,
    fed: Activation | None = None,
    depthwise: bool = False,
) -> Weight:
    channels = weight.shape[0]
    multiplier = np.ones(channels, np.float32) if multiplier is None else multiplier
    bias = np.zeros(channels, np.float32) if bias is None else bias
    fed = fed or lower_activation(activation_grid(8, signed=False), target)
    return lower_weight(grid, weight, multiplier, bias, fed, depthwise, target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_activations_keep_their_values(bits: int, signed: bool, target: str) -> None:
    rng = np.random.default_rng(bits)
    for scale in rng.lognormal(-3, 2, 20).astype(np.float32):
        grid = activation_grid(bits, signed, float(scale))
        lowered = lower_activation(grid, target)
        assert lowered.claim == "exact"
        # What QuantizeLinear, the integer Clip and DequantizeLinear do to values within and beyond the range.
        values = rng.normal(0, 2 * grid.qmax * scale, 2000).astype(np.float32)
        values = values if signed else np.abs(values)  # behind a ReLU
        info = np.iinfo(lowered.dtype)
        codes = np.clip(np.rint(values / scale) + lowered.grid.zero_point, info.min, info.max)
        if lowered.clip is not None:
            codes = np.clip(codes, *lowered.clip)
        expected = grid.dequantize(grid.quantize(values))
        np.testing.assert_array_equal(lowered.grid.dequantize(codes), expected)
        every = np.arange(grid.qmin, grid.qmax + 1)
        own = np.arange(lowered.grid.qmin, lowered.grid.qmax + 1)
        np.testing.assert_array_equal(lowered.grid.dequantize(own), grid.dequantize(every))


def test_encodings_are_those_that_the_runtimes_fuse() -> None:
    for bits in WIDTHS:
        for signed in (True, False):
            runtime = lower_activation(activation_grid(bits, signed), "onnxruntime")
            assert (runtime.dtype, runtime.grid.qmin) == (np.uint8, 0)
            # A ReLU disappears only where the type's minimum is 0.0.
            assert runtime.grid.zero_point == (2 ** (bits - 1) if signed else 0)
            engine = lower_activation(activation_grid(bits, signed), "tensorrt")
            assert (engine.dtype, engine.grid.zero_point) == (np.int8, 0)
    assert lower_activation(activation_grid(8, True), "onnxruntime").clip is None
    assert lower_activation(activation_grid(8, False), "onnxruntime").clip == (0, 127)
    assert lower_activation(activation_grid(4, True), "onnxruntime").clip == (0, 15)
    assert lower_activation(activation_grid(8, False), "tensorrt").clip is None
    assert lower_activation(activation_grid(4, True), "tensorrt").clip == (-8, 7)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("signed_input", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_weights_keep_their_values(bits: int, signed_input: bool, target: str) -> None:
    rng = np.random.default_rng(bits)
    grid = weight_grid(bits, rng.lognormal(-4, 2, 64).astype(np.float32))
    weight = weight_of_all_codes(grid)
    # The layout gives 8 bits behind an unsigned input only.
    input_grid = activation_grid(7 if signed_input and bits == 8 else 8, signed_input)
    lowered = lower(grid, weight, target, fed=lower_activation(input_grid, target))
    assert (lowered.claim, lowered.note) == ("exact", "")
    assert lowered.codes.dtype == np.int8
    np.testing.assert_array_equal(decoded(lowered), weight)
    if target == "onnxruntime":
        largest = int(np.abs(lowered.codes.astype(int)).max())
        assert bits == 8 or largest <= SPREAD_LIMIT
        assert bits >= 7 or 2 * largest > SPREAD_LIMIT  # spread as far as a power of two can
        assert 2 * largest * lower_activation(input_grid, target).grid.qmax <= INT16_MAX
    else:
        np.testing.assert_array_equal(lowered.codes, grid.quantize(weight))


@pytest.mark.parametrize("bits", WIDTHS)
def test_batch_norm_folds_into_scale_and_sign(bits: int) -> None:
    """Codes are not rounded again; what the folded scale is rounded to lies within 2^-21 of it."""
    rng = np.random.default_rng(bits)
    grid = weight_grid(bits, rng.lognormal(-4, 1, 200).astype(np.float32))
    weight = (rng.normal(0, grid.qmax, (200, 9, 3, 3)) * grid.scale.reshape(-1, 1, 1, 1)).astype(np.float32)
    multiplier = rng.normal(0, 2, 200).astype(np.float32)
    multiplier[:4] = [0.0, 1e-12, -1e-12, -0.0]
    plain = grid.quantize(weight)
    for target in TARGETS:
        lowered = lower(grid, weight, target, multiplier)
        assert lowered.claim == "exact"
        assert (lowered.scale > 0).all()
        spread = 2 ** max(0, 7 - bits) if target == "onnxruntime" else 1
        signs = np.sign(multiplier).reshape(-1, 1, 1, 1)
        np.testing.assert_array_equal(lowered.codes, plain * signs * spread)
        exact = grid.scale.astype(np.float64) * np.abs(multiplier)
        live = multiplier != 0
        np.testing.assert_allclose(lowered.scale[live] * np.float64(spread), exact[live], rtol=2.0**-21, atol=0)


def test_folded_scales_of_both_targets_are_one_grid() -> None:
    """The target's codes differ by a power of two, so their values are the same bit for bit."""
    rng = np.random.default_rng(0)
    for bits in WIDTHS:
        grid = weight_grid(bits, rng.lognormal(-4, 1, 100).astype(np.float32))
        weight = rng.normal(0, 0.1, (100, 8)).astype(np.float32)
        multiplier = rng.normal(0, 2, 100).astype(np.float32)
        bias = rng.normal(0, 1, 100).astype(np.float32)
        one, other = (lower(grid, weight, target, multiplier, bias) for target in TARGETS)
        np.testing.assert_array_equal(decoded(one), decoded(other))
        np.testing.assert_array_equal(one.bias, other.bias)
        np.testing.assert_array_equal(one.bias_codes, other.bias_codes)


def test_a_scale_made_for_float16_is_one_after_folding() -> None:
    rng = np.random.default_rng(1)
    half = rng.lognormal(-4, 2, 4000).astype(np.float16).astype(np.float32)
    multiplier = rng.normal(0, 2, 4000).astype(np.float32)
    grid = weight_grid(8, (half / np.abs(multiplier)).astype(np.float32))
    product = grid.scale * np.abs(multiplier)
    assert (product != half).any()  # without the correction this test would show nothing
    lowered = lower(grid, np.repeat(grid.scale[:, None], 3, 1), "tensorrt", multiplier)
    np.testing.assert_array_equal(lowered.scale, half)
    # Without BN there is no product whose rounding could be taken back.
    near = weight_grid(8, np.nextafter(half[:50], np.float32(np.inf)))
    np.testing.assert_array_equal(lower(near, np.repeat(near.scale[:, None], 3, 1), "tensorrt").scale, near.scale)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("multiplier", [0.0, 1e-44, 316.0])
def test_channels_without_weights_do_not_coarsen_their_bias(multiplier: float, target: str) -> None:
    """A dead channel's BN divides by sqrt(epsilon); in units of s_x s_w m its bias would be off by several codes."""
    grid = weight_grid(8, np.array([1e-3, 1.0], np.float32))
    weight = np.ones((2, 4), np.float32)
    weight[0] = 0.0 if multiplier == 316.0 else 1.0
    bias = np.array([0.3, 0.3], np.float32)
    fed = lower_activation(activation_grid(8, signed=False), target)
    lowered = lower(grid, weight, target, np.array([multiplier, 1.0], np.float32), bias, fed)
    assert not lowered.codes[0].any()
    assert lowered.codes[1].all()
    assert lowered.scale[0] > 0
    assert abs(float(lowered.bias[0]) - 0.3) < 1e-4
    assert lowered.claim == "exact"


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("target", TARGETS)
def test_the_bias_is_rounded_to_half_a_unit_at_most(target: str, bits: int) -> None:
    rng = np.random.default_rng(bits)
    grid = weight_grid(bits, rng.lognormal(-5, 1, 300).astype(np.float32))
    weight = rng.normal(0, 0.1, (300, 16)).astype(np.float32)
    weight[:, 0] = grid.scale  # no channel is dead
    bias = rng.normal(0, 1, 300).astype(np.float32)
    fed = lower_activation(activation_grid(8, signed=True), target)
    lowered = lower(grid, weight, target, bias=bias, fed=fed, depthwise=True)
    spread = 2 ** max(0, 7 - bits)
    unit = grid.scale.astype(np.float64) * float(fed.grid.scale[0]) / spread
    error = np.abs(lowered.bias.astype(np.float64) - bias)
    # Half a unit, and the float32 roundings of the unit and of the product.
    assert (error <= 0.5 * unit + 2.0**-22 * np.abs(bias)).all()
    assert error.max() > 0.1 * unit.min()
    assert lowered.bias_error == error.max()
    np.testing.assert_array_equal(lowered.bias_codes, np.rint(lowered.bias / unit))


@pytest.mark.parametrize("target", TARGETS)
def test_a_bias_too_large_for_int32_is_lossy(target: str) -> None:
    grid = weight_grid(8, np.full(2, 1e-9, np.float32))
    weight = np.full((2, 4), 1e-7, np.float32)
    fed = lower_activation(activation_grid(8, signed=False, scale=1e-3), target)
    fits = lower(grid, weight, target, bias=np.array([1e-3, -2e-3], np.float32), fed=fed)
    assert (fits.claim, fits.note) == ("exact", "")
    lowered = lower(grid, weight, target, bias=np.array([1e-3, -1.0], np.float32), fed=fed)
    assert lowered.claim == "lossy"
    assert "int32" in lowered.note
    assert lowered.bias_codes.tolist() == [pytest.approx(1e9, rel=2.0**-22), -(2**31 - 1)]
    assert lowered.bias_error == pytest.approx(1 - (2**31 - 1) * 1e-12, rel=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_an_underflowing_unit_is_lossy_and_no_nan(target: str) -> None:
    grid = weight_grid(8, np.full(2, 1e-8, np.float32))
    fed = lower_activation(activation_grid(8, signed=False, scale=1e-8), target)
    multiplier, bias = np.full(2, 1e-32, np.float32), np.array([0.0, 1.0], np.float32)
    with np.errstate(all="raise", under="ignore"):
        lowered = lower(grid, np.full((2, 4), 1e-7, np.float32), target, multiplier, bias, fed)
    assert (lowered.claim, lowered.bias_codes.tolist()) == ("lossy", [0, 2**31 - 1])


def test_full_weights_behind_a_signed_input_are_reduced_and_said_to_be_lossy() -> None:
    rng = np.random.default_rng(0)
    grid = weight_grid(8, rng.lognormal(-4, 1, 8).astype(np.float32))
    weight = weight_of_all_codes(grid)
    fed = lower_activation(activation_grid(8, signed=True), "onnxruntime")
    lowered = lower(grid, weight, "onnxruntime", fed=fed)
    assert lowered.claim == "lossy"
    assert "saturate" in lowered.note
    largest = int(np.abs(lowered.codes.astype(int)).max())
    assert largest == 64
    assert fed.grid.qmax * 2 * largest <= INT16_MAX
    # The same range in larger steps: half of a new step and float32's rounding.
    assert (np.abs(decoded(lowered) - weight) <= 0.5001 * lowered.scale.reshape(-1, 1, 1, 1)).all()
    for exempt in (
        lower(grid, weight, "onnxruntime", fed=fed, depthwise=True),
        lower(grid, weight, "tensorrt", fed=lower_activation(activation_grid(8, signed=True), "tensorrt")),
    ):
        assert exempt.claim == "exact"
        np.testing.assert_array_equal(decoded(exempt), weight)


def test_a_weight_behind_a_float_input_is_exact() -> None:
    grid = weight_grid(8, np.array([0.01], np.float32))
    weight = weight_of_all_codes(grid)
    lowered = lower_weight(grid, weight, np.ones(1, np.float32), np.ones(1, np.float32), None, False, "onnxruntime")
    assert lowered.claim == "exact"
    np.testing.assert_array_equal(decoded(lowered), weight)


def test_an_integer_clip_does_what_relu6_does() -> None:
    """Against rint(min(x, 6) / s) for values around 6, at each of many scales, ties among them."""
    scales = np.concatenate(
        [np.random.default_rng(0).lognormal(-3, 1, 300), 6 / (np.arange(5, 200) + 0.5), 6 / np.arange(5.0, 200)]
    ).astype(np.float32)
    around = np.float32(6) + np.arange(-50, 51, dtype=np.float32) * np.float32(2.0**-21)
    clipped = 0
    for bits in (8, 4, 7):
        for scale in scales:
            grid = lower_activation(activation_grid(bits, False, float(scale)), "onnxruntime").grid
            values = np.concatenate([np.linspace(-2, 12, 500, dtype=np.float32), around])
            expected = np.clip(np.rint(np.minimum(np.maximum(values, 0), np.float32(6)) / scale), 0, grid.qmax)
            bound = clip_bound(6.0, grid)
            np.testing.assert_array_equal(np.clip(np.rint(values / scale), 0, bound), expected)
            clipped += bound < grid.qmax
    assert clipped > 100


SCALES = st.floats(min_value=2.0**-60, max_value=2.0**60, width=32)
VALUES = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(WIDTHS), st.booleans(), SCALES, st.sampled_from(TARGETS), VALUES)
def test_an_exact_activation_keeps_every_value(
    bits: int, signed: bool, scale: float, target: str, drawn: list[float]
) -> None:
    grid = activation_grid(bits, signed, scale)
    lowered = lower_activation(grid, target)
    assert lowered.claim == "exact"
    values = np.concatenate([np.array(drawn, np.float32), grid.dequantize(np.arange(grid.qmin, grid.qmax + 1))])
    with np.errstate(over="ignore"):
        expected, codes = grid.dequantize(grid.quantize(values)), lowered.grid.quantize(values)
    stored = codes.astype(lowered.dtype)  # what the file can hold
    np.testing.assert_array_equal(stored, codes)
    np.testing.assert_array_equal(lowered.grid.dequantize(stored), expected)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(WIDTHS), SCALES, st.sampled_from(TARGETS), st.sampled_from([-1.0, 1.0]), st.booleans(), VALUES)
def test_an_exact_weight_keeps_every_value(
    bits: int, scale: float, target: str, sign: float, signed_input: bool, drawn: list[float]
) -> None:
    grid = weight_grid(bits, np.array([scale], np.float32))
    weight = np.concatenate([np.array([drawn], np.float32), weight_of_all_codes(grid).reshape(1, -1)], axis=1)
    entered = lower_activation(activation_grid(8, signed_input), target)
    multiplier, bias = np.array([sign], np.float32), np.zeros(1, np.float32)
    with np.errstate(over="ignore"):
        lowered = lower_weight(grid, weight, multiplier, bias, entered, False, target)
        expected = sign * grid.dequantize(grid.quantize(weight))
    # 8-bit codes behind a signed input would saturate 16-bit sums, and the claim says so.
    assert lowered.claim == ("lossy" if target == "onnxruntime" and bits == 8 and signed_input else "exact")
    if lowered.claim == "exact":
        np.testing.assert_array_equal(decoded(lowered), expected)
