from __future__ import annotations

import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

from crqat.core.errors import UsageError
from crqat.train.config import QuantizationConfig
from crqat.train.quantized_model import load, quantize, save
from crqat.train.quantizers import (
    METHODS,
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


def test_the_registry_is_the_recipes_choices() -> None:
    hints = get_type_hints(QuantizationConfig, include_extras=True)
    for key, fits in (("weight_method", "for_weights"), ("activation_method", "for_activations")):
        (choice,) = hints[key].__metadata__
        assert set(choice.names) == {name for name, method in METHODS.items() if getattr(method, fits)}


OWN = """
from crqat.train.quantizers import MinMaxQuantizer, PACTQuantizer, Quantizer

class Softer(MinMaxQuantizer):
    pass

class Levels(PACTQuantizer):
    pass

class Nothing(Quantizer):
    pass

class NoScale(Quantizer):
    def forward(self, x):
        return x

class Raises(MinMaxQuantizer):
    def __init__(self, spec):
        raise KeyError("missing")

class NotOne:
    pass
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_methods.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_methods", raising=False)


@pytest.mark.usefixtures("own_module")
def test_a_users_own_method_is_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    images = torch.randn(8, 1, 2, 2)
    model = quantize(network, [images], weight_method="own_methods:Softer")
    kinds = {spec.kind: type(model.quantizer(spec)).__name__ for spec in model.specs}
    assert kinds == {"activation": "LSQQuantizer", "weight": "Softer"}
    save(model, tmp_path / "saved.safetensors")
    loaded = load(tmp_path / "saved.safetensors", torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)))
    assert {spec.kind: type(loaded.quantizer(spec)).__name__ for spec in loaded.specs} == kinds
    assert torch.equal(loaded(images), model(images))


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("own_methods:Levels", "is not for weights"),
        ("own_methods:Nothing", "has no forward"),
        ("own_methods:NoScale", "needs a Parameter or buffer `scale`"),
        ("own_methods:Raises", "raised KeyError: 'missing'.*own_methods.py:"),
        ("own_methods:NotOne", "does not derive from"),
        ("own_methods:Absent", "has no function or class 'Absent'"),
        ("no_such_module:X", "cannot import 'no_such_module'"),
    ],
)
def test_a_method_that_does_not_fit_is_one_line(name: str, problem: str) -> None:
    with pytest.raises(UsageError, match=rf"^quantization\.weight_method: .*{problem}") as caught:
        quantizer_maker(QuantizationConfig(weight_method=name))(spec_of(-8, 7, channels=3))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("qmin", "qmax"), RANGES)
@pytest.mark.parametrize("method", METHODS)
def test_the_grid_is_what_forward_computes(method: str, qmin: int, qmax: int) -> None:
    """Of every method, bit for bit; zero is a code, and its own."""
    generator = torch.Generator().manual_seed(0)
    if METHODS[method].for_weights and qmin < 0:
        quantizer = METHODS[method](spec_of(qmin, qmax, 6))
        sizes = torch.tensor([1e-4, 0.1, 1, 3, 0, 9]).reshape(6, 1, 1, 1)
        weight = torch.randn(6, 5, 3, 3, generator=generator) * sizes
        calibrate_weight(quantizer, weight)
        compare(quantizer, weight)
        assert quantizer.grid().zero_point == 0
        assert not quantizer(weight)[4].any()
    quantizer, observer = METHODS[method](spec_of(qmin, qmax)), ActivationObserver()
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
