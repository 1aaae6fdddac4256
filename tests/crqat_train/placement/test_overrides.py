"""Which layer gets which width by name."""

from __future__ import annotations

import re

import pytest

from crqat.core.errors import UsageError
from crqat.train.config import Override
from crqat.train.placement.overrides import Layer, widths

# Two convolutions read one tensor; `add` is read by no layer, `pixels` is the input of the first.
LAYERS = [
    Layer("w1", "layer1.0.conv1", "pixels"),
    Layer("w2", "layer1.0.conv2", "relu"),
    Layer("w3", "layer1.0.downsample", "relu"),
    Layer("w4", "layer2.fc", None),
]
ACTIVATIONS = {"pixels": "x", "relu": "layer1.0.relu", "add": "layer1.0.bn2"}


def of(**overrides: Override) -> dict[str, int]:
    return widths(overrides, LAYERS, ACTIVATIONS)


def test_a_pattern_gives_weights_and_what_the_layer_reads() -> None:
    assert widths({}, LAYERS, ACTIVATIONS) == {}
    assert of(**{"layer1.0.conv1": Override(3, 5)}) == {"w1": 3, "pixels": 5}
    assert of(**{"layer1.?.conv*": Override(weights=3)}) == {"w1": 3, "w2": 3}
    assert of(**{"*.fc": Override(2)}) == {"w4": 2}


def test_what_no_layer_reads_goes_by_its_own_name() -> None:
    assert of(**{"layer1.0.bn2": Override(activations=6)}) == {"add": 6}
    assert of(**{"layer1.*": Override(activations=6)}) == {"pixels": 6, "relu": 6, "add": 6}


def test_the_largest_of_the_readers_counts_and_silence_asks_for_nothing() -> None:
    both = {"layer1.0.conv2": Override(activations=3), "layer1.0.downsample": Override(activations=5)}
    assert of(**both) == of(**dict(reversed(both.items()))) == {"relu": 5}
    assert of(**{"layer1.0.conv2": Override(activations=3)}) == {"relu": 3}


def test_the_most_specific_pattern_counts_whatever_the_order() -> None:
    overrides = {
        "layer1.0.conv1": Override(weights=8),
        "layer1.*": Override(weights=4, activations=4),
        "layer1.[0123].conv*": Override(weights=6),
        "*": Override(weights=2),
    }
    expected = {"w1": 8, "w2": 6, "w3": 4, "w4": 2, "pixels": 4, "relu": 4, "add": 4}
    assert of(**overrides) == of(**dict(reversed(overrides.items()))) == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"layer1.0.cnv1": Override(4)},
            r"layer1.0.cnv1: matches no layer that has weights; .* layer1.0.conv1",
        ),
        ({"layer3.*": Override(4), "*": Override(4)}, r"overrides.layer3.\*: matches no layer that has weights"),
        ({"layer1.0.bn2": Override(weights=4)}, r"layer1.0.bn2: matches no layer that has weights"),
        (
            {"layer1.0.relu": Override(activations=4)},
            r"no layer that has activations; the nearest are layer1.0",
        ),
        ({"*.fc": Override(4, 4)}, r"overrides.\*.fc: matches no layer that has activations"),
        ({"Layer1.*": Override(4)}, "matches no layer"),
        ({"layer1.*.conv1": Override(4), "layer1.0.conv*": Override(6)}, "give layer1.0.conv1 different weights"),
    ],
)
def test_refusals(overrides: dict[str, Override], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        of(**overrides)
    assert str(caught.value).startswith("quantization.overrides")
    assert re.search(message, str(caught.value)), caught.value


def test_equal_widths_are_no_contradiction() -> None:
    assert of(**{"layer1.*.conv1": Override(4), "layer1.0.conv*": Override(4)}) == {"w1": 4, "w2": 4}
