from __future__ import annotations

import numpy as np
import pytest
import torch

from crqat.train.quantizers import MinMaxQuantizer
from tests.crqat_train.quantizers.reference import RANGES, needs_compiler, probe_values, quantizer, set_scale, spec_of


@pytest.mark.parametrize(("qmin", "qmax"), RANGES)
@pytest.mark.parametrize("scale", [1.0, 0.1, 3e-3])
def test_minmax_has_lsqs_values_and_a_straight_through_gradient(qmin: int, qmax: int, scale: float) -> None:
    minmax = MinMaxQuantizer(spec_of(qmin, qmax))
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


@needs_compiler
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
