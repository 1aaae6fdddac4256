from __future__ import annotations

from typing import get_args, get_type_hints

import pytest
import torch

from crqat.train.config import QuantizationConfig
from crqat.train.quantizers import (
    ACTIVATION_METHODS,
    METHODS,
    WEIGHT_METHODS,
    ActivationObserver,
    LSQQuantizer,
    MinMaxQuantizer,
    PACTQuantizer,
    Quantizer,
    calibrate_weight,
    quantizer_maker,
)
from tests.crqat_train.quantizers.reference import RANGES, spec_of


def test_the_recipe_says_which_method_a_spec_gets() -> None:
    make = quantizer_maker(QuantizationConfig(weight_method="minmax", activation_method="pact"))
    assert type(make(spec_of(-8, 7, channels=3))) is MinMaxQuantizer
    assert type(make(spec_of(0, 127))) is PACTQuantizer
    assert type(quantizer_maker(QuantizationConfig())(spec_of(0, 127))) is LSQQuantizer


def test_the_registries_are_the_recipes_choices() -> None:
    hints = get_type_hints(QuantizationConfig)
    assert get_args(hints["weight_method"]) == tuple(WEIGHT_METHODS)
    assert set(get_args(hints["activation_method"])) == set(ACTIVATION_METHODS)
    assert set(METHODS) == {*WEIGHT_METHODS, *ACTIVATION_METHODS}


@pytest.mark.parametrize(("qmin", "qmax"), RANGES)
@pytest.mark.parametrize("method", METHODS)
def test_the_grid_is_what_forward_computes(method: str, qmin: int, qmax: int) -> None:
    """Of every method, bit for bit; zero is a code, and its own."""
    generator = torch.Generator().manual_seed(0)
    if method in WEIGHT_METHODS and qmin < 0:
        quantizer = METHODS[method](spec_of(qmin, qmax, 6))
        sizes = torch.tensor([1e-4, 0.1, 1, 3, 0, 9]).reshape(6, 1, 1, 1)
        weight = torch.randn(6, 5, 3, 3, generator=generator) * sizes
        calibrate_weight(quantizer, weight)
        compare(quantizer, weight)
        assert quantizer.grid().zero_point == 0
        assert not quantizer(weight)[4].any()
    quantizer, observer = ACTIVATION_METHODS[method](spec_of(qmin, qmax)), ActivationObserver()
    values = torch.randn(8, 3, 9, 9, generator=generator) + 0.4
    values = values if qmin < 0 else values.relu()
    observer.update(values)
    observer.calibrate(quantizer)
    compare(quantizer, values)
    assert quantizer(torch.zeros(1, 1, 1, 1)).item() == 0.0


def compare(quantizer: Quantizer, x: torch.Tensor) -> None:
    out, grid = quantizer(x).detach(), quantizer.grid()
    assert len(out.unique()) > (grid.qmax - grid.qmin) // 3
    values = quantizer.values(x).detach().numpy()
    assert (grid.dequantize(grid.quantize(values)) == out.numpy()).all()
