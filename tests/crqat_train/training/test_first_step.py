"""What a network's first forward and its first step tell: cause, module and line, before anything is trained."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from crqat.core.errors import UsageError
from crqat.train.config import OptimizerConfig
from crqat.train.training.first_step import check_forward, check_statistics, check_step

IMAGES, LABELS = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16), torch.tensor([0, 1])
SECTION = OptimizerConfig(epochs=1, batch_size=2)


class Net(nn.Module):
    def __init__(self, mode: str = "", classes: int = 10, channels: int = 3, size: int = 16) -> None:
        super().__init__()
        self.mode = mode
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.fc = nn.Linear(4 * (size // 8) ** 2, 16)
        self.bn = nn.BatchNorm1d(16)
        self.last = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> object:
        x = functional.avg_pool2d(torch.relu(self.conv(x)), 8).flatten(1)
        logits = self.last(self.bn(self.fc(x)))
        if self.mode == "raise":
            msg = "trouble\nof my own"
            raise RuntimeError(msg)
        if self.mode == "auxiliary" and self.training:
            return logits, x
        results = {"dict": {"out": logits}, "map": logits[:, :, None, None], "int": logits.argmax(1)}
        return results.get(self.mode, torch.log(logits - logits) if self.mode == "log" else logits)


def refusal(network: nn.Module, classes: int = 10) -> str:
    with pytest.raises(UsageError) as caught:
        check_forward(network, IMAGES, classes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("outputs", [9, 13])
def test_another_number_of_classes(outputs: int) -> None:
    assert f"the network gives {outputs} logits, the data has 10 classes" in refusal(Net(classes=outputs))


def test_other_channels_and_sizes_are_found_by_trying() -> None:
    assert "fails in conv (Conv2d)" in refusal(Net(channels=1))
    assert "it takes images of 1 channel and the data has 3" in refusal(Net(channels=1))
    assert "fails in fc (Linear)" in refusal(Net(size=32))
    assert "it takes images of 32 x 32 pixels and the data has 16 x 16" in refusal(Net(size=32))


def test_a_forward_that_raises_is_told_with_its_line() -> None:
    lines, start = inspect.getsourcelines(Net.forward)
    line = start + next(index for index, text in enumerate(lines) if "raise RuntimeError" in text)
    assert f"{__file__}:{line} on images" in refusal(Net("raise"))
    assert "RuntimeError: trouble of my own" in refusal(Net("raise"))


@pytest.mark.parametrize(
    ("mode", "told"), [("dict", "returns a dict of 1"), ("map", r"gives [2, 10, 1, 1]"), ("int", "returns torch.int64")]
)
def test_something_else_than_logits(mode: str, told: str) -> None:
    assert told in refusal(Net(mode))
    assert __file__ in refusal(Net(mode))


def test_a_second_output_of_training_alone() -> None:
    check_forward(Net("auxiliary"), IMAGES, 10)
    with pytest.raises(UsageError, match="returns a tuple of 2 in training instead of the logits"):
        check_step(Net("auxiliary"), IMAGES, LABELS, SECTION, "float")


def test_a_loss_that_is_no_number() -> None:
    with pytest.raises(UsageError, match=r"the loss of Net at .* is nan in the first step"):
        check_step(Net("log"), IMAGES, LABELS, SECTION, "float")


def test_one_image_is_too_few_for_some_statistics() -> None:
    with pytest.raises(UsageError, match=r"^qat.batch_size: bn \(BatchNorm1d\) .* take at least 4"):
        check_step(Net(), IMAGES[:1], LABELS[:1], SECTION, "qat", processes=2)
    with pytest.raises(UsageError, match=r"^qat.bn_images: bn \(BatchNorm1d\)"):
        check_statistics(Net(), IMAGES[:1], "qat.bn_images")


def test_a_network_that_is_fine_takes_a_step() -> None:
    network = Net()
    before = network.last.weight.detach().clone()
    check_forward(network, IMAGES, 10)
    check_step(network, IMAGES, LABELS, SECTION, "float")
    assert not torch.equal(before, network.last.weight)
