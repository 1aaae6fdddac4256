"""Matches the patterns in a recipe's `quantization.overrides` and `quantization.float_layers` with layers.

The `activations` of a layer are its inputs, not its outputs, because the layer's kernel multiplies weights with inputs.
An activation that is not a layer's input, such as the input of an Add, is addressed by its own name.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from crqat.core.errors import UsageError
from crqat.core.targets import ALL
from crqat.train.config import Override


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer that an override can address.

    Attributes:
        edge: Edge of its weight.
        name: The name that patterns are matched with, such as "layer1.0.conv1".
        input_edge: Edge of its input activation; None if that is not quantized, or has more than one quantizer.
    """

    edge: str
    name: str
    input_edge: str | None


def widths(
    overrides: Mapping[str, Override], layers: Sequence[Layer], activations: Mapping[str, str]
) -> dict[str, int]:
    """Return the bit width of each edge that an override addresses.

    If several patterns match a name, the exact name takes precedence over a pattern, and a longer pattern over a
    shorter one. Layers that share an input use the largest bit width that any of them asks for.

    Args:
        overrides: Pattern to bit widths, as in the recipe.
        layers: Every quantized layer.
        activations: Name of each quantized activation whose bit width may change, by edge.

    Raises:
        UsageError: A pattern has no effect, or two of them contradict each other.
    """
    used: set[tuple[str, str]] = set()

    def asked(name: str, key: str) -> int | None:
        found = {
            pattern: bits
            for pattern, override in overrides.items()
            if (bits := getattr(override, key)) is not None and fnmatchcase(name, pattern)
        }
        used.update((pattern, key) for pattern in found)
        ranks = {pattern: (pattern == name, len(pattern)) for pattern in found}
        best = [pattern for pattern in found if ranks[pattern] == max(ranks.values())]
        if len({found[pattern] for pattern in best}) > 1:
            msg = (
                f"quantization.overrides: {' and '.join(best)} give {name} different {key}; remove one of them, or add "
                f"an override for exactly {name}, which takes precedence"
            )
            raise UsageError(msg)
        return found[best[0]] if best else None

    result: dict[str, int] = {}
    read = {layer.input_edge for layer in layers}
    for layer in layers:
        bits = asked(layer.name, "weights")
        if bits is not None:
            result[layer.edge] = bits
        bits = None if layer.input_edge is None else asked(layer.name, "activations")
        if bits is not None and layer.input_edge is not None:
            result[layer.input_edge] = max(bits, result.get(layer.input_edge, 0))
    unread = {edge: name for edge, name in activations.items() if edge not in read}
    for edge, name in unread.items():
        bits = asked(name, "activations")
        if bits is not None:
            result[edge] = bits
    for pattern, override in overrides.items():
        for key in ("weights", "activations"):
            if getattr(override, key) is not None and (pattern, key) not in used:
                names = {layer.name for layer in layers} | (set(unread.values()) if key == "activations" else set())
                raise UsageError(_no_match(pattern, key, sorted(names)))
    return result


def in_float(asked: Mapping[str, Sequence[str]], targets: Sequence[str], names: Sequence[str]) -> set[str]:
    """Return the layers that `quantization.float_layers` keeps in float for any of a recipe's targets.

    Args:
        asked: Names and patterns of layers by target; the key `ALL` stands for all targets.
        targets: Targets of the recipe.
        names: Names of all layers that would be quantized.

    Raises:
        UsageError: A pattern matches no layer.
    """
    found: set[str] = set()
    for target in (ALL, *targets):
        for pattern in asked.get(target, ()):
            matching = {name for name in names if fnmatchcase(name, pattern)}
            if not matching:
                near = ", ".join(difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)) or "none"
                msg = f"quantization.float_layers: {pattern} matches no layer that is quantized; the nearest are {near}"
                raise UsageError(msg)
            found |= matching
    return found


def _no_match(pattern: str, key: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
    return f"quantization.overrides.{pattern}: matches no layer that has {key}; the nearest are {', '.join(near)}"
