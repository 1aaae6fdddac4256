"""What the methods' tests share: specs, values at which rounding is hard, and gradients in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crqat.train.placement.quantizer_spec import QuantizerSpec
from crqat.train.quantizers import LSQQuantizer, Quantizer
from tests.needs import needs

Floats = npt.NDArray[Any]
# Every kind of code range in the layout: 8-bit weights and activations, both signs of low widths.
RANGES = [(-127, 127), (-128, 127), (0, 127), (-64, 63), (-8, 7), (0, 15), (-2, 1), (0, 3)]
needs_compiler = needs("compiler")


def spec_of(qmin: int, qmax: int, channels: int | None = None, ndim: int = 4) -> QuantizerSpec:
    """A weight's spec where there are channels, else an activation's."""
    kind = "activation" if channels is None else "weight"
    return QuantizerSpec("post_hooks.x__0.0", ("post_hooks.x__0.0",), kind, 8, qmin, qmax, channels, ndim)


def quantizer(qmin: int, qmax: int, channels: int | None = None, ndim: int = 4) -> LSQQuantizer:
    return LSQQuantizer(spec_of(qmin, qmax, channels, ndim))


def set_scale(quantizer: Quantizer, scale: Any) -> None:
    with torch.no_grad():
        quantizer.scale.copy_(torch.as_tensor(scale, dtype=torch.float32).reshape(quantizer.scale.shape))


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


def run(quantizer: Any, values: Floats, upstream: Floats) -> tuple[Floats, Floats]:
    """Output and the gradient for the input; parameters keep theirs in `.grad`."""
    x = torch.tensor(values, requires_grad=True)
    y: Tensor = quantizer(x)
    y.backward(torch.from_numpy(upstream))  # type: ignore[no-untyped-call]
    assert x.grad is not None
    return y.detach().numpy(), x.grad.numpy()


def random_upstream(values: Floats) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(values.shape).astype(np.float32)


def hard_values(scale: float, qmin: int, qmax: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """A tensor of such a shape: half of its values are at or next to a tie, the first ones are special."""
    rng = np.random.default_rng(0)
    ties = (rng.integers(qmin - 2, qmax + 2, shape) + 0.5).astype(np.float32) * np.float32(scale)
    nudged = ties * (1 + rng.integers(-2, 3, shape).astype(np.float32) * np.float32(2.0**-23))
    values = np.where(rng.random(shape) < 0.5, nudged, rng.standard_normal(shape) * scale * qmax)
    values.reshape(-1)[:7] = [0.0, -0.0, 1e-40, -1e-40, np.inf, -np.inf, 3e38]
    return values.astype(np.float32)
