"""Rounding is chosen by a layer's outputs: codes are a local optimum, and patches are what a convolution multiplies."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, fx, nn

from crqat.core.errors import UsageError
from crqat.train.ptq.adaround import _DAMPING, Moments, _patches, can_round, coordinate_descent, moments
from crqat.train.ptq.walk import Layer, walk
from crqat.train.quantized_model import quantize
from tests.crqat_train.ptq.conftest import network


def error(codes: Tensor, asked: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of one channel's outputs, and the damping of its weights."""
    damping = _DAMPING * (y.T @ y / len(y)).diagonal().mean()
    return ((y @ codes - x @ asked) ** 2).mean() + damping * ((codes - asked) ** 2).sum()


@pytest.mark.parametrize("seed", range(5))
def test_codes_are_as_good_as_the_best_of_all(seed: int) -> None:
    """Of all 7^4 codes of a channel; nearest rounding is worse in each of these draws."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(200, 1, generator=generator)
    x = shared + 0.3 * torch.randn(200, 4, generator=generator)
    y = x + 0.05 * torch.randn(200, 4, generator=generator)
    asked = 1.5 * torch.randn(4, generator=generator)
    found = Moments((y.T @ y / 200)[None], (x.T @ y / 200)[None], _DAMPING * (y.T @ y / 200).diagonal().mean()[None])
    codes = coordinate_descent(asked[None, None], found, -3, 3)[0, 0]
    grid = [torch.tensor(choice, dtype=torch.float32) for choice in itertools.product(range(-3, 4), repeat=4)]
    best = min(float(error(choice, asked, x, y)) for choice in grid)
    nearest = float(error(asked.round().clamp(-3, 3), asked, x, y))
    # Coordinate descent ends where no single code improves, which need not be the best of all.
    assert best <= float(error(codes, asked, x, y)) <= best + 0.25 * (nearest - best) + 1e-6
    assert set(codes.tolist()) <= set(range(-3, 4))


def test_patches_times_weights_are_the_layer(images: Tensor) -> None:
    """Strides, padding, dilation and groups are the operation's own."""
    model = quantize(network(), [images], weights=4)
    seen = 0
    for event in walk(model, images[:3]):
        if not isinstance(event, Layer):
            layer, (outputs, _) = event.layer, event.outputs
            groups = {"1": 1, "3": 8, "5": 4}.get(layer.spec.operation, 1) if layer.weight.ndim == 4 else 1
            groups = 1 if groups == 1 else layer.weight.shape[0] // (layer.weight.shape[0] // groups)
            patches = _patches(layer, layer.inputs[0], groups, None)
            weight = layer.weight.reshape(groups, layer.weight.shape[0] // groups, -1)
            made = patches @ weight.transpose(1, 2)  # [groups, images * positions, channels of a group]
            made = made.permute(1, 0, 2).reshape(len(patches[0]), -1)
            if outputs.ndim == 4:
                outputs = outputs.permute(0, 2, 3, 1)
            bias = layer.node.args[2]
            if isinstance(bias, fx.Node):
                made = made + model.get_parameter(str(bias.target))
            torch.testing.assert_close(made, outputs.reshape(made.shape), rtol=1e-4, atol=1e-5)
            seen += 1
    assert seen == 5


def test_centered_moments_are_covariances(images: Tensor) -> None:
    """Without the means, which a bias takes back."""
    model = quantize(network(), [images], weights=4)
    first = next(iter(walk(model, images)))
    assert isinstance(first, Layer)
    assert can_round(first)
    found = moments(first, 1, centered=True)
    y = _patches(first, first.inputs[1], 1, None)[0].double()
    torch.testing.assert_close(found.quantized[0].double(), y.T.cov(correction=0), rtol=1e-3, atol=1e-4)


def test_a_method_that_changes_weights_is_refused(images: Tensor) -> None:
    """Its codes are not those of the weight that would be moved."""
    with pytest.raises(UsageError, match=r"^adaround: 0: DoReFa.* use weight_method lsq"):
        quantize(network(), [images], weights=4, weight_method="dorefa", adaround=True)


def test_padding_by_name_keeps_nearest_rounding(images: Tensor) -> None:
    """It is none of the paddings that patches are taken with."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.Flatten(), nn.Linear(4 * 256, 3)).eval()
    kinds = [can_round(event) for event in walk(quantize(net, [images]), images) if isinstance(event, Layer)]
    assert kinds == [False, True]
