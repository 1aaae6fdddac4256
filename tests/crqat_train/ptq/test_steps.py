"""All steps together: closer to the float network than calibration, on the Grids that are stored, without labels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crqat.core.errors import UsageError
from crqat.train.config import PTQConfig, QuantizationConfig
from crqat.train.ptq import steps
from crqat.train.quantized_model import QuantizedModel, quantize, quantize_model
from crqat.train.quantizers.calibration import weight_of
from tests.crqat_train.ptq.conftest import network


def error(model: QuantizedModel, images: Tensor) -> float:
    """Mean squared difference of the logits from the float network's."""
    with torch.no_grad():
        return float((model(images) - network()(images)).square().mean())


def test_each_step_comes_closer(images: Tensor) -> None:
    """On images that none of them has seen."""
    seen, unseen = images[:32], images[32:]
    plain = error(quantize(network(), [seen], weights=3), unseen)
    corrected = error(quantize(network(), [seen], weights=3, bias_correction=True), unseen)
    rounded = error(quantize(network(), [seen], weights=3, adaround=True), unseen)
    both = error(quantize(network(), [seen], weights=3, adaround=True, bias_correction=True), unseen)
    assert corrected < 0.8 * plain
    assert rounded < 0.5 * plain
    assert both < 0.5 * plain


@pytest.mark.parametrize("activation_method", ["lsq", "lsq+"])
def test_weights_lie_on_their_grids(images: Tensor, activation_method: str) -> None:
    """So finalizing again, or rounding again, changes no code."""
    model = quantize(network(), [images], weights=4, activation_method=activation_method, adaround=True)
    model.finalize(trained=False)
    for spec in model.specs:
        if spec.kind == "weight":
            steps_ = weight_of(model, spec).detach() / model.quantizer(spec).scale.detach()
            assert float((steps_ - steps_.round()).abs().max()) < 1e-3


def test_each_step_is_said_with_what_it_did(images: Tensor) -> None:
    """How many layers, on how many images; and the progress counts layers."""
    told: list[tuple[str, int, int]] = []
    model = quantize_model(network(), images[:2], QuantizationConfig(weights=4), ("onnxruntime",))
    notes = steps.apply(
        model,
        ("onnxruntime",),
        torch.split(images, 16),
        "mse",
        PTQConfig(bias_correction=True, equalization=True, adaround=True),
        lambda *seen: told.append(seen),
    )
    assert notes == [
        "cross-layer equalization of 2 pairs of layers",
        "adaptive rounding of 5 of 5 layers on 48 images",
        "bias correction of 5 of 5 layers on 48 images",
    ]
    assert told[-1] == ("post-training quantization", 5, 5)


def test_large_images_are_limited(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their pixels, since all values of both networks are held."""
    monkeypatch.setattr(steps, "PIXELS", 10 * 16 * 16)
    model = quantize_model(network(), images[:2], QuantizationConfig(weights=4), ("onnxruntime",))
    notes = steps.apply(model, ("onnxruntime",), torch.split(images, 16), "mse", PTQConfig(bias_correction=True))
    assert notes == ["bias correction of 5 of 5 layers on 10 images"]


@pytest.mark.parametrize("count", [1, 8])
def test_images_that_are_all_alike_make_nothing_worse(images: Tensor, count: int) -> None:
    """They say nothing of how inputs vary, so weights are rounded to the nearest."""
    seen, unseen = images[:1].mean((2, 3), keepdim=True).expand(count, 3, 16, 16).contiguous(), images[32:]
    plain = error(quantize(network(), [seen], weights=4), unseen)
    assert error(quantize(network(), [seen], weights=4, adaround=True, bias_correction=True), unseen) < 2 * plain


def test_images_of_another_size_calibrate_alone(images: Tensor) -> None:
    """All values of both networks are of one batch."""
    larger = torch.nn.functional.interpolate(images[:4], size=24)
    assert quantize(network(), [images[:8], larger], weights=4, adaround=True).specs


def test_what_is_neither_true_nor_false_is_refused(images: Tensor) -> None:
    """A text that says no would count as yes."""
    with pytest.raises(UsageError, match=r"^equalization: should be True or False, not 'false'"):
        quantize(network(), [images], equalization="false")  # type: ignore[arg-type]
