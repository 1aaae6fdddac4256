"""Stock NNCF as its users use it; its formula from NNCF's own reference code, so that no C++ is compiled."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from crqat.train.nncf.checkpoint import CONFIG, STATE


def quantize(network: nn.Module, images: Tensor, preset: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and configuration of `nncf.quantize`, W8A8."""
    import nncf
    import nncf.torch
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

    advanced = AdvancedQuantizationParameters(disable_bias_correction=True, overflow_fix=OverflowFix.DISABLE)
    quantized = nncf.quantize(
        copy.deepcopy(network).eval(),
        nncf.Dataset([images]),
        preset=nncf.QuantizationPreset(preset),
        subset_size=1,
        advanced_parameters=advanced,
    )
    return quantized.state_dict(), nncf.torch.get_config(quantized)


def with_bits(state: dict[str, Tensor], config: dict[str, Any], bits: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same with all quantizers of another width, which NNCF has no way to ask for."""
    state = {name: tensor.clone() for name, tensor in state.items()}
    config = copy.deepcopy(config)
    for entry in config["compression_state"]:
        entry["module_config"]["num_bits"] = bits
        for hook in entry["hook_names_in_model"]:
            state[f"__nncf_hooks.{hook}._num_bits"].fill_(bits)
    return state, config


def load(network: nn.Module, state: dict[str, Tensor], config: dict[str, Any]) -> nn.Module:
    """A quantized network in eval mode, loaded as NNCF's documentation says, every key accounted for."""
    import nncf.torch

    quantized: nn.Module = nncf.torch.load_from_config(network.eval(), config)
    quantized.load_state_dict(state, strict=True)
    return quantized


def load_folder(network: nn.Module, folder: Path) -> nn.Module:
    """The same from a folder that was written here."""
    return load(network, load_file(folder / STATE), json.loads((folder / CONFIG).read_text()))


def hook(quantized: nn.Module, name: str) -> nn.Module:
    """NNCF's quantizer of a hook name."""
    return quantized.get_submodule(f"__nncf_hooks.{name}")


@torch.no_grad()
def differing_codes(ours: nn.Module, theirs: nn.Module, values: Tensor, step: Tensor) -> tuple[int, float]:
    """Two quantizers on the same values: how many get another code, and how far from a tie the farthest of them is."""
    code, other = torch.round(ours(values) / step), torch.round(theirs(values) / step)
    differ = code != other
    assert bool(((code - other).abs() <= 1).all())
    place = (values / step)[differ]
    return int(differ.sum()), float((place - place.floor() - 0.5).abs().max()) if bool(differ.any()) else 0.0
