"""Reads and writes NNCF checkpoints (state dict and configuration), and converts their parameters to and from Grids.

NNCF stores the largest value of a quantizer's range instead of the scale: `scale` of a symmetric one, `input_low` and
`input_range` of an asymmetric one. NNCF's hook names are crqat's edge names, so no mapping is needed and NNCF is not
imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from crqat.core import strict_json
from crqat.core.errors import ToolError, UsageError
from crqat.core.grid import Grid, load_grids
from crqat.core.results.training import TrainingPayload
from crqat.core.run_directory import payload_of, replace_file, verify_stage
from crqat.train.checkpoint import read_tensors

STATE, CONFIG, HOWTO = "model.safetensors", "nncf_config.json", "load_in_nncf.py"
_PREFIX = "__nncf_hooks."
_ENTRIES = "compression_state"
# The only non-plain value in a configuration: a kind of string, which is read as a string.
_PLAIN: list[Any] = [(str, "nncf.common.quantization.structs.QuantizationScheme")]
# A zero point this close to an integer differs from it only by float32 rounding.
_ON_CODE = 1e-4
_SYMMETRIC, _ASYMMETRIC = "SymmetricQuantizer", "AsymmetricQuantizer"

_HOWTO_TEXT = '''\
"""Loads the checkpoint beside this file into stock NNCF."""

import json
from pathlib import Path

import nncf.torch
from safetensors.torch import load_file
from torch import nn

HERE = Path(__file__).parent


def load(network: nn.Module) -> nn.Module:
    """The quantized network in eval mode; `network` is a new float one, {network}."""
    config = json.loads((HERE / "{config}").read_text())
    quantized = nncf.torch.load_from_config(network.eval(), config)
    quantized.load_state_dict(load_file(HERE / "{state}"), strict=True)
    return quantized
'''


@dataclass(frozen=True)
class NNCFQuantizer:
    """One quantizer in NNCF's representation.

    Attributes:
        hooks: All hook names that share the quantizer, sorted.
        bits: Bit width.
        signed: For a symmetric quantizer: whether it has negative codes.
        narrow: For a symmetric quantizer: whether it lacks the smallest code (the largest, if it is unsigned).
        parameters: float32, of the scale's shape in NNCF: "scale", or "input_low" and "input_range".
    """

    hooks: tuple[str, ...]
    bits: int
    signed: bool
    narrow: bool
    parameters: dict[str, Tensor]

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is 0 by construction."""
        return "scale" in self.parameters

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of each parameter: (1,), or full rank with the channels on one axis."""
        return tuple(next(iter(self.parameters.values())).shape)

    @property
    def levels(self) -> tuple[int, int]:
        """Return the smallest and the largest code."""
        if not self.symmetric:
            return 0, 2**self.bits - 1
        if self.signed:
            return -(2 ** (self.bits - 1)) + self.narrow, 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1 - self.narrow

    def grid(self) -> Grid:
        """Return the Grid with the same scale, zero point and codes as the quantizer.

        Raises:
            UsageError: The channels have different zero points, which a Grid cannot represent.
        """
        low, high = self.levels
        scale, zero_point = self._step()
        points = set(zero_point.reshape(-1).tolist())
        if len(points) != 1:
            msg = (
                f"{self.hooks[0]}: asymmetric per channel, which is not supported; quantize it per tensor, or with "
                "nncf's preset PERFORMANCE"
            )
            raise UsageError(msg)
        axis = None
        if len(self.shape) > 1:
            axis = next((number for number, size in enumerate(self.shape) if size > 1), 0)
        return Grid(scale.reshape(-1).numpy(), int(points.pop()), low, high, axis)

    def _step(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point, in the parameters' shape."""
        low, high = self.levels
        if self.symmetric:
            scale = self.parameters["scale"].abs() / high
            return scale, torch.zeros_like(scale)
        count, spread = high - low, self.parameters["input_range"].float().abs()
        smallest = self.parameters["input_low"].float()
        largest = (spread + smallest).clamp_min(0)
        smallest = smallest.clamp_max(0)
        exact = -smallest * (count / (largest - smallest))
        zero_point = torch.round(exact)
        by_high, by_low = largest / (count - zero_point), -smallest / zero_point
        # A side without codes does not move a border, and a value on the border still belongs to the range.
        whole = (largest - smallest) / count
        by_high = torch.where(zero_point < count, by_high, whole)
        by_low = torch.where(zero_point > 0, by_low, whole)
        # If 0.0 is not a code yet, move the border that makes the range larger, as NNCF does in each forward.
        on_code = ((exact - zero_point).abs() < _ON_CODE) & (self.parameters["input_low"] <= 0)
        return torch.where(on_code, spread / count, torch.maximum(by_high, by_low)), zero_point


