"""What a quantizer is: its edge, bit width, codes, and what it belongs to."""

from __future__ import annotations

import re
from dataclasses import dataclass

from crqat.core import targets as runtimes


@dataclass(frozen=True)
class QuantizerSpec:
    """One quantizer of the layout.

    Attributes:
        edge: Its name: the first of its NNCF hook names.
        hooks: All hook names that share it, sorted.
        kind: "weight" or "activation".
        bits: Bit width asked for, after the targets' constraints.
        qmin: Smallest code.
        qmax: Largest code.
        channels: Length of a per-channel scale, None for per tensor.
        ndim: Dimensions of the quantized tensor.
        input_edge: For a weight, the edge of the activation that it meets.
        bn: For a weight, the name of the BatchNorm that the convolution folds, None if there is none.
        reason: Why the bit width differs from the recipe's, empty if it does not.
        axis: Of the channels of a per-channel scale: 1 for a transposed convolution, whose weight has the shape
            [in channels, out channels, ...], else 0.
    """

    edge: str
    hooks: tuple[str, ...]
    kind: str
    bits: int
    qmin: int
    qmax: int
    channels: int | None
    ndim: int
    input_edge: str | None = None
    bn: str | None = None
    reason: str = ""
    axis: int = 0

    @property
    def module_name(self) -> str:
        """A Python identifier for the quantizer inside the GraphModule."""
        return re.sub(r"\W", "_", self.edge)

    @property
    def operation(self) -> str:
        """The module path or operation that the edge belongs to, for people: "layer1.0.conv1"."""
        return operation_of(self.edge)


def operation_of(edge: str) -> str:
    """The module path or operation that an edge belongs to, for people."""
    name = edge.split(".", 1)[1].rsplit("__", 1)[0]
    return ".".join(name.split("/")[:-2]) or name


def codes_at(spec: QuantizerSpec, bits: int) -> tuple[int, int]:
    """Smallest and largest code of a quantizer at another bit width than its own, whatever the targets say of it."""
    if bits == spec.bits:
        return spec.qmin, spec.qmax
    if spec.kind == "weight":
        return runtimes.weight_codes(bits)
    return runtimes.activation_codes(bits, spec.qmin == 0)
