"""Reads checkpoints of training runs: finds the network's weights in a file and matches their names.

No code in a file is ever executed: pickles are loaded by torch.load with weights_only=True, and objects of a few
well-known settings classes are replaced by empty ones.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from crqat.core.errors import UsageError

ENDINGS = (".safetensors", ".pth", ".pt", ".th", ".ckpt", ".bin", ".pth.tar", ".pt.tar")
_SHOWN = 3
_SHOWN_KEYS = 12
# Counter of AveragedModel, which no network has.
_COUNTER = "n_averaged"
_COMPILED = "_orig_mod."
# Settings and numbers that trainers store next to the weights (timm's and torchvision's `args`, a best accuracy).
_SETTINGS = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
)
_DICTIONARIES = (
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
)


class _LeftOut:
    """Stands in for the classes in `_SETTINGS` when a pickle is loaded.

    Its constructor and `__setstate__` accept any arguments and ignore them, so that loading neither fails nor runs code
    of the original class.
    """

    def __new__(cls, *_: Any, **__: Any) -> _LeftOut:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


@dataclass(frozen=True)
class Match:
    """A state dict renamed to a network's names, and what does not fit.

    Attributes:
        state: Tensors of any dtype under the network's names.
        dropped: Prefix that was removed from all names, such as "module."; "" if none.
        problems: Names that do not fit, by kind of problem.
    """

    state: dict[str, Tensor]
    dropped: str
    problems: dict[str, list[str]]

    @property
    def count(self) -> int:
        """Return the number of names that do not fit."""
        return sum(map(len, self.problems.values()))

    def __str__(self) -> str:
        """Describe the names that do not fit, on one line."""
        return "; ".join(f"{len(keys)} {kind} ({_first(keys)})" for kind, keys in self.problems.items() if keys)


def choose(path: Path, key: str | None, expected: Mapping[str, Tensor]) -> tuple[Match, str]:
    """Return the state dict in a file that fits a network.

    Args:
        path: File with one of `ENDINGS`: a state dict, alone or under any key of a dictionary, such as "state_dict".
        key: Key of the state dict ("model_ema", or "state.model" for a nested dictionary); None takes the only one that
            fits.
        expected: The network's own state dict.

    Returns:
        The state dict, and a note of what was taken from the file, in one line; "" if there is nothing to report.

    Raises:
        UsageError: The file is missing, damaged, needs code to load or does not fit, or several state dicts fit.
    """
    content = _read(path)
    every = dict(_state_dicts(content))
    found = every
    if key is not None:
        found = {key: every[key]} if key in every else {}
        if not found:
            msg = f"model.weights_key: {path} holds no state dict under {key!r}; it holds {_listed(content)}"
            raise UsageError(msg)
    if not found:
        msg = (
            f"model.weights: {path} holds no state dict (names to tensors), but {_listed(content)}; save "
            "model.state_dict()"
        )
        raise UsageError(msg)
    fits = {place: match(state, expected) for place, state in found.items()}
    fitting = [place for place, made in fits.items() if not made.count]
    if not fitting:
        closest = min(fits, key=lambda place: fits[place].count)
        where = f"{path}, {closest}" if closest else str(path)
        holds = f"; the file holds {_listed(content)}" if closest else ""
        msg = f"model.weights: {where} does not fit the network in model.name: {fits[closest]}{holds}"
        raise UsageError(msg)
    first = fits[fitting[0]].state
    if any(not _equal(first, fits[place].state) for place in fitting[1:]):
        msg = (
            f"model.weights_key: missing; {path} holds weights that fit under {' and '.join(fitting)}, and they differ "
            f"(such as averaged weights and the last ones); choose one, such as `weights_key: {fitting[-1]}`"
        )
        raise UsageError(msg)
    taken, others = fitting[0], [place for place in every if place and place != fitting[0]]
    said = [f"`{taken}`" + (f", not {', '.join(others)}" if others else "")] if taken and (others or key) else []
    said += [f"names without their `{fits[taken].dropped}`"] if fits[taken].dropped else []
    return fits[taken], f"{path}: {'; '.join(said)}" if said else ""


def match(values: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Match:
    """Match the names of a state dict with a network's, with or without the prefix that they share.

    Args:
        values: The state dict. Names added by torch.compile and AveragedModel are left out.
        expected: The network's own state dict.

    Returns:
        The match with the fewest problems.
    """
    made = [Match(state, dropped, _problems(state, expected)) for dropped, state in _renamings(values, expected)]
    return min(made, key=lambda one: one.count)  # of equally good matches the first, without a change


def _renamings(values: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the state dict under each plausible set of names, with the prefix that was removed for it."""
    yield "", dict(values)
    plain = {name: value for name, value in values.items() if name in expected or _last(name) != _COUNTER}
    # torch.compile of a part of a network adds its prefix in the middle of names.
    bare = {name.replace(_COMPILED, ""): value for name, value in plain.items()}
    for mark, state in (("", plain), (_COMPILED, bare)):
        if len(state) < len(plain):  # two names became the same
            continue
        yield mark, state
        prefix = ""
        for part in _common(list(state)):
            prefix += f"{part}."
            yield f"{mark}` and `{prefix}" if mark else prefix, {name[len(prefix) :]: state[name] for name in state}


