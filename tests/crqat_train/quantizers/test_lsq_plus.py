from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from crqat.train.quantizers import ActivationObserver, LSQPlusQuantizer, LSQQuantizer, calibrate_weight
from tests.crqat_train.quantizers.reference import (
    RANGES,
    Floats,
    hard_values,
    needs_compiler,
    probe_values,
    random_upstream,
    run,
    set_scale,
    spec_of,
)

SIGNED = [r for r in RANGES if r[0] < 0]


def lsq_plus(qmin: int, qmax: int, scale: float, offset: float, factors: tuple[float, float] = (1, 1)) -> Any:
    made = LSQPlusQuantizer(spec_of(qmin, qmax))
    set_scale(made, scale)
    made.grad_scale, made.offset_grad_scale = factors
    assert made.offset is not None
    with torch.no_grad():
        made.offset.fill_(offset)
    return made


def reference(x: Floats, s: Any, beta: Any, qmin: int, qmax: int, upstream: Floats) -> tuple[Floats, Floats, Any, Any]:
    """Equations 4 to 8 of arXiv 2004.09576 with beta = -z s, where z is the nearest integer in the range of codes."""
    z = np.clip(np.rint(-beta / s), qmin, qmax)
    with np.errstate(over="ignore"):
        v = x / s
    below, above = v <= qmin - z, v >= qmax - z
    out = np.clip(np.rint(v), qmin - z, qmax - z) * s
    with np.errstate(invalid="ignore"):
        step = np.where(below, qmin, np.where(above, qmax, np.rint(v) - v))
    wide = upstream.astype(np.float64)
    outside = below | above
    return out, np.where(outside, 0, upstream), (wide * step).sum(), (wide * outside).sum()


@pytest.mark.parametrize("share", [0.0, 0.3, -0.45, 7.0])
@pytest.mark.parametrize("scale", [0.1, 0.3337])
@pytest.mark.parametrize(("qmin", "qmax"), SIGNED)
def test_values_and_gradients_are_those_of_the_paper(qmin: int, qmax: int, scale: float, share: float) -> None:
    s, beta = np.float32(scale), np.float32(share * scale * (qmax - qmin))
    shift = int(np.clip(np.rint(-beta / s), qmin, qmax))
    values = probe_values(scale, qmin - shift, qmax - shift)
    upstream = random_upstream(values)
    quantizer = lsq_plus(qmin, qmax, scale, float(beta), (0.37, 0.5))
    out, grad_x = run(quantizer, values, upstream)
    expected, expected_x, step, offset = reference(values, s, beta, qmin, qmax, upstream)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(grad_x, expected_x)
    np.testing.assert_allclose(quantizer.scale.grad.numpy(), [step * 0.37], atol=1e-4 * max(-qmin, qmax), rtol=1e-4)
    np.testing.assert_allclose(quantizer.offset.grad.numpy(), [offset * 0.5], atol=1e-4, rtol=1e-4)
    grid = quantizer.grid()
    assert grid.zero_point == shift
    np.testing.assert_array_equal(grid.dequantize(grid.quantize(values)), out)


def test_ties_go_to_the_even_code_without_the_zero_point_and_zero_stays_zero() -> None:
    quantizer = lsq_plus(-8, 7, 0.25, 0.75)  # z = -3
    ties = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5, 0.0, -0.0]) * 0.25
    assert (quantizer(ties) / 0.25).tolist() == [-2.0, 0.0, 0.0, 2.0, 2.0, 0.0, 0.0]
    assert quantizer.grid().zero_point == -3


def test_infinity_and_nan() -> None:
    quantizer = lsq_plus(-8, 7, 1.0, 2.0)
    out, grad_x = run(quantizer, np.array([math.inf, -math.inf, math.nan], np.float32), np.ones(3, np.float32))
    assert out[:2].tolist() == [9.0, -6.0] and math.isnan(out[2])
    assert grad_x[:2].tolist() == [0.0, 0.0]


