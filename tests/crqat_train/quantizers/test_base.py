from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from crqat.train.quantizers import METHODS, calibrate_weight, quantizer_of
from tests.crqat_train.quantizers.reference import quantizer, spec_of


def test_quantizer_of_names_what_is_no_quantizer() -> None:
    lsq = quantizer(0, 127)
    model = torch.nn.Module()
    model.add_module("quantizers", torch.nn.ModuleDict({lsq.spec.module_name: lsq}))
    assert quantizer_of(model, lsq.spec) is lsq
    model.get_submodule("quantizers").add_module(lsq.spec.module_name, torch.nn.Identity())
    with pytest.raises(TypeError, match=r"post_hooks\.x__0\.0: the module there is not a quantizer"):
        quantizer_of(model, lsq.spec)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.for_weights])
def test_channels_on_axis_1_are_those_of_the_turned_weight_on_axis_0(method: str) -> None:
    """As of a transposed convolution, whose weight has its output channels there."""
    torch.manual_seed(0)
    weight = torch.randn(5, 3, 2, 2) * torch.tensor([0.1, 1.0, 10.0])[:, None, None]
    turned = METHODS[method](replace(spec_of(-127, 127, channels=3), axis=1))
    usual = METHODS[method](spec_of(-127, 127, channels=3))
    calibrate_weight(turned, weight)
    calibrate_weight(usual, weight.transpose(0, 1))
    assert turned.scale.shape == (1, 3, 1, 1)
    assert torch.equal(turned.scale.flatten(), usual.scale.flatten())
    assert torch.equal(turned(weight), usual(weight.transpose(0, 1)).transpose(0, 1))
    assert turned.grid().axis == 1
    rounded = turned.grid().quantize(turned.values(weight).detach().numpy())
    assert torch.equal(turned(weight).detach(), torch.from_numpy(turned.grid().dequantize(rounded)))
