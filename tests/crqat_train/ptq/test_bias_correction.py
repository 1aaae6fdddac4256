"""A layer's mean outputs are the float network's afterwards, by its bias or the BatchNorm behind it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crqat.train.ptq import bias_correction
from crqat.train.ptq.walk import Output, walk
from crqat.train.quantized_model import QuantizedModel, quantize
from tests.crqat_train.ptq.conftest import network


def shifts(model: QuantizedModel, images: Tensor, correct: bool) -> list[float]:
    """Largest difference of the means of an output channel, in the units of what reads it, for each layer."""
    found = []
    for event in walk(model, images):
        if isinstance(event, Output):
            own, quantized = event.outputs
            axes = [axis for axis in range(own.ndim) if axis != 1]
            shift = quantized.mean(axes) - own.mean(axes)
            if correct:
                assert bias_correction.correct(model, event)
            found.append(float(shift.abs().max()))
    return found


def test_means_are_the_float_networks(images: Tensor) -> None:
    """One layer after the other, each with what those before it make of their correction."""
    model = quantize(network(), [images], weights=3)
    before = model.state_dict()["1.running_mean"].clone()
    with torch.no_grad():
        own = network()(images)
        apart = (model(images) - own).mean(0).abs().max()
        assert max(shifts(model, images, correct=True)) > 0.01
        assert not torch.equal(before, model.state_dict()["1.running_mean"])
        corrected = (model(images) - own).mean(0).abs().max()
    assert corrected < 1e-5 < 0.01 < apart


def test_nothing_to_correct_with(images: Tensor) -> None:
    """A layer without bias and without BatchNorm behind it stays as it is."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(4 * 196, 3)).eval()
    model = quantize(net, [images], weights=3)
    done = [bias_correction.correct(model, event) for event in walk(model, images) if isinstance(event, Output)]
    assert done == [False, True]


def test_what_several_layers_share_is_not_corrected(images: Tensor) -> None:
    """Each would take the shifts of all."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2))
            self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.norm(self.first(x)))
            x = torch.relu(self.norm(self.second(x)))
            return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]

    model = quantize(Shared().eval(), [images], weights=3)
    done = [bias_correction.correct(model, event) for event in walk(model, images) if isinstance(event, Output)]
    assert done == [False, False, True]
