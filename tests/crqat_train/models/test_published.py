"""What is published with pretrained weights, and what the recipe says instead."""

from __future__ import annotations

from typing import Any

import pytest

from crqat.core.errors import UsageError
from crqat.train.config import DataConfig, FloatConfig, ModelConfig, QATConfig, QuantizationConfig, TrainConfig
from crqat.train.models import published
from tests.needs import require


def config(name: str, source: str = "imagefolder", weights: str | None = "pretrained", **data: Any) -> TrainConfig:
    return TrainConfig(
        0,
        ("onnxruntime",),
        DataConfig(source, root="x", **data),
        ModelConfig(name, weights),
        FloatConfig(epochs=0),
        QuantizationConfig(),
        QATConfig(),
    )


def prepared(*arguments: Any, **data: Any) -> tuple[Any, ...]:
    section = published.data_section(config(*arguments, **data))
    return section.size, section.crop, section.interpolation, section.mean, section.std


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_each_set_of_weights_has_its_own() -> None:
    assert prepared("torchvision/resnet50") == (232, 224, "bilinear", *IMAGENET)
    assert prepared("torchvision/efficientnet_b3") == (320, 300, "bicubic", *IMAGENET)
    require("timm")
    half = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert prepared("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k") == (248, 224, "bicubic", *half)
    assert prepared("timm/vit_tiny_patch16_224") == (248, 224, "bicubic", *half)
    assert prepared("timm/none_such") == (None, None, None, None, None)


def test_what_the_recipe_says_stays() -> None:
    own = (256, 224, "lanczos", (0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    said = dict(zip(("size", "crop", "interpolation", "mean", "std"), own, strict=True))
    assert prepared("torchvision/efficientnet_b3", **said) == own
    assert prepared("torchvision/efficientnet_b3", mean=(0.1, 0.2, 0.3))[:4] == (320, 300, "bicubic", (0.1, 0.2, 0.3))
    assert prepared("torchvision/efficientnet_b3", "imagefolder", "w.pth") == (None,) * 5
    assert prepared("torchvision/efficientnet_b3", "own:data") == (None,) * 5
    assert prepared("torchvision/efficientnet_b3", "cifar10") == (None, None, None, *IMAGENET)
    assert prepared("cifar/resnet20") == (None,) * 5
    with pytest.raises(UsageError, match=r"data.crop: 300 is larger than data.size 256.*size 320 and crop 300"):
        prepared("torchvision/efficientnet_b3", size=256)


def test_what_was_taken_is_said() -> None:
    (note,) = published.notes(config("torchvision/efficientnet_b3", size=330))
    assert note == (
        "as published with the weights of torchvision/efficientnet_b3: mean 0.485/0.456/0.406, std 0.229/0.224/0.225, "
        "crop 300, interpolation bicubic"
    )
    assert published.notes(config("torchvision/efficientnet_b3", "own:data")) == ()


def test_the_accuracy_is_that_of_these_weights_fed_as_they_were() -> None:
    assert published.published_accuracy(config("torchvision/resnet18"), 1000) == pytest.approx(0.69758)
    assert published.published_accuracy(config("torchvision/resnet18"), 10) is None
    assert published.published_accuracy(config("torchvision/resnet18", size=300), 1000) is None
    assert published.published_accuracy(config("torchvision/resnet18", weights=None), 1000) is None
