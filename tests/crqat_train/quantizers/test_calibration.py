"""Hooks on quantizers, and what is observed by them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from crqat.train.config import QuantizationConfig
from crqat.train.placement.quantizer_spec import QuantizerSpec
from crqat.train.quantized_model import QuantizedModel, quantize_model
from crqat.train.quantizers import METHODS, Quantizer, quantizer_of
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


def test_inactive_quantizers_compute_nothing_and_are_themselves_again(
    quantized: QuantizedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, specs = quantized, quantized.specs
    x, forward = torch.randn(6, 4), METHODS["lsq"].forward
    runs: list[QuantizerSpec] = []

    def noted(self: Quantizer, x: Tensor) -> Tensor:
        runs.append(self.spec)
        return forward(self, x)

    monkeypatch.setattr(METHODS["lsq"], "forward", noted)
    before = model(x)
    assert sorted(spec.edge for spec in runs) == sorted(spec.edge for spec in specs)
    runs.clear()
    with pytest.raises(ZeroDivisionError), only(model, specs[:1]):
        with only(model, []):
            model(x)
        assert runs == []
        model(x)
        assert runs == specs[:1]
        raise ZeroDivisionError
    assert torch.equal(model(x), before)


def test_calibration_runs_the_network_once_for_each_batch(quantized: QuantizedModel) -> None:
    runs = []
    quantized.get_submodule("1").register_forward_pre_hook(lambda *_: runs.append(1))
    calibrate(quantized, [torch.randn(6, 4)] * 3)
    assert len(runs) == 3


@pytest.mark.parametrize("views", [False, True])
def test_images_are_observed_with_channels_last_unless_the_network_takes_views(views: bool) -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).relu()
            result: Tensor = self.fc(x.view(-1, 4 * 36) if views else x.flatten(1))
            return result

    torch.manual_seed(0)
    network, batches = Viewing().eval(), [torch.randn(5, 3, 8, 8) for _ in range(2)]
    model = quantize_model(network, batches[0], QuantizationConfig(), ("onnxruntime",))
    layouts = []
    (of_input,) = (spec for spec in model.specs if "post_hooks.x" in spec.edge)
    model.quantizer(of_input).register_forward_pre_hook(lambda _, x: layouts.append(x[0].stride()[1]))
    observers = observe(model, batches)
    assert layouts[-2:] == [64 if views else 1] * 2
    hidden = network.conv(torch.cat(batches)).relu().detach()
    (observer,) = (observer for edge, observer in observers.items() if "relu" in edge)
    assert observer.lowest == 0.0
    assert observer.highest == pytest.approx(float(hidden.max()), rel=1e-6)
    assert int(observer.counts.sum()) == pytest.approx(int((hidden > 0).sum()), abs=2)
    assert int(observers[of_input.edge].counts.sum()) == 2 * 5 * 3 * 64


def test_what_is_observed_is_the_float_network(quantized: QuantizedModel, network: nn.Sequential) -> None:
    model, specs = quantized, quantized.specs
    batches = [torch.randn(6, 4), 3 * torch.randn(6, 4)]
    observers = observe(model, batches)
    assert observers.keys() == {spec.edge for spec in specs if spec.kind == "activation"}
    hidden = network[1](network[0](torch.cat(batches)))
    ends = {(float(values.min().clamp(max=0)), float(values.max())) for values in (torch.cat(batches), hidden)}
    assert {(observer.lowest, observer.highest) for observer in observers.values()} == ends