@dataclass(frozen=True)
class Checkpoint:
    """Float weights and quantizers of a network quantized by NNCF.

    Attributes:
        weights: The float network's state dict.
        quantizers: The active quantizers, in the configuration's order.
    """

    weights: dict[str, Tensor]
    quantizers: list[NNCFQuantizer]


def of_grid(hooks: Sequence[str], grid: Grid, ndim: int) -> NNCFQuantizer:
    """Convert a Grid to an NNCF quantizer.

    The codes 0 to 127 become signed 8 bits, because NNCF's own tools do not support unsigned 7 bits. A tensor without
    negative values has the same quantized values with signed 8 bits, and OpenVINO runs it in INT8.

    Args:
        hooks: Hook names of the quantizer.
        grid: A trained Grid.
        ndim: Dimensions of the quantized tensor.

    Raises:
        UsageError: NNCF has no quantizer with these codes.
    """
    shape = [1] if grid.axis is None else [1] * ndim
    if grid.axis is not None:
        shape[grid.axis] = len(grid.scale)
    scale = torch.from_numpy(grid.scale.copy()).reshape(shape)
    names = tuple(sorted(hooks))
    if grid.zero_point == 0:
        qmin = -128 if (grid.qmin, grid.qmax) == (0, 127) else grid.qmin
        parameters = {"scale": _largest(scale, grid.qmax)}
        for bits, signed, narrow in ((b, s, n) for b in range(2, 9) for s in (True, False) for n in (False, True)):
            made = NNCFQuantizer(names, bits, signed, narrow, parameters)
            if made.levels == (qmin, grid.qmax):
                return made
    count = grid.qmax - grid.qmin
    bits = (count + 1).bit_length() - 1
    if count + 1 != 2**bits:
        msg = (
            f"{hooks[0]}: NNCF has no quantizer with codes {grid.qmin} to {grid.qmax} and zero point {grid.zero_point}"
        )
        raise UsageError(msg)
    parameters = {"input_low": scale * (grid.qmin - grid.zero_point), "input_range": _largest(scale, count)}
    return NNCFQuantizer(names, bits, True, False, parameters)


def _largest(step: Tensor, code: int) -> Tensor:
    """Return `step` * `code`, the real value of the largest code.

    Where dividing the product by `code` does not give `step` again, the next float32 number that does replaces it. If
    no number does, the quotient differs from `step` in its last bit.
    """
    value = step * code
    for neighbour in (torch.full_like(value, torch.inf), torch.zeros_like(value)):
        other = torch.nextafter(step * code, neighbour)
        value = torch.where((value / code != step) & (other / code == step), other, value)
    return value


def write(checkpoint: Checkpoint, folder: Path, network: str) -> None:
    """Write state dict, configuration and a Python script that shows how to load them.

    Args:
        checkpoint: The checkpoint to write.
        folder: Output folder; created if it is missing.
        network: Description of the float network for people.

    Raises:
        ToolError: The folder cannot be written; no file is left half written.
    """
    state = {name: tensor.contiguous().clone() for name, tensor in checkpoint.weights.items()}
    entries = []
    for quantizer in checkpoint.quantizers:
        entries.append(_entry(quantizer))
        for hook in quantizer.hooks:
            state |= {f"{_PREFIX}{hook}.{name}": value for name, value in _tensors(quantizer)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / STATE, safetensors.torch.save(state))
        replace_file(folder / CONFIG, json.dumps({_ENTRIES: entries}, indent=1).encode())
        text = _HOWTO_TEXT.replace("{network}", network).replace("{config}", CONFIG).replace("{state}", STATE)
        replace_file(folder / HOWTO, text.encode())
    except OSError as error:
        msg = f"{folder}: cannot be written: {error.strerror}; choose another place with --out"
        raise ToolError(msg) from error


