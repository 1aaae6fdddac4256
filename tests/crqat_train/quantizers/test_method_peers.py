"""Our methods beside the quantizers of others, at equal parameters: same values, and where gradients differ, by what.

The table of docs/methods.md holds what `test_gradients_differ_as_the_table_says` measures.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from crqat.train.quantizers import LSQPlusQuantizer, LSQQuantizer, Quantizer
from tests.crqat_train.quantizers.reference import set_scale, spec_of
from tests.needs import require

PAGE = Path(__file__).parents[3] / "docs" / "methods.md"
CODES = [(-128, 127), (-8, 7), (0, 255), (0, 15)]


def inputs(qmin: int, qmax: int, scale: float, shift: int = 0) -> Tensor:
    """Seven tenths of the values inside the range, none nearer to a tie than a hundredth of a step."""
    generator = torch.Generator().manual_seed(0)
    beyond = (qmax - qmin) // 5
    codes = torch.randint(qmin - shift - beyond, qmax - shift + beyond + 1, (4000,), generator=generator)
    codes = codes.float()
    return (codes + (torch.rand(4000, generator=generator) - 0.5) * 0.98) * scale


def ours(qmin: int, qmax: int, scale: float, zero_point: int = 0) -> Quantizer:
    kind = LSQPlusQuantizer if zero_point else LSQQuantizer
    made = kind(spec_of(qmin, qmax))
    set_scale(made, scale)
    if isinstance(made, LSQPlusQuantizer) and made.offset is not None:
        with torch.no_grad():
            made.offset.fill_(-zero_point * scale)
    return made


def gradients(function: Any, x: Tensor, parameters: list[Tensor]) -> tuple[Tensor, Tensor, list[float]]:
    """Output, and gradients of a fixed weighted sum for the input and the parameters."""
    x = x.clone().requires_grad_()
    for parameter in parameters:
        parameter.grad = None
    y = function(x)
    y.backward(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
    assert x.grad is not None
    found = [0.0 if p.grad is None else float(p.grad.sum()) for p in parameters]
    return y.detach(), x.grad, found


def nncf_quantizer(qmin: int, qmax: int, scale: float, zero_point: int = 0) -> Any:
    """NNCF's module with the same codes and step; its extension in C++ is replaced by its reference, in PyTorch."""
    from nncf.common.quantization.structs import QuantizationScheme
    from nncf.torch.quantization import layers

    mode = QuantizationScheme.ASYMMETRIC if zero_point else QuantizationScheme.SYMMETRIC
    bits = (qmax - qmin + 1).bit_length() - 1
    spec = layers.PTQuantizerSpec(bits, mode, None if zero_point else qmin < 0, False, False, (1,), False)
    if zero_point:
        made = layers.AsymmetricQuantizer(spec)
        made.input_low.data.fill_((qmin - zero_point) * scale)
        made.input_range.data.fill_((qmax - qmin) * scale)
        return made
    made = layers.SymmetricQuantizer(spec)
    made.signed = qmin < 0
    made.scale.data.fill_(qmax * scale)
    return made


@pytest.fixture(autouse=True)
def _no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        from nncf.torch.quantization.extensions import QuantizedFunctionsCPU
        from nncf.torch.quantization.reference import ReferenceBackendType, ReferenceQuantize
    except ImportError:
        return
    plain = ReferenceQuantize(ReferenceBackendType.TORCH)

    class Functions:
        Quantize_forward = staticmethod(plain.forward)
        Quantize_backward = staticmethod(plain.backward)

    monkeypatch.setattr(QuantizedFunctionsCPU, "_loaded_namespace", Functions)


@pytest.mark.parametrize(("qmin", "qmax"), CODES)
def test_nncfs_symmetric_quantizer_has_the_same_values(qmin: int, qmax: int) -> None:
    x = inputs(qmin, qmax, 0.05)
    quantizer, peer = ours(qmin, qmax, 0.05), nncf_quantizer(qmin, qmax, 0.05)
    assert (peer.level_low, peer.level_high) == (qmin, qmax)
    out, grad_x, _ = gradients(quantizer, x, [])
    theirs, their_grad_x, _ = gradients(peer, x, [])
    torch.testing.assert_close(out, theirs, rtol=1e-5, atol=1e-6)
    inside = ((x / 0.05).abs() - 0.01 < qmax) & (x / 0.05 > qmin) & (x / 0.05 < qmax)
    assert torch.equal(grad_x[inside], their_grad_x[inside])


@pytest.mark.parametrize(("low", "zero_point"), [(-128, 40), (-8, -3)])
def test_nncfs_asymmetric_quantizer_has_the_same_values(low: int, zero_point: int) -> None:
    high = -low - 1
    x = inputs(low, high, 0.05, zero_point)
    out, grad_x, _ = gradients(ours(low, high, 0.05, zero_point), x, [])
    theirs, their_grad_x, _ = gradients(nncf_quantizer(low, high, 0.05, zero_point), x, [])
    torch.testing.assert_close(out, theirs, rtol=1e-5, atol=1e-5)
    assert (grad_x == their_grad_x).float().mean() > 0.99


