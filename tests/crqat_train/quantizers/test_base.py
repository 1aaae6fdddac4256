from __future__ import annotations

import pytest
import torch

from crqat.train.quantizers import quantizer_of
from tests.crqat_train.quantizers.reference import quantizer


def test_quantizer_of_names_what_is_no_quantizer() -> None:
    lsq = quantizer(0, 127)
    model = torch.nn.Module()
    model.add_module("quantizers", torch.nn.ModuleDict({lsq.spec.module_name: lsq}))
    assert quantizer_of(model, lsq.spec) is lsq
    model.get_submodule("quantizers").add_module(lsq.spec.module_name, torch.nn.Identity())
    with pytest.raises(TypeError, match=r"post_hooks\.x__0\.0: not a quantizer"):
        quantizer_of(model, lsq.spec)