def _entry(quantizer: NNCFQuantizer) -> dict[str, Any]:
    """Return a quantizer's entry in NNCF's configuration."""
    return {
        "hook_names_in_model": list(quantizer.hooks),
        "module_path": "nncf.torch.quantization.layers",
        "module_cls_name": _SYMMETRIC if quantizer.symmetric else _ASYMMETRIC,
        "module_config": {
            "num_bits": quantizer.bits,
            "mode": "symmetric" if quantizer.symmetric else "asymmetric",
            "signedness_to_force": quantizer.signed if quantizer.symmetric else None,
            "narrow_range": quantizer.narrow,
            "half_range": False,
            "scale_shape": list(quantizer.shape),
            "logarithm_scale": False,
            "is_quantized_on_export": False,
        },
    }


def _tensors(quantizer: NNCFQuantizer) -> Iterator[tuple[str, Tensor]]:
    """Yield a quantizer's entries in NNCF's state dict."""
    integers = {"_num_bits": quantizer.bits, "enabled": 1}
    if quantizer.symmetric:
        integers["signed_tensor"] = int(quantizer.signed)
    for name, value in integers.items():
        yield name, torch.tensor([value], dtype=torch.int32)
    for name, tensor in quantizer.parameters.items():
        yield name, tensor.float().contiguous().clone()


def read(path: Path) -> Checkpoint:
    """Read an NNCF checkpoint without executing code in it.

    Args:
        path: A folder with one .safetensors and one .json file, or a file written by torch.save that holds a state dict
            and the configuration of `nncf.torch.get_config` under any names.

    Raises:
        UsageError: The checkpoint is missing, damaged, needs code to load, or holds anything but NNCF quantizers.
    """
    state, config = _read_folder(path) if path.is_dir() else _read_file(path)
    quantizers = []
    try:
        for entry in config[_ENTRIES]:
            name, hooks = entry["module_cls_name"], tuple(sorted(map(str, entry["hook_names_in_model"])))
            if name not in (_SYMMETRIC, _ASYMMETRIC) or entry["module_config"].get("half_range"):
                msg = (
                    f"{path}: {hooks[0]} is a {name}; only {_SYMMETRIC} and {_ASYMMETRIC} without half_range are "
                    "supported; quantize by nncf.quantize with overflow_fix=OverflowFix.DISABLE"
                )
                raise UsageError(msg)
            values = {key: state[f"{_PREFIX}{hooks[0]}.{key}"] for key in _names(name)}
            if not bool(values.pop("enabled")):
                continue
            bits, signed = int(values.pop("_num_bits")), bool(values.pop("signed_tensor", True))
            narrow = bool(entry["module_config"]["narrow_range"]) and name == _SYMMETRIC
            if not 2 <= bits <= 8 or not all(bool(torch.isfinite(value).all()) for value in values.values()):
                msg = (
                    f"{path}: {hooks[0]}: {bits} bits, or a non-finite range; only finite ranges of 2 to 8 bits can be "
                    "imported"
                )
                raise UsageError(msg)
            quantizers.append(NNCFQuantizer(hooks, bits, signed, narrow, values))
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        msg = f"{path}: state dict and configuration do not fit each other ({error}); save both of the same network"
        raise UsageError(msg) from error
    weights = {name: value for name, value in state.items() if not name.startswith(_PREFIX)}
    return Checkpoint(weights, quantizers)


def _names(module: str) -> tuple[str, ...]:
    own = ("signed_tensor", "scale") if module == _SYMMETRIC else ("input_low", "input_range")
    return ("_num_bits", "enabled", *own)


