"""Which parameters are decayed, and which stay positive."""

from __future__ import annotations

import torch
from torch import nn

from crqat.core.progress import quiet
from crqat.train.config import OptimizerConfig
from crqat.train.quantizers import LSQPlusQuantizer, LSQQuantizer, PACTQuantizer
from crqat.train.training.optimizer import Fit, is_scale
from tests.crqat_train.quantizers.reference import spec_of


def test_weight_decay_is_on_weights_and_on_pacts_levels_alone() -> None:
    model = nn.Module()
    model.fc = nn.Linear(3, 2)
    model.quantizers = nn.ModuleDict(
        {
            "w": LSQQuantizer(spec_of(-8, 7, 2, 2)),
            "a": PACTQuantizer(spec_of(0, 15)),
            "p": LSQPlusQuantizer(spec_of(-8, 7)),
        }
    )
    fit = Fit(model, OptimizerConfig(weight_decay=0.25), 10, "qat", torch.device("cpu"), quiet)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = fit.optimizer.param_groups
    decay = {names[parameter]: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decay.keys() == set(names.values())
    assert {name for name, value in decay.items() if value} == {"fc.weight", "quantizers.a.scale"}
    assert set(decay.values()) == {0.0, 0.25}
    assert {name for name in decay if is_scale(name)} == {f"quantizers.{key}.scale" for key in "wap"}
    assert "quantizers.p.offset" in decay  # may be negative
