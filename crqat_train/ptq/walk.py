"""Runs a quantized network and its float twin side by side, operation by operation, on the same images."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from crqat.train.graph.operations import is_matmul, parameter
from crqat.train.placement.quantizer_spec import QuantizerSpec
from crqat.train.quantizers import specs_of
from crqat.train.quantizers.calibration import only


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer with a quantized weight, just before it runs.

    Attributes:
        node: The layer's operation in the quantized network's graph.
        spec: Spec of its weight's quantizer.
        weight: The latent weight; corrections change it in place.
        inputs: The layer's inputs of shape [N, ...]: in the float network and in the quantized one.
    """

    node: fx.Node
    spec: QuantizerSpec
    weight: Tensor
    inputs: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Output:
    """A layer after it has run, with its outputs in the float network and in the quantized one."""

    layer: Layer
    outputs: tuple[Tensor, Tensor]


class _Steps(fx.Interpreter):
    """Runs one node after another and keeps values that later nodes need."""

    def begin(self, images: Tensor) -> None:
        self.args_iter = iter((images,))

    def step(self, node: fx.Node) -> Any:
        self.env[node] = value = self.run_node(node)
        for used in self.user_to_last_uses.get(node, ()):
            del self.env[used]
        return value


def walk(model: fx.GraphModule, images: Tensor) -> Iterator[Layer | Output]:
    """Run both networks over all images in the order of the graph, so that the caller can change each layer.

    Each layer is yielded twice: before it runs, as `Layer`, and after it has run, as `Output`. Its inputs are computed
    with the changed weights of the layers before it. A layer that is called a second time is not yielded again.

    Args:
        model: Quantized and calibrated, in eval mode. The float twin takes its present weights.
        images: Normalized, float32 of shape [N, C, H, W]. Memory holds all values of both networks that later
            operations need.
    """
    twin = copy.deepcopy(model)
    floats, quantized = _Steps(twin), _Steps(model)
    floats.begin(images)
    quantized.begin(images)
    of_weight = {f"quantizers.{spec.module_name}": spec for spec in specs_of(model) if spec.kind == "weight"}
    told: set[str] = set()
    with torch.no_grad(), only(twin, []):
        for node, its_twin in zip(model.graph.nodes, twin.graph.nodes, strict=True):
            layer = _layer(model, node, of_weight, quantized, told)
            if layer is not None:
                source, before = node.args[0], its_twin.args[0]
                found = Layer(node, *layer, (floats.env[before], quantized.env[source]))
                yield found
                # The weight was rounded before it was changed, so it is rounded again.
                rounding = node.args[1]
                for again in (rounding.args[0], rounding):
                    quantized.env[again] = quantized.run_node(again)
            outputs = floats.step(its_twin), quantized.step(node)
            if layer is not None:
                yield Output(found, outputs)


def _layer(
    model: fx.GraphModule, node: fx.Node, of_weight: dict[str, QuantizerSpec], quantized: _Steps, told: set[str]
) -> tuple[QuantizerSpec, Tensor] | None:
    """Return spec and weight of a layer that can be corrected; None for any other node."""
    if not is_matmul(node) or len(node.args) < 2:
        return None
    source, weight = node.args[:2]
    if not isinstance(weight, fx.Node) or not isinstance(source, fx.Node):
        return None
    spec = of_weight.get(str(weight.target))
    stored = weight.args[0] if spec is not None else None
    if spec is None or not isinstance(stored, fx.Node) or spec.edge in told or source not in quantized.env:
        return None
    told.add(spec.edge)
    return spec, parameter(model, stored)
