"""Strong views: each operation against torchvision's on the same image, and what a whole batch keeps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode  # type: ignore[import-untyped]
from torchvision.transforms.v2 import functional as F

from crqat.train.data import sources
from crqat.train.data.augment import GREY, OPERATIONS, apply_operation, cutout, strong_view


@pytest.fixture(scope="module")
def images(cifar10_root: Path) -> Tensor:
    """16 real images, uint8 [16, 3, 32, 32]."""
    return sources.load("cifar10", str(cifar10_root), False).test_images[:16]


def applied(name: str, images: Tensor, magnitude: float) -> Tensor:
    n = len(images)
    chosen = torch.full((n,), OPERATIONS.index(name))
    return apply_operation(images.float(), chosen, torch.full((n,), magnitude))


def expected(name: str, image: Tensor, m: float) -> Tensor:
    """What torchvision makes of one uint8 image."""
    if name in ("brightness", "color", "contrast", "sharpness"):
        kernel = {"color": F.adjust_saturation, "sharpness": F.adjust_sharpness}
        function = kernel.get(name) or getattr(F, f"adjust_{name}")
        return function(image, 1 + 0.95 * m)  # type: ignore[no-any-return]
    if name == "posterize":
        return F.posterize(image, 8 - math.floor(4 * abs(m)))  # type: ignore[no-any-return]
    if name == "solarize":
        return F.solarize(image, 255 * (1 - abs(m)))  # type: ignore[no-any-return]
    return {"autocontrast": F.autocontrast, "identity": lambda x: x}[name](image)  # type: ignore[no-any-return]


@pytest.mark.parametrize("magnitude", [-0.9, -0.3, 0.0, 0.4, 0.99])
@pytest.mark.parametrize("name", OPERATIONS[:8])
def test_colour_operations_are_torchvisions(images: Tensor, name: str, magnitude: float) -> None:
    own = applied(name, images, magnitude)
    for index, image in enumerate(images):
        # torchvision rounds to whole values, some of its kernels downwards.
        assert (own[index] - expected(name, image, magnitude)).abs().max() <= 2
    if name not in ("identity", "autocontrast") and abs(magnitude) > 0.5:
        assert not torch.equal(own, images.float())


@pytest.mark.parametrize("magnitude", [-0.9, -0.3, 0.4, 0.99])
@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
def test_geometric_operations_are_torchvisions(images: Tensor, name: str, magnitude: float) -> None:
    own = applied(name, images, magnitude)
    shear = math.degrees(math.atan(0.3 * magnitude))
    pixels = 0.3 * magnitude * 32
    candidates = []
    for sign in (1, -1):  # the direction is drawn too, so either will do
        settings: dict[str, Any] = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
        if name == "rotate":
            settings["angle"] = sign * 30 * magnitude
        else:
            key, value = ("shear", shear) if name.startswith("shear") else ("translate", pixels)
            settings[key] = [sign * value, 0.0] if name.endswith("x") else [0.0, sign * value]
        candidates.append(F.affine(images.float(), interpolation=InterpolationMode.NEAREST, fill=0.0, **settings))
    # Nearest neighbours may part at an exact half.
    same = max(float((own == candidate).float().mean()) for candidate in candidates)
    assert same > 0.97
    assert not torch.equal(own, images.float())


def test_each_image_gets_its_own_operation(images: Tensor) -> None:
    chosen = torch.arange(16) % len(OPERATIONS)
    magnitude = torch.linspace(-1, 1, 16)
    together = apply_operation(images.float(), chosen, magnitude)
    for index in range(16):
        alone = apply_operation(images[index : index + 1].float(), chosen[index : index + 1], magnitude[index, None])
        torch.testing.assert_close(together[index : index + 1], alone)


def test_cutout_greys_one_square_of_each_image(images: Tensor) -> None:
    big = images.float().repeat(20, 1, 1, 1)
    cut = cutout(big, 16, torch.Generator().manual_seed(0))
    changed = (cut != big).any(dim=1)
    assert bool((cut[changed[:, None].expand_as(cut)] == GREY).all())
    sizes = set()
    for hole in (cut == GREY).all(dim=1):
        rows, columns = hole.any(dim=1).sum(), hole.any(dim=0).sum()
        sizes.add((int(rows), int(columns)))
        assert 8 <= rows <= 17 and 8 <= columns <= 17
    assert len(sizes) > 5  # some hang over the border


@pytest.mark.parametrize("channels", [1, 3])
def test_a_strong_view_is_an_image_and_the_generators(images: Tensor, channels: int) -> None:
    pixels = images[:, :channels].float()
    views = [strong_view(pixels, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert views[0].shape == pixels.shape and views[0].dtype == torch.float32
    assert float(views[0].min()) >= 0 and float(views[0].max()) <= 255
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])
    assert bool(((views[0] != pixels).flatten(1).float().mean(dim=1) > 0.1).all())


def test_no_value_is_read_back_from_the_device() -> None:
    meta = torch.device("meta")
    made = strong_view(torch.empty(4, 3, 8, 8, device=meta), torch.Generator())  # a value would have to exist
    assert made.shape == (4, 3, 8, 8)
