from __future__ import annotations

import torch
from torch import nn

from crqat.train.untrained import awake, sane_bn


def test_batch_norms_have_the_statistics_of_the_images() -> None:
    torch.manual_seed(0)
    norm, images = nn.BatchNorm2d(8), 5 + 3 * torch.randn(16, 3, 8, 8)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), norm)
    assert not sane_bn(network, images).training
    with torch.no_grad():
        y = (network(images) - norm.bias[:, None, None]) / norm.weight[:, None, None]
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.var((0, 2, 3)), torch.ones(8), atol=1e-3, rtol=0)
    assert norm.weight.min() > 0.7 and len(set(norm.weight.tolist())) == 8


def test_parts_that_start_asleep_are_woken_and_others_left() -> None:
    torch.manual_seed(0)
    network = nn.Module()
    network.token = nn.Parameter(torch.zeros(1, 1, 8))
    network.scale = nn.Parameter(torch.full((8, 1, 1), 1e-6))
    network.fc = nn.Linear(8, 8)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    after = awake(network).state_dict()
    assert after["token"].abs().max() > 1e-3 and len(set(after["token"].flatten().tolist())) == 8
    assert 0.1 <= after["scale"].min() < after["scale"].max() <= 0.5
    assert all(torch.equal(after[name], before[name]) for name in ("fc.weight", "fc.bias"))
