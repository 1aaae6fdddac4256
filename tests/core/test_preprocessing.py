"""The one place that normalizes: numpy and torch must agree to the bit."""

from __future__ import annotations

import numpy as np
import torch

from crqat.core.preprocessing import Preprocessing, normalize

IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def every_value() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """uint8 [1, 3, 16, 16] with every possible value in every channel."""
    return np.tile(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16), (1, 3, 1, 1))


def test_values_are_those_of_the_formula() -> None:
    images = every_value()
    normalized = IMAGENET(images)
    assert normalized.dtype == np.float32
    assert normalized.shape == images.shape
    for channel in range(3):
        expected = (np.arange(256) / 255 - IMAGENET.mean[channel]) / IMAGENET.std[channel]
        np.testing.assert_allclose(normalized[0, channel].ravel(), expected, rtol=1e-5, atol=1e-6)


def test_torch_gives_the_same_bits() -> None:
    images = every_value()
    constants = [torch.from_numpy(constant) for constant in IMAGENET.constants()]
    by_torch = normalize(torch.from_numpy(images).float(), constants).numpy()
    np.testing.assert_array_equal(by_torch.view(np.uint32), IMAGENET(images).view(np.uint32))


def test_one_channel() -> None:
    grey = Preprocessing(mean=(0.5,), std=(0.25,))
    assert grey(np.array([[[[0, 255]]]], dtype=np.uint8)).tolist() == [[[[-2.0, 2.0]]]]
