"""Hooks on quantizers, and what is observed by them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from crqat.train.config import QuantizationConfig
from crqat.train.quantized_model import QuantizedModel, quantize_model
from crqat.train.quantizers import METHODS, quantizer_of
from crqat.train.quantizers.calibration import calibrate, hooked, observe, only


@pytest.fixture
def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


@pytest.fixture
def quantized(network: nn.Sequential) -> QuantizedModel:
    x = torch.randn(100, 4)
    model = quantize_model(network, x, QuantizationConfig(), ("onnxruntime",), METHODS["lsq"])
    calibrate(model, [x])
    return model


def test_a_hook_replaces_the_output_within_its_context_alone(quantized: QuantizedModel) -> None:
    model, specs = quantized, quantized.specs
    x = torch.randn(6, 4)

    def zeros(_: nn.Module, __: tuple[Tensor], output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    before, elsewhere = model(x), model(torch.zeros(6, 4))
    assert not torch.equal(before, elsewhere)
    (of_input,) = (spec for spec in specs if "input" in spec.edge)
    with pytest.raises(ZeroDivisionError), hooked(model, [(of_input, zeros)]):
        assert torch.equal(model(x), elsewhere)
        raise ZeroDivisionError
    assert torch.equal(model(x), before)


def test_only_the_active_quantizers_round(quantized: QuantizedModel) -> None:
    model, specs = quantized, quantized.specs
    x = torch.randn(6, 4)
    activations = [spec for spec in specs if spec.kind == "activation"]
    with only(model, activations[:1]):
        for spec in activations:
            assert torch.equal(quantizer_of(model, spec)(x), x) is (spec is not activations[0]), spec.edge
    assert not any(torch.equal(quantizer_of(model, spec)(x), x) for spec in activations)


def test_what_is_observed_is_the_float_network(quantized: QuantizedModel, network: nn.Sequential) -> None:
    model, specs = quantized, quantized.specs
    batches = [torch.randn(6, 4), 3 * torch.randn(6, 4)]
    observers = observe(model, batches)
    assert observers.keys() == {spec.edge for spec in specs if spec.kind == "activation"}
    hidden = network[1](network[0](torch.cat(batches)))
    ends = {(float(values.min().clamp(max=0)), float(values.max())) for values in (torch.cat(batches), hidden)}
    assert {(observer.lowest, observer.highest) for observer in observers.values()} == ends
