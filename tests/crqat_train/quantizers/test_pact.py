from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from crqat.train.quantizers import PACTQuantizer
from tests.crqat_train.quantizers.reference import (
    RANGES,
    hard_values,
    needs_compiler,
    probe_values,
    random_upstream,
    run,
    set_scale,
    spec_of,
)


def pact(qmin: int, qmax: int, scale: float) -> PACTQuantizer:
    made = PACTQuantizer(spec_of(qmin, qmax))
    set_scale(made, scale)
    return made


@pytest.mark.parametrize("scale", [0.1, 2.0**-5, 0.3337])
@pytest.mark.parametrize(("qmin", "qmax"), RANGES)
def test_values_and_gradients_are_those_of_the_paper(qmin: int, qmax: int, scale: float) -> None:
    values = probe_values(scale, qmin, qmax)
    upstream = random_upstream(values)
    quantizer = pact(qmin, qmax, scale)
    out, grad_x = run(quantizer, values, upstream)
    with np.errstate(over="ignore"):
        v = values / np.float32(scale)
    np.testing.assert_array_equal(out, np.clip(np.rint(v), qmin, qmax) * np.float32(scale))
    np.testing.assert_array_equal(grad_x, np.where((v >= qmin) & (v < qmax), upstream, 0))
    # d alpha = 1 where x >= alpha, and -1 below -alpha where the codes are signed.
    level = np.where(v >= qmax, 1.0, np.where(v < qmin, -1.0 if qmin < 0 else 0.0, 0.0))
    assert quantizer.scale.grad is not None
    alpha = quantizer.scale.grad.item() * qmax
    np.testing.assert_allclose(alpha, (upstream.astype(np.float64) * level).sum(), rtol=1e-4, atol=1e-4)


def test_the_gradient_at_the_ends_of_the_range() -> None:
    for x, grad_x, grad_alpha in ((-1e-30, 0.0, 0.0), (0.0, 1.0, 0.0), (1.4999999, 1.0, 0.0), (1.5, 0.0, 1.0)):
        quantizer = pact(0, 3, 0.5)
        _, grad = run(quantizer, np.array([x], np.float32), np.ones(1, np.float32))
        assert quantizer.scale.grad is not None
        assert grad[0] == grad_x, x
        assert quantizer.scale.grad.item() * 3 == pytest.approx(grad_alpha), x


def test_sgd_moves_alpha_as_if_it_were_the_parameter() -> None:
    """Momentum and weight decay included: the scale is alpha divided by qmax at every step."""
    alpha = torch.tensor([1.5], requires_grad=True)
    quantizer = pact(0, 15, 0.1)
    x = torch.rand(100, generator=torch.Generator().manual_seed(0)) * 3
    settings: dict[str, Any] = {"lr": 0.0003, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    ours, theirs = torch.optim.SGD([quantizer.scale], **settings), torch.optim.SGD([alpha], **settings)
    for _ in range(5):
        ours.zero_grad()
        theirs.zero_grad()
        quantizer(x).sum().backward()
        alpha.grad = (x >= alpha).sum().float().reshape(1)
        ours.step()
        theirs.step()
        assert quantizer.scale.item() * 15 == pytest.approx(alpha.item(), rel=1e-5)
    assert alpha.item() < 1.4


def test_infinity_and_nan() -> None:
    quantizer = pact(-8, 7, 1.0)
    out, grad_x = run(quantizer, np.array([math.inf, -math.inf, math.nan], np.float32), np.ones(3, np.float32))
    assert out[:2].tolist() == [7.0, -8.0] and math.isnan(out[2])
    assert grad_x[:2].tolist() == [0.0, 0.0]
    assert quantizer.scale.grad is not None and quantizer.scale.grad.item() == 0.0  # +1 above, -1 below


@needs_compiler
def test_compiled_and_eager_agree() -> None:
    values = hard_values(0.013, 0, 127, (4, 3, 33, 35))
    upstream = random_upstream(values)
    results = []
    for compiled in (False, True):
        quantizer = pact(0, 127, 0.013)
        function: Any = torch.compile(quantizer, fullgraph=True) if compiled else quantizer
        results.append((*run(function, values, upstream), quantizer.scale.grad))
    np.testing.assert_array_equal(results[0][0], results[1][0])  # but for the sign of zero
    np.testing.assert_array_equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-4, atol=1e-4)