def test_offset_free_where_values_are_never_negative_and_for_weights() -> None:
    for spec in (spec_of(0, 127), spec_of(-8, 7, channels=3)):
        quantizer, lsq = LSQPlusQuantizer(spec), LSQQuantizer(spec)
        assert quantizer.offset is None and quantizer.grid().zero_point == 0
        values = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0)) * 30
        assert torch.equal(quantizer(values), lsq(values))


def test_weights_start_three_deviations_from_their_mean() -> None:
    weight = torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor(
        [0.0, 2.0, -2.0, 0.0]
    ).reshape(4, 1, 1, 1)
    weight[3] = 0
    quantizer = LSQPlusQuantizer(spec_of(-8, 7, channels=4))
    calibrate_weight(quantizer, weight)
    array = weight.reshape(4, -1).numpy().astype(np.float64)
    mean, deviation = array.mean(axis=1), array.std(axis=1)
    expected = np.maximum(np.abs(mean - 3 * deviation), np.abs(mean + 3 * deviation)) / 8
    expected[3] = expected.max()  # a channel of zeros takes the largest step
    np.testing.assert_allclose(quantizer.scale.detach().numpy().ravel(), expected, rtol=1e-5)


@pytest.mark.parametrize(("qmin", "qmax"), [(-128, 127), (-8, 7), (-2, 1)])
def test_an_asymmetric_start_beats_the_symmetric_one_and_its_neighbours(qmin: int, qmax: int) -> None:
    x = torch.nn.functional.silu(torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 2)
    observer = ActivationObserver()
    for batch in torch.split(x, 16):
        observer.update(batch)
    quantizer, lsq = LSQPlusQuantizer(spec_of(qmin, qmax)), LSQQuantizer(spec_of(qmin, qmax))
    observer.calibrate(quantizer)
    observer.calibrate(lsq)

    def error(made: torch.nn.Module) -> float:
        with torch.no_grad():
            return float((made(x) - x).double().square().sum())

    found = error(quantizer)
    assert found < 0.7 * error(lsq)
    scale, offset = quantizer.scale.item(), 0.0 if quantizer.offset is None else quantizer.offset.item()
    for factor in (0.9, 1.1):
        assert found <= error(lsq_plus(qmin, qmax, scale * factor, offset)) * 1.02, factor
    observer.calibrate(quantizer, "minmax")
    grid = quantizer.grid()
    low, high = (grid.qmin - grid.zero_point) * grid.scale[0], (grid.qmax - grid.zero_point) * grid.scale[0]
    assert low == pytest.approx(x.min().item(), abs=0.51 * float(grid.scale[0]))
    assert high == pytest.approx(x.max().item(), abs=0.51 * float(grid.scale[0]))


def test_a_tensor_of_zeros_and_one_of_a_single_sign_start_with_a_valid_grid() -> None:
    for values in (torch.zeros(2, 3), torch.linspace(1, 2, 100)[None], -torch.linspace(1, 2, 100)[None]):
        for calibration in ("mse", "minmax", "percentile"):
            observer, quantizer = ActivationObserver(), LSQPlusQuantizer(spec_of(-128, 127))
            observer.update(values)
            observer.calibrate(quantizer, calibration)
            grid = quantizer.grid()
            assert (quantizer(values) - values).abs().max() <= 0.01
            assert grid.zero_point == (0 if not values.any() else -128 if values.max() > 0 else 127)


@needs_compiler
def test_compiled_and_eager_agree() -> None:
    values = hard_values(0.013, -90, 165, (4, 3, 33, 35))
    upstream = random_upstream(values)
    results = []
    for compiled in (False, True):
        quantizer = lsq_plus(-128, 127, 0.013, 0.5)
        function: Any = torch.compile(quantizer, fullgraph=True) if compiled else quantizer
        results.append((*run(function, values, upstream), quantizer.scale.grad, quantizer.offset.grad))
    np.testing.assert_array_equal(results[0][0].view(np.int32), results[1][0].view(np.int32))
    np.testing.assert_array_equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2:], results[1][2:], rtol=1e-4, atol=1e-2)
