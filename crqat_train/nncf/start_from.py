"""Starts CR-QAT from a network quantized by NNCF: takes its float weights, and its ranges instead of calibration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, fx

from crqat.core import targets as runtimes
from crqat.core.errors import UsageError
from crqat.core.progress import Progress
from crqat.train.config import TrainConfig
from crqat.train.data import sources
from crqat.train.models import build as models
from crqat.train.nncf.checkpoint import Checkpoint, NNCFQuantizer, read
from crqat.train.placement.quantizer_spec import QuantizerSpec
from crqat.train.quantized_model import quantize_model
from crqat.train.quantizers import MIN_SCALE, Quantizer, quantizer_maker, quantizer_of, specs_of

# kept: same scale and zero point. rescaled: same range in other codes. calibrated: the checkpoint has no range for the
# edge. dropped: the checkpoint quantizes an edge that the targets leave in float.
Outcome = Literal["kept", "rescaled", "calibrated", "dropped"]


@dataclass(frozen=True)
class Edge:
    """Where one quantized edge gets its range from: an NNCF checkpoint or calibration.

    Attributes:
        name: Name of the edge.
        outcome: "kept": the checkpoint's scale and zero point; "rescaled": the checkpoint's range in other codes;
            "calibrated": the checkpoint has no range for the edge; "dropped": the checkpoint quantizes the edge, but
            the targets leave it in float.
        note: Why the checkpoint's range is not used unchanged; empty if it is.
    """

    name: str
    outcome: Outcome
    note: str = ""


@torch.no_grad()
def take_ranges(student: fx.GraphModule, checkpoint: Checkpoint, targets: Sequence[str]) -> list[Edge]:
    """Set the quantizers' ranges from a checkpoint; quantizers that it lacks keep their calibrated range.

    Args:
        student: The quantized GraphModule, calibrated.
        checkpoint: Checkpoint of the same network.
        targets: Targets of the recipe.

    Returns:
        One entry per quantizer of the student, which names where its range comes from; then one entry per quantizer
        that only the checkpoint has.

    Raises:
        UsageError: A zero point is not 0 where the quantizer or the target requires 0.
    """
    specs = specs_of(student)
    by_hook = {hook: quantizer for quantizer in checkpoint.quantizers for hook in quantizer.hooks}
    edges = []
    for spec in specs:
        found = next((by_hook[hook] for hook in spec.hooks if hook in by_hook), None)
        edges.append(_take(quantizer_of(student, spec), spec, found, targets))
    ours = {hook for spec in specs for hook in spec.hooks}
    dropped = [quantizer for quantizer in checkpoint.quantizers if not ours.intersection(quantizer.hooks)]
    return edges + [Edge(quantizer.hooks[0], "dropped", "the targets leave it in float") for quantizer in dropped]


def _take(quantizer: Quantizer, spec: QuantizerSpec, found: NNCFQuantizer | None, targets: Sequence[str]) -> Edge:
    if found is None:
        return Edge(spec.edge, "calibrated", "the checkpoint has no quantizer here")
    per_channel = max(found.shape) if len(found.shape) > 1 else None
    if per_channel not in (None, spec.channels):
        own = f"per channel ({spec.channels})" if spec.channels else "per tensor"
        note = f"the checkpoint's scale is per channel ({per_channel}), and the scale here is {own}"
        return Edge(spec.edge, "calibrated", note)
    grid = found.grid()
    step = torch.from_numpy(grid.scale.copy()).to(quantizer.scale.device)
    codes = f"{grid.qmin} to {grid.qmax} in the checkpoint, {spec.qmin} to {spec.qmax} here"
    point = f"zero point {grid.zero_point}"
    refusing = runtimes.union(targets).without_zero_points
    if grid.zero_point != 0 and (spec.kind == "weight" or refusing is not None):
        why = "a weight" if spec.kind == "weight" or refusing is None else refusing.title
        others = ", ".join(target.name for target in runtimes.TARGETS.values() if target.zero_points)
        msg = f"{spec.edge}: {point}, and {why} supports only 0; quantize with nncf's preset PERFORMANCE"
        raise UsageError(msg + ("" if spec.kind == "weight" else f", or set targets: [{others}]"))
    if quantizer.asymmetric:
        low, high = (float(step * (code - grid.zero_point)) for code in (grid.qmin, grid.qmax))
        quantizer.set_range(low, high)
        if grid.qmax - grid.qmin == spec.qmax - spec.qmin:
            return _set(quantizer, spec, step, "kept", "")  # the range's own division may be a unit off
        return Edge(spec.edge, "rescaled", f"codes {codes}")
    if grid.zero_point != 0:
        low, high = grid.qmin - grid.zero_point, grid.qmax - grid.zero_point
        below = -low / -spec.qmin if spec.qmin else 0.0
        note = f"{point} in the checkpoint, 0 here; codes {codes}"
        return _set(quantizer, spec, step * max(high / spec.qmax, below), "rescaled", note)
    if grid.qmax == spec.qmax:
        # A weight's narrow range may get one code more, a tensor without negative values needs none of them.
        return _set(quantizer, spec, step, "kept", "")
    return _set(quantizer, spec, step * (grid.qmax / spec.qmax), "rescaled", f"codes {codes}")


def _set(quantizer: Quantizer, spec: QuantizerSpec, step: Tensor, outcome: Outcome, note: str) -> Edge:
    shape = quantizer.scale.shape
    quantizer.scale.copy_(step.clamp_min(MIN_SCALE).expand(quantizer.scale.numel()).reshape(shape))
    return Edge(spec.edge, outcome, note)


def check(path: Path, config: TrainConfig, progress: Progress) -> tuple[Checkpoint, list[Edge]]:
    """Read an NNCF checkpoint and report what a recipe's training takes from it.

    Args:
        path: Path of the checkpoint; see `crqat.train.nncf.checkpoint.read`.
        config: The recipe's training configuration.
        progress: Reports loading the data set, which determines the number of classes and the input's shape.

    Returns:
        The checkpoint, and an entry for each edge; see `take_ranges`.

    Raises:
        UsageError: The checkpoint is of another network than the recipe's; or see `take_ranges`.
    """
    checkpoint = read(path)
    dataset = sources.of_recipe(config.data, progress)
    shape = dataset.train_images.shape[1:]
    model = models.build(config.model.name, len(dataset.class_names), shape[0])
    models.fill(model, checkpoint.weights, str(path))
    make = quantizer_maker(config.quantization)
    student = quantize_model(model.eval(), torch.zeros(2, *shape), config.quantization, config.targets, make)
    return checkpoint, take_ranges(student, checkpoint, config.targets)


def usual_bits(checkpoint: Checkpoint) -> tuple[int, int]:
    """Return the most frequent bit width of the weights, and that of the activations, in an NNCF checkpoint."""
    weights = Counter(q.bits for q in checkpoint.quantizers if q.hooks[0].startswith("pre_hooks.") and len(q.shape) > 1)
    others = Counter(q.bits for q in checkpoint.quantizers)
    others.subtract(weights)
    return tuple(c.most_common(1)[0][0] if any(c.values()) else 8 for c in (weights, others))  # type: ignore[return-value]


def summary(edges: Sequence[Edge]) -> str:
    """Return one line with the number of edges for each outcome, such as "kept" or "calibrated"."""
    counts = Counter(edge.outcome for edge in edges)
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("kept", "rescaled", "calibrated", "dropped"))
