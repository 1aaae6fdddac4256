from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from crqat.train.quantizers import ActivationObserver, DoReFaQuantizer, MinMaxQuantizer, calibrate_weight
from tests.crqat_train.quantizers.reference import RANGES, Floats, needs_compiler, random_upstream, run, spec_of


def of_weight(weight: Floats, qmin: int, qmax: int) -> DoReFaQuantizer:
    made = DoReFaQuantizer(spec_of(qmin, qmax, channels=len(weight), ndim=weight.ndim))
    calibrate_weight(made, torch.from_numpy(weight))
    return made


def weights() -> Floats:
    """Channels of different sizes, one of zeros, zeros of both signs and subnormals."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((5, 4, 3, 3)) * np.array([0.05, 0.4, 1.0, 0.0, 2.0]).reshape(5, 1, 1, 1)
    weight[0, 0, 0] = [-0.0, 1e-40, -1e-40]
    result: Floats = weight.astype(np.float32)
    return result


def reference(weight: Floats, limit: float, scale: Floats, qmin: int, qmax: int, upstream: Floats) -> tuple[Any, ...]:
    """Limit tanh(w) / max|tanh(w)| rounded, and its gradient by the chain rule, the maximum's included; in float64."""
    squeezed = np.tanh(weight.astype(np.float64))
    largest = np.abs(squeezed).max()
    values = squeezed * limit / largest
    v = values / scale.reshape(-1, *[1] * (weight.ndim - 1))
    out = np.clip(np.rint(v), qmin, qmax) * scale.reshape(-1, *[1] * (weight.ndim - 1))
    upstream = np.where((v >= qmin) & (v <= qmax), upstream, 0).astype(np.float64)
    at_largest = np.abs(squeezed) == largest
    through_largest = -(upstream * values).sum() / largest * np.sign(squeezed) * at_largest / at_largest.sum()
    grad = (upstream * limit / largest + through_largest) * (1 - squeezed**2)
    return values, v, out, grad


@pytest.mark.parametrize(("qmin", "qmax"), [r for r in RANGES if r[0] < 0])
def test_weights_and_gradients_are_tanhs(qmin: int, qmax: int) -> None:
    weight = weights()
    quantizer = of_weight(weight, qmin, qmax)
    limit, scale = float(np.abs(weight).max()), quantizer.grid().scale
    assert quantizer.limit.item() == limit
    np.testing.assert_array_equal(scale, np.float32(limit) / np.float32(qmax))
    upstream = random_upstream(weight)
    out, grad = run(quantizer, weight, upstream)
    # Where a channel is zero its step may be any; this method has one step for all.
    values, v, expected, expected_grad = reference(weight, limit, scale.astype(np.float64), qmin, qmax, upstream)
    np.testing.assert_allclose(quantizer.values(torch.from_numpy(weight)).numpy(), values, rtol=1e-5, atol=1e-30)
    # Its tanh is float32's: within 1e-4 of a tie, or of the ends, either side is right.
    clear = (np.abs(v - np.floor(v) - 0.5) > 1e-4) & (np.abs(v) < qmax - 1e-4)
    assert clear.mean() > 0.95
    np.testing.assert_allclose(out[clear], expected[clear], rtol=1e-6)
    ends = np.abs(v) >= qmax - 1e-4
    inside = ~ends
    np.testing.assert_allclose(grad[inside], expected_grad[inside], rtol=1e-3, atol=1e-5)
    assert ends.sum() == 1 and np.isfinite(grad).all()  # the largest weight, at the end of the range
    assert not out[3].any()
    codes = quantizer.grid().quantize(quantizer.values(torch.from_numpy(weight)).numpy())
    assert np.abs(codes).max() == qmax  # symmetric: the extra negative code is not used
    np.testing.assert_array_equal(quantizer.grid().dequantize(codes), out)


def test_weights_of_zero_infinity_and_nan() -> None:
    zeros = np.zeros((2, 3, 1, 1), np.float32)
    quantizer = of_weight(zeros, -8, 7)
    out, grad = run(quantizer, zeros, np.ones_like(zeros))
    assert not out.any() and np.isfinite(grad).all()
    quantizer = of_weight(np.ones((1, 3, 1, 1), np.float32), -8, 7)
    out, grad = run(quantizer, np.array([math.inf, -math.inf, 0.0], np.float32).reshape(1, 3, 1, 1), zeros[:1])
    assert out.ravel().tolist() == [1.0, -1.0, 0.0] and np.isfinite(grad).all()
    assert quantizer(torch.tensor([math.nan, 0.5, 0.1]).reshape(1, 3, 1, 1)).isnan().any()


@pytest.mark.parametrize(("qmin", "qmax"), RANGES)
def test_activations_are_clipped_to_the_calibrated_range_straight_through(qmin: int, qmax: int) -> None:
    observer = ActivationObserver()
    observer.update(torch.randn(4, 100, generator=torch.Generator().manual_seed(0)))
    dorefa, minmax = DoReFaQuantizer(spec_of(qmin, qmax)), MinMaxQuantizer(spec_of(qmin, qmax))
    for made in (dorefa, minmax):
        observer.calibrate(made)
    values = np.array([-np.inf, -9, -0.3, -0.0, 0.0, 1e-40, 0.2, 9, np.inf], np.float32)
    results = [run(made, values, random_upstream(values)) for made in (dorefa, minmax)]
    np.testing.assert_array_equal(results[0], results[1])
    assert list(dorefa.parameters()) == []


@needs_compiler
def test_compiled_and_eager_agree() -> None:
    """Up to the last place of tanh: a compiler has its own, which may take a value over a tie."""
    weight = np.random.default_rng(0).standard_normal((8, 16, 3, 3)).astype(np.float32)
    upstream = random_upstream(weight)
    quantizer = of_weight(weight, -127, 127)
    eager = run(quantizer, weight, upstream)
    compiled = run(torch.compile(quantizer, fullgraph=True), weight, upstream)
    codes = [np.rint(out / quantizer.scale.numpy()) for out, _ in (eager, compiled)]
    assert np.abs(codes[0] - codes[1]).max() <= 1 and (codes[0] != codes[1]).mean() < 1e-3
    inside = np.abs(weight) < np.abs(weight).max()
    np.testing.assert_allclose(eager[1][inside], compiled[1][inside], rtol=1e-4, atol=1e-5)
