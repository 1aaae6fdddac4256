"""Checkpoints as trainings leave them: which tensors are taken, under which names, and what is said of it."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from crqat.core.errors import UsageError
from crqat.train.models import build as models


def build() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))


def weights(factor: float = 1.0) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        name: value * factor if value.is_floating_point() else value for name, value in build().state_dict().items()
    }


def prefixed(prefix: str, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in (state or weights()).items()}


def taken(path: Path, content: Any, key: str | None = None) -> str:
    """What is said of a file, whose weights must be `weights()`."""
    torch.save(content, path)
    model = build()
    said = models.load_weights(model, path, key)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights().items())
    return said.replace(str(path), "FILE")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("plain.ckpt", weights(), ""),
        ("best.pth.tar", {"state_dict": weights(), "optimizer": {"state": {0: weights()}}}, ""),
        ("bytes.bin", {"model_state_dict": weights(), "epoch": 3}, ""),
        ("net.pth", {"net": weights(), "acc": 91.0}, ""),
        ("any.PTH", {"run": {"my weights": weights()}}, ""),
        ("compiled.pth", prefixed("_orig_mod."), "FILE: names without their `_orig_mod.`"),
        ("lightning.ckpt", {"state_dict": prefixed("model.")}, "FILE: names without their `model.`"),
        ("both.pt", prefixed("module._orig_mod."), "FILE: names without their `module._orig_mod.`"),
        ("mine.pt", prefixed("classifier.backbone."), "FILE: names without their `classifier.backbone.`"),
        (
            "averaged.pth",
            {"model": {**prefixed("module."), "n_averaged": torch.tensor(9)}},
            "FILE: names without their `module.`",
        ),
        ("part.pth", {name.replace("0.", "0._orig_mod.", 1): value for name, value in weights().items()},
         "FILE: names without their `_orig_mod.`"),
        ("gan.pth", {"generator": {"w": torch.zeros(2)}, "critic": weights()}, "FILE: `critic`, not generator"),
        ("same.pth", {"state_dict": weights(), "state_dict_ema": weights()}, "FILE: `state_dict`, not state_dict_ema"),
    ],
)  # fmt: skip
def test_weights_are_found(tmp_path: Path, name: str, content: Any, said: str) -> None:
    assert taken(tmp_path / name, content) == said


def test_of_two_that_fit_one_has_to_be_named(tmp_path: Path) -> None:
    path, content = tmp_path / "timm.pth", {"state_dict": weights(1.5), "state_dict_ema": prefixed("module.")}
    torch.save(content, path)
    model = build()
    before = model.state_dict()["0.weight"].clone()
    with pytest.raises(UsageError) as caught:
        models.load_weights(model, path)
    assert str(caught.value) == (
        f"model.weights_key: missing; {path} holds weights that fit under state_dict and state_dict_ema, and they "
        "differ (such as averaged weights and the last ones); choose one, such as `weights_key: state_dict_ema`"
    )
    assert torch.equal(model.state_dict()["0.weight"], before)
    assert taken(path, content, "state_dict_ema") == (
        "FILE: `state_dict_ema`, not state_dict; names without their `module.`"
    )
    with pytest.raises(
        UsageError, match=r"^model\.weights_key: .* under 'ema'; it holds state_dict \(9 entries\), state"
    ):
        taken(path, {**content, "epoch": 3}, "ema")


def test_a_prefix_is_dropped_only_if_the_names_fit_without_it(tmp_path: Path) -> None:
    torch.save({"state_dict": prefixed("model.") | {"criterion.weight": torch.zeros(3)}}, tmp_path / "w.ckpt")
    with pytest.raises(
        UsageError, match=r"w\.ckpt, state_dict does not fit .* unexpected \(model.*; the file holds state"
    ):
        models.load_weights(build(), tmp_path / "w.ckpt")
    fit = nn.ModuleDict({"module": nn.Linear(2, 2)})
    torch.save(fit.state_dict(), tmp_path / "own.pth")
    assert models.load_weights(nn.ModuleDict({"module": nn.Linear(2, 2)}), tmp_path / "own.pth") == ""


def test_settings_beside_the_weights_are_left_out_unread(tmp_path: Path) -> None:
    settings = {
        "args": argparse.Namespace(lr=0.1, out=Path("runs")),
        "best": np.float64(91.5),
        "curve": np.arange(3),
    }
    before = set(torch.serialization.get_safe_globals())
    assert taken(tmp_path / "timm.pth.tar", {"state_dict": weights(), **settings}) == ""
    torch.save(settings, tmp_path / "none.pth")
    with pytest.raises(
        UsageError, match=r"no state dict .*args \(settings\), best \(settings\), curve \(settings\); save"
    ):
        models.load_weights(build(), tmp_path / "none.pth")
    assert set(torch.serialization.get_safe_globals()) == before


class Settings:
    """A class of an untrusted file's."""


def test_an_untrusted_class_is_named_with_the_way_out(tmp_path: Path) -> None:
    torch.save({"state_dict": weights(), "hyper_parameters": Settings()}, tmp_path / "w.ckpt")
    with pytest.raises(
        UsageError, match=r"needs code to load \(.*Settings\) and is refused; .*weights_only=False"
    ) as caught:
        models.load_weights(build(), tmp_path / "w.ckpt")
    assert isinstance(caught.value.__cause__, pickle.UnpicklingError)