@pytest.mark.parametrize(
    ("qmin", "qmax", "zero_point"), [(*codes, 0) for codes in CODES] + [(-128, 127, 3), (-8, 7, 3)]
)
def test_torchs_learnable_quantizer_has_the_same_values(qmin: int, qmax: int, zero_point: int) -> None:
    x = inputs(qmin, qmax, 0.05, zero_point)
    out, grad_x, _ = gradients(ours(qmin, qmax, 0.05, zero_point), x, [])
    theirs, their_grad_x, _ = gradients(torch_quantizer(qmin, qmax, zero_point)[0], x, [])
    torch.testing.assert_close(out, theirs, rtol=1e-5, atol=1e-6)
    # At the ends of the range torch rounds before it compares, we after.
    v = x / 0.05 + zero_point
    clear = (v < qmax - 0.6) & (v > qmin + 0.6)
    assert torch.equal(grad_x[clear], their_grad_x[clear])


def test_torchs_learnable_quantizer_per_channel_has_the_same_values() -> None:
    x = torch.randn(6, 40, 3, 3, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(6, generator=torch.Generator().manual_seed(1)) * 0.2 + 0.05
    quantizer = LSQQuantizer(spec_of(-8, 7, channels=6))
    set_scale(quantizer, scale)
    theirs = torch._fake_quantize_learnable_per_channel_affine(x, scale, torch.zeros(6), 0, -8, 7, 1.0)
    # torch multiplies by the reciprocal: a value next to a tie may go to the other side.
    different = ((quantizer(x) - theirs).abs() > 1e-5).float().mean()
    assert float(different.detach()) < 1e-3


def torch_quantizer(qmin: int, qmax: int, zero_point: int = 0) -> tuple[Any, list[Tensor]]:
    scale = torch.tensor([0.05], requires_grad=True)
    zero = torch.tensor([float(zero_point)], requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, qmin, qmax, 1.0)

    return function, [scale, zero]


def brevitas_quantizer(qmin: int, qmax: int) -> tuple[Any, list[Tensor]]:
    require("brevitas")
    from brevitas.core.quant import IntQuant

    quant: Any = IntQuant(narrow_range=False, signed=qmin < 0, input_view_impl=torch.nn.Identity())
    bits = float((qmax - qmin + 1).bit_length() - 1)
    scale = torch.tensor([0.05], requires_grad=True)

    def function(x: Tensor) -> Tensor:
        out: Tensor = quant(scale, torch.tensor(0.0), torch.tensor(bits), x)
        return out

    return function, [scale]


@pytest.mark.parametrize(("qmin", "qmax"), CODES)
def test_brevitas_has_the_same_values(qmin: int, qmax: int) -> None:
    x = inputs(qmin, qmax, 0.05)
    out, _, _ = gradients(ours(qmin, qmax, 0.05), x, [])
    theirs, _, _ = gradients(brevitas_quantizer(qmin, qmax)[0], x, [])
    torch.testing.assert_close(out, theirs, rtol=1e-5, atol=1e-6)


def step_gradients(qmin: int, qmax: int, v: float) -> list[float]:
    """The gradient of the one value x = 0.05 v: here, of torch and of brevitas for the step, of NNCF for the range."""
    x = torch.tensor([0.05 * v])
    quantizer, peer = ours(qmin, qmax, 0.05), nncf_quantizer(qmin, qmax, 0.05)
    sides = [
        (quantizer, [quantizer.scale]),
        torch_quantizer(qmin, qmax),
        brevitas_quantizer(qmin, qmax),
        (peer, [peer.scale]),
    ]
    found = []
    for function, parameters in sides:
        parameters[0].grad = None
        function(x).sum().backward()
        assert parameters[0].grad is not None
        found.append(float(parameters[0].grad.sum()))
    return found


def test_gradients_differ_as_the_table_says() -> None:
    rows = re.findall(r"^\| (-?\d+) to (\d+) \| (-?[\d.]+) \|([^\n]*)\|$", PAGE.read_text(), flags=re.M)
    assert len(rows) == 10
    for qmin, qmax, v, cells in rows:
        expected = [float(cell) for cell in cells.split("|")]
        np.testing.assert_allclose(step_gradients(int(qmin), int(qmax), float(v)), expected, atol=1e-3)


@pytest.mark.parametrize(("qmin", "qmax"), CODES)
def test_nncfs_gradient_inside_is_ours_divided_by_the_number_of_steps(qmin: int, qmax: int) -> None:
    """The derivative of the same formula by the range would be ours divided by qmax: signed ones get about half."""
    for v in (0.3, 1.7, qmax - 0.8):
        here, *_, nncf = step_gradients(qmin, qmax, v)
        assert nncf == pytest.approx(here / (qmax - qmin), rel=2e-3)