def _common(names: list[str]) -> list[str]:
    """Return the leading parts that all names share; the last part of a name is never among them."""
    if not names:
        return []
    # The smallest and the largest name share only what all names share.
    pair = [name.split(".") for name in (min(names), max(names))]
    shortest = min(name.count(".") for name in names)
    parts: list[str] = []
    for one, other in zip(pair[0][:shortest], pair[1], strict=False):
        if one != other:
            break
        parts.append(one)
    return parts


def _problems(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, list[str]]:
    return {
        # BN counts its batches only for momentum=None; old files lack the counter.
        "missing": [key for key in expected if key not in state and not key.endswith("num_batches_tracked")],
        "unexpected": [key for key in state if key not in expected],
        "wrong shape": [
            f"{key} {list(state[key].shape)} instead of {list(value.shape)}"
            for key, value in expected.items()
            if key in state and state[key].shape != value.shape
        ],
    }


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def _read(path: Path) -> Any:
    if not path.is_file():
        msg = f"model.weights: no file {path}; correct the path, or leave model.weights out to train the float network"
        raise UsageError(msg)
    if not path.name.lower().endswith(ENDINGS):
        msg = f"model.weights: {path} is not one of {', '.join(ENDINGS)}; save model.state_dict() as one of them"
        raise UsageError(msg)
    stand_ins = [(_LeftOut, name) for name in _SETTINGS] + [(OrderedDict, name) for name in _DICTIONARIES]
    try:
        if path.name.lower().endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
            return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        # torch's message names the class or function that the file wants to call.
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        problem = f"needs code to load ({wanted[1]})" if wanted else "is not a file of tensors, or needs code to load"
        msg = (
            f"model.weights: {path} {problem} and is refused; save model.state_dict() alone, best as .safetensors, or, "
            "if you trust the file, convert it with torch.save(torch.load(FILE, weights_only=False)[KEY], NEW), which "
            "runs the code in it"
        )
        raise UsageError(msg) from error
    except Exception as error:  # torch raises many kinds of errors for damaged files
        reason = " ".join(str(error).partition("\n")[0].partition(". ")[0].split()) or type(error).__name__
        msg = f"model.weights: {path} is damaged or not a file of tensors ({reason}); fetch or save it again"
        raise UsageError(msg) from error


def _state_dicts(content: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield each state dict in a file with the path of keys that leads to it, "" if the file itself is one."""
    if not isinstance(content, Mapping):
        return
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    others = [name for name in content if name not in tensors and _last(str(name)) not in (_COUNTER, "_extra_state")]
    if tensors and not others and all(isinstance(name, str) for name in tensors):
        yield place, tensors
        return
    for name, value in content.items():
        # What an optimizer keeps has a network's names, too.
        if isinstance(name, str) and depth < 2 and not re.search("optim|sched", name.lower()):
            yield from _state_dicts(value, f"{place}.{name}" if place else name, depth + 1)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _listed(content: Any) -> str:
    """Describe, for a message, what a file holds at its top level."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    named = [
        f"{name} ({len(value)} entries)" if isinstance(value, Mapping) else f"{name} ({_kind(value)})"
        for name, value in content.items()
    ]
    return ", ".join(named[:_SHOWN_KEYS]) + (f" and {len(named) - _SHOWN_KEYS} more" if named[_SHOWN_KEYS:] else "")


def _kind(value: Any) -> str:
    return "settings" if isinstance(value, _LeftOut) else type(value).__name__


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")
