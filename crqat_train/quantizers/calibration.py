"""Calibrates: sets each quantizer's initial range from the values that it receives in the float network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from crqat.train import distributed
from crqat.train.graph.operations import parameter
from crqat.train.placement.insert import weight_node
from crqat.train.placement.quantizer_spec import QuantizerSpec
from crqat.train.quantizers import ActivationObserver, calibrate_weight, quantizer_of, specs_of

Hook = Callable[[Any, tuple[Tensor], Tensor], Tensor | None]


@contextmanager
def hooked(model: fx.GraphModule, hooks: Iterable[tuple[QuantizerSpec, Hook]]) -> Iterator[None]:
    """Within the context, call each quantizer's hook with the quantizer, its input and its output.

    A hook's result replaces the output unless it is None.
    """
    handles = [quantizer_of(model, spec).register_forward_hook(hook) for spec, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pass_through(x: Tensor) -> Tensor:
    return x


@contextmanager
def only(model: fx.GraphModule, active: Sequence[QuantizerSpec]) -> Iterator[None]:
    """Within the context, only the active quantizers quantize; all others return their input and compute nothing."""
    idle = [quantizer_of(model, spec) for spec in specs_of(model) if spec not in active]
    before = [vars(quantizer).get("forward") for quantizer in idle]
    for quantizer in idle:
        quantizer.forward = _pass_through  # type: ignore[method-assign]
    try:
        yield
    finally:
        for quantizer, forward in zip(idle, before, strict=True):
            del quantizer.forward
            if forward is not None:
                quantizer.forward = forward  # type: ignore[method-assign]


def _layout(model: fx.GraphModule, image: Tensor) -> torch.memory_format:
    """Return channels last, which is faster for convolutions, unless the network's views do not support it."""
    if image.ndim != 4:
        return torch.contiguous_format
    try:
        model(image.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        return torch.contiguous_format
    return torch.channels_last


@torch.no_grad()
def observe(model: fx.GraphModule, batches: Iterable[Tensor]) -> dict[str, ActivationObserver]:
    """Run the float network on images, and return an observer of each quantized activation's values, by edge.

    Each observer holds a histogram, summed over all ranks.

    Args:
        model: Quantized network in eval mode.
        batches: Normalized images, float32 of shape [N, C, H, W] each.
    """
    specs = specs_of(model)
    observers = {spec.edge: ActivationObserver() for spec in specs if spec.kind == "activation"}

    def look_at(spec: QuantizerSpec) -> Hook:
        def look(_: nn.Module, inputs: tuple[Tensor], __: Tensor) -> None:
            observers[spec.edge].update(inputs[0])

        return look

    looks = [(spec, look_at(spec)) for spec in specs if spec.kind == "activation"]
    layout = None
    with only(model, []):
        for batch in batches:
            own = distributed.share(batch)
            if len(own):
                # Tried with two images: a view of one may fit any layout.
                layout = layout or _layout(model, own[:2])
                with hooked(model, looks):
                    model(own.contiguous(memory_format=layout))
    for observer in observers.values():
        observer.reduce()
    return observers


@torch.no_grad()
def calibrate(model: fx.GraphModule, batches: Iterable[Tensor], calibration: str = "mse") -> None:
    """Set the initial range of every quantizer from training images.

    Args:
        model: Quantized network in eval mode.
        batches: Normalized training images, float32 of shape [N, C, H, W] each.
        calibration: "mse", "minmax" or "percentile"; see `crqat.train.config.QuantizationConfig`.
    """
    observers = observe(model, batches)
    for spec in specs_of(model):
        if spec.kind == "activation":
            observers[spec.edge].calibrate(quantizer_of(model, spec), calibration)
        else:
            calibrate_weight(quantizer_of(model, spec), weight_of(model, spec), calibration)


def weight_of(model: fx.GraphModule, spec: QuantizerSpec) -> Tensor:
    """Return the float tensor that a weight's quantizer quantizes."""
    return parameter(model, weight_node(model, spec))


def rounded_weights(model: fx.GraphModule) -> dict[str, npt.NDArray[np.float32]]:
    """Return the values that each weight's Grid rounds, by edge: the latent weight, or its transform by the method."""
    weights = [spec for spec in specs_of(model) if spec.kind == "weight"]
    return {s.edge: quantizer_of(model, s).values(weight_of(model, s)).detach().numpy() for s in weights}
