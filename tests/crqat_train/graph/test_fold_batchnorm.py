from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from crqat.train.graph.fold_batchnorm import folded_codes, folded_weight, of_module


def norm(channels: int) -> nn.BatchNorm2d:
    generator, bn = torch.Generator().manual_seed(0), nn.BatchNorm2d(channels).eval()
    assert bn.running_mean is not None and bn.running_var is not None
    with torch.no_grad():
        for tensor in (bn.weight, bn.bias, bn.running_mean):
            tensor.normal_(generator=generator)
        bn.running_var.uniform_(0.1, 2.0, generator=generator)
    return bn


@pytest.mark.parametrize("bias", [True, False])
def test_the_folded_convolution_computes_the_same(bias: bool) -> None:
    torch.manual_seed(0)
    conv, bn, x = nn.Conv2d(3, 8, 3, bias=bias), norm(8), torch.randn(2, 3, 6, 6)
    own = np.zeros(8, np.float32) if conv.bias is None else conv.bias.detach().numpy()
    factor, folded = of_module(bn, own)
    weight = folded_weight(conv.weight.detach().numpy(), factor)
    with torch.no_grad():
        expected = bn(conv(x))
        computed = torch.nn.functional.conv2d(x, torch.from_numpy(weight), torch.from_numpy(folded))
    assert weight.dtype == folded.dtype == factor.dtype == np.float32
    np.testing.assert_allclose(computed.numpy(), expected.numpy(), rtol=1e-5, atol=1e-5)


def test_codes_keep_their_values_and_change_their_sign_with_the_multiplier() -> None:
    codes = np.array([[-8, 0, 7], [1, 2, 3], [4, 5, 6]], np.int32)
    factor = np.array([-0.5, 2.0, 0.0], np.float32)
    folded, scale = folded_codes(codes, np.array([0.25, 0.5, 1.0], np.float32), factor)
    assert folded.tolist() == [[8, 0, -7], [1, 2, 3], [0, 0, 0]]
    assert scale.tolist() == [0.125, 1.0, 0.0]
    assert folded_codes(codes, np.array([0.5], np.float32), factor)[1].tolist() == [0.25, 1.0, 0.0]


def test_a_module_without_affine_parameters_folds_by_its_statistics() -> None:
    bn = nn.BatchNorm2d(3, affine=False)
    bn.running_var = torch.tensor([1.0, 4.0, 0.0])
    factor, bias = of_module(bn, np.ones(3, np.float32))
    np.testing.assert_allclose(factor, 1 / np.sqrt(np.array([1.0, 4.0, 0.0]) + bn.eps), rtol=1e-6)
    np.testing.assert_array_equal(bias, factor)
    with pytest.raises(ValueError, match="without running statistics"):
        of_module(nn.BatchNorm2d(3, track_running_stats=False), np.zeros(3, np.float32))
