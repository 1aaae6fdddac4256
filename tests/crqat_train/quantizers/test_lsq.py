from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from crqat.train.quantizers import ActivationObserver, calibrate_weight
from tests.crqat_train.quantizers.reference import RANGES, Floats, needs_compiler, probe_values, quantizer, set_scale


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


@needs_compiler
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
