"""Runs calibration, and the post-training steps that a recipe's `ptq` section switches on, in their order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from crqat.train.config import PTQConfig
from crqat.train.ptq import adaround, bias_correction, equalization
from crqat.train.ptq.walk import Layer, walk
from crqat.train.quantizers import calibration as ranges
from crqat.train.quantizers import quantizer_of, specs_of
from crqat.train.quantizers.finalize import make_representable

# Largest number of pixels over all images: all values of both networks that are still needed are in memory at once.
PIXELS = 1 << 22


def apply(
    model: fx.GraphModule,
    targets: Sequence[str],
    batches: Sequence[Tensor],
    calibration: str,
    config: PTQConfig,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[str]:
    """Calibrate a quantized network, and improve its rounding with unlabeled images.

    Args:
        model: Uncalibrated network in eval mode; it is changed in place, including its weights.
        targets: Names of the runtimes whose limits the scales must respect.
        batches: Normalized images, float32 of shape [N, C, H, W] each.
        calibration: "mse", "minmax" or "percentile"; see `crqat.train.config.QuantizationConfig.calibration`.
        config: Which steps are switched on.
        progress: Called with the task, the number of finished layers and their total.

    Returns:
        A description of each step, one line each.

    Raises:
        UsageError: A step does not support a weight's method, or a scale is larger than a target can store.
    """
    notes = []
    if config.equalization:
        count = equalization.equalize(model, list(batches))
        notes.append(f"cross-layer equalization of {count} pairs of layers")
    ranges.calibrate(model, batches, calibration)
    if not (config.adaround or config.bias_correction):
        return notes
    # Adaptive rounding rounds weights to the Grids that will be stored.
    make_representable(model, targets, trained=False)
    images = _first(batches)
    total = sum(spec.kind == "weight" for spec in specs_of(model))
    done = corrected = 0
    rounded: set[str] = set()
    for event in walk(model, images):
        if isinstance(event, Layer):
            spec = event.spec
            if config.adaround and adaround.can_round(event):
                shifts = config.bias_correction and bias_correction.place(model, event.node, spec.bn) is not None
                adaround.round_weight(event, quantizer_of(model, spec), centered=shifts)
                rounded.add(spec.edge)
            continue
        corrected += config.bias_correction and bias_correction.correct(model, event)
        done += 1
        if progress is not None:
            progress("post-training quantization", done, total)
    if config.adaround:
        notes.append(f"adaptive rounding of {len(rounded)} of {total} layers on {len(images)} images")
    if config.bias_correction:
        notes.append(f"bias correction of {corrected} of {total} layers on {len(images)} images")
    return notes


def _first(batches: Sequence[Tensor]) -> Tensor:
    """Return the images for the steps as one tensor of at most PIXELS pixels, but of at least two images.

    Batches whose images have another size than those of the first batch are left out.
    """
    height, width = batches[0].shape[2:]
    alike = [batch for batch in batches if batch.shape[1:] == batches[0].shape[1:]]
    return torch.cat(alike)[: max(2, PIXELS // (height * width))]
