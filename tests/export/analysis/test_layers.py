"""What became of each layer: counts by hand, bit widths as asked for, and the reason where one stays in float."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crqat.export.analysis.layers import layer_summaries
from crqat.export.analysis.sqnr import quantizer_noise
from crqat.train.config import Override, QuantizationConfig
from tests.export.conftest import quantize, random_images


class Small(nn.Module):
    """A convolution, a depthwise one, and a linear layer behind a Flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8)
        self.fc = nn.Linear(8 * 6 * 6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.stem(x))))
        return self.fc(torch.flatten(x, 1))  # type: ignore[no-any-return]


def test_every_layer_has_a_row() -> None:
    images = random_images(4, 3, 8, 8)
    config = QuantizationConfig(overrides={"depthwise": Override(4, 8)}, float_layers={"all": ("stem",)})
    made = quantize(Small(), images, config=config)
    noise = quantizer_noise(made.model, images.numpy())
    stem, depthwise, fc = layer_summaries(made.graph, made.specs, noise)
    assert (stem.layer, stem.operation, stem.macs, stem.products) == ("stem", "Conv", 64 * 8 * 27, 27)
    assert (stem.weight_bits, stem.input_bits, stem.weight_snr) == (None, None, None)
    assert stem.reason == "kept in float by quantization.float_layers"
    assert (depthwise.macs, depthwise.products, depthwise.weight_bits) == (36 * 8 * 9, 9, 4)
    assert (fc.operation, fc.macs, fc.products, fc.weight_bits, fc.input_bits) == ("Gemm", 288 * 5, 288, 8, 8)
    weight = next(spec.edge for spec in made.specs if spec.kind == "weight" and spec.operation == "fc")
    assert fc.weight_snr == noise[weight]
    assert depthwise.reason == fc.reason == ""
