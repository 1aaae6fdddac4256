"""Spec of a quantizer: its edge, bit width, code range, and the operation that it belongs to."""

from __future__ import annotations

import re
from dataclasses import dataclass

from crqat.core import targets as runtimes


@dataclass(frozen=True)
class QuantizerSpec:
    """Edge, code range and bit width of one quantizer.

    Attributes:
        edge: Name of the edge: the first of its NNCF hook names.
        hooks: All hook names that share the quantizer, sorted.
        kind: "weight" or "activation".
        bits: Bit width within the targets' constraints.
        qmin: Smallest code.
        qmax: Largest code.
        channels: Length of a per-channel scale; None for per tensor.
        ndim: Dimensions of the quantized tensor.
        input_edge: For a weight, the edge of the activation that it is multiplied with.
        bn: For a weight, the name of the BatchNorm that is folded into the convolution; None if there is none.
        reason: Why the bit width differs from that in the recipe; empty if they are equal.
        axis: Axis of the channels of a per-channel scale: 1 for a transposed convolution, whose weight has the shape
            [in channels, out channels, ...], otherwise 0.
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
        """Return a Python identifier for the quantizer inside the GraphModule."""
        return re.sub(r"\W", "_", self.edge)

    @property
    def operation(self) -> str:
        """Return the module path or operation of the edge, for people: "layer1.0.conv1"."""
        return operation_of(self.edge)


def operation_of(edge: str) -> str:
    """Return the module path or operation that an edge belongs to, for people."""
    name = edge.split(".", 1)[1].rsplit("__", 1)[0]
    return ".".join(name.split("/")[:-2]) or name


def codes_at(spec: QuantizerSpec, bits: int) -> tuple[int, int]:
    """Return the smallest and largest code of a quantizer at another bit width, ignoring the targets' limits."""
    if bits == spec.bits:
        return spec.qmin, spec.qmax
    if spec.kind == "weight":
        return runtimes.weight_codes(bits)
    return runtimes.activation_codes(bits, spec.qmin == 0)