def _read_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    states, configs = sorted(path.glob("*.safetensors")), sorted(path.glob("*.json"))
    if len(states) != 1 or len(configs) != 1:
        msg = f"{path}: {len(states)} .safetensors and {len(configs)} .json files; it must have exactly one of each"
        raise UsageError(msg)
    try:
        config = strict_json.read(configs[0])
    except (ValueError, OSError) as error:
        msg = f"{configs[0]}: not JSON ({error}); write json.dumps(nncf.torch.get_config(model))"
        raise UsageError(msg) from error
    try:
        state = safetensors.torch.load_file(states[0])
    except Exception as error:  # safetensors has its own exception, and the system others
        msg = f"{states[0]}: damaged or no safetensors file ({' '.join(str(error).split())}); save it again"
        raise UsageError(msg) from error
    if not isinstance(config, dict) or _ENTRIES not in config:
        msg = f"{configs[0]}: not a configuration of nncf.torch.get_config(model): it has no {_ENTRIES}"
        raise UsageError(msg)
    return state, config


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with torch.serialization.safe_globals(_PLAIN):
            content = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        msg = f"{path}: no such file or folder; give the checkpoint of a network that nncf.quantize has quantized"
        raise UsageError(msg) from error
    except Exception as error:  # torch raises many kinds of errors for damaged files
        reason = " ".join(str(error).partition("\n")[0].split())[:200] or type(error).__name__
        msg = f"{path}: damaged, or needs code to load ({reason}); save state dict and configuration alone"
        raise UsageError(msg) from error
    parts = [part for part in content.values() if isinstance(part, Mapping)] if isinstance(content, Mapping) else []
    states = [part for part in parts if part and all(isinstance(value, Tensor) for value in part.values())]
    configs = [part for part in parts if _ENTRIES in part]
    if len(states) != 1 or len(configs) != 1:
        msg = (
            f"{path}: {len(states)} state dicts and {len(configs)} configurations; save exactly one of each by "
            "torch.save({'state_dict': model.state_dict(), 'config': nncf.torch.get_config(model)}, path)"
        )
        raise UsageError(msg)
    return {str(name): value for name, value in states[0].items()}, dict(configs[0])


def export(train_dir: Path, candidate: str, out: Path, network: str) -> Checkpoint:
    """Write the network of a finished train stage as an NNCF checkpoint.

    Weights are clipped to the range of their codes, which does not change their quantized values. NNCF's own exporters
    add a code to a narrow range; no clipped weight rounds to that code.

    Args:
        train_dir: Directory of a train stage; its hashes are verified first.
        candidate: "student", "teacher" or "calibrated"; "best" takes the best of them on the validation split.
        out: Output folder.
        network: Description of the float network for people.

    Returns:
        The checkpoint that was written.

    Raises:
        UsageError: The stage has no such candidate, or NNCF cannot represent one of its quantizers.
        ToolError: The folder cannot be written.
    """
    payload = payload_of(TrainingPayload, train_dir, verify_stage(train_dir))
    candidate = payload.best if candidate == "best" else candidate
    if candidate not in payload.candidates:
        msg = f"--candidate {candidate}: the training has only {', '.join(payload.candidates)}"
        raise UsageError(msg)
    grids = load_grids(train_dir / f"{candidate}.grids.json")
    state = read_tensors(train_dir / f"{candidate}.safetensors")
    weights = {name: value for name, value in state.items() if not name.startswith("quantizers.")}
    specs = json.loads((train_dir / "layout.json").read_text())
    quantizers = [of_grid(spec["hooks"], grids[spec["edge"]], spec["ndim"]) for spec in specs]
    of_weights = [(_weight_name(spec["edge"]), grids[spec["edge"]]) for spec in specs if spec["kind"] == "weight"]
    names = [name for name, _ in of_weights]
    for name, grid in of_weights:
        # A parameter of a function has no name here, and a layer that runs twice has two ranges.
        if name in weights and names.count(name) == 1:
            weights[name] = _clipped(weights[name], grid)
    checkpoint = Checkpoint(weights, quantizers)
    write(checkpoint, out, network)
    return checkpoint


def _weight_name(edge: str) -> str:
    """Return the state dict's key of the weight at an edge such as "pre_hooks.layer1/0/conv1/conv2d/0__1.0"."""
    return f"{edge.split('.', 1)[1].rsplit('/', 2)[0].replace('/', '.')}.weight"


def _clipped(weight: Tensor, grid: Grid) -> Tensor:
    shape = [1] * weight.ndim
    shape[grid.axis or 0] = -1
    scale = torch.from_numpy(grid.scale.copy()).reshape(shape)
    return torch.minimum(torch.maximum(weight, scale * grid.qmin), scale * grid.qmax)
