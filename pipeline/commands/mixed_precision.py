"""The `sensitivity` command: sensitivity of each layer to fewer bits, and a proposed mixed bit-width recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import yaml

from crqat.core.progress import Progress
from crqat.core.results.analysis import (
    AverageBits,
    Divergence,
    LayerSensitivity,
    Sensitivity,
    SensitivityPayload,
    Uniform,
)
from crqat.core.typed_json import read, text
from crqat.pipeline import console
from crqat.pipeline.recipe import recipe
from crqat.train.config import DataConfig, ModelConfig, Override

JSON, PICTURE, RECIPE = "sensitivity.json", "sensitivity.png", "recipe.yaml"


def measure(
    config: recipe.Recipe, runs: Path, out: Path, progress: Progress, average_bits: float, images: int
) -> SensitivityPayload:
    """Measure each layer's sensitivity and write table, picture and proposed recipe into `out`.

    Args:
        config: Recipe of the run, whose train stage must be finished.
        runs: Directory of all runs.
        out: Empty directory for the files.
        progress: Callback for the progress over layers.
        average_bits: Largest mean bit width over all weights.
        images: Number of calibration images on which quantized and float outputs are compared.

    Returns:
        The mean bit widths and divergences, for the stage's manifest.
    """
    from crqat.export.analysis.bit_allocation import allocate, mean_bits
    from crqat.export.analysis.bit_width_cost import WIDTHS, Divergences

    network = Divergences(runs / config.name / "train", recipe.train_config(config), images)
    layers = network.one_layer_at_a_time(progress)
    bits = allocate(layers, average_bits)
    uniform = max(width for width in WIDTHS if width <= average_bits)
    report = Sensitivity(
        run=config.name,
        images=network.images,
        average_bits=AverageBits(average_bits, mean_bits(layers, bits)),
        divergence=Divergence(
            sum=sum(layer.divergence[bits[layer.layer]] for layer in layers),
            together=network.together(bits),
            uniform=Uniform(uniform, network.together(dict.fromkeys(bits, uniform))),
        ),
        layers=[
            LayerSensitivity(
                layer.layer, layer.weights, {str(width): cost for width, cost in layer.divergence.items()},
                bits[layer.layer],
            )
            for layer in layers
        ],
    )  # fmt: skip
    (out / JSON).write_text(text(report))
    _draw(out / PICTURE, report.layers)
    (out / RECIPE).write_text(_recipe(config, runs, bits, report))
    return SensitivityPayload(report.average_bits, report.divergence)


def show(directory: Path) -> None:
    """Print a table of the layers' sensitivities on stdout, then their sums and the files' names in `directory`."""
    report = read(Sensitivity, directory / JSON, "run crqat sensitivity again with --force")
    layers, asked = report.layers, report.average_bits
    widths = list(layers[0].divergence)
    rows = []
    for row in layers:
        cells = [f"{row.divergence[width]:.2e}" for width in widths]
        rows.append([row.layer, str(row.weights), *cells, str(row.bits)])
    title = f"{report.run}: KL divergence from the float network, one layer at a time; images: {report.images}"
    console.show_table(title, ["layer", "weights", *(f"{width} bits" for width in widths), "proposed"], rows)
    divergence, uniform = report.divergence, report.divergence.uniform
    click.echo(f"mean bit width of the weights: {asked.proposed:.3f} bits proposed, {asked.asked:g} allowed")
    click.echo(
        f"KL divergence with all layers at their proposed bits: {divergence.together:.4f} (sum over single layers "
        f"{divergence.sum:.4f}); with {uniform.bits} bits in every layer: {uniform.together:.4f}"
    )
    click.echo(f"written: {', '.join(str(directory / name) for name in (JSON, PICTURE, RECIPE))}")
    click.echo(f"next: crqat run {directory / RECIPE}")
    console.give(sensitivity=report, recipe=str(directory / RECIPE))


def _recipe(config: recipe.Recipe, runs: Path, bits: Mapping[str, int], report: Sensitivity) -> str:
    """Return the run's recipe with the proposed bit widths and the same float weights, without default values."""
    overrides = {name: Override(weights=width, activations=width) for name, width in bits.items()}
    model, float_training = config.model, config.float_training
    if model.weights in (None, "pretrained"):
        model, float_training = replace(model, weights=str(runs / config.name / "train" / "float.safetensors")), None
    proposed = replace(
        config,
        name=f"{config.name[:94]}-mixed",
        model=model,
        float_training=float_training,
        quantization=replace(config.quantization, overrides=overrides),
    )
    base = recipe.Recipe(config.name, DataConfig(config.data.source), ModelConfig(config.model.name))
    values, usual = recipe.resolved(proposed), recipe.resolved(base)
    mean, divergence, uniform = report.average_bits.proposed, report.divergence, report.divergence.uniform
    lines = [
        f"# Proposed by crqat sensitivity of the run {config.name}: {mean:.3f} bits a weight on average.",
        f"# KL divergence from the float network on {report.images} calibration images, without training:",
        f"# {divergence.together:.4f}; with {uniform.bits} bits in every layer {uniform.together:.4f}.",
    ]
    return (
        "\n".join(lines)
        + "\n"
        + yaml.safe_dump(changed(values, usual), sort_keys=False, default_flow_style=None, width=120)
    )


def changed(values: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a recipe's `values` that differ from the defaults `usual`.

    "name", "data", "model" and "source" are returned even if they do not differ.
    """
    result: dict[str, Any] = {}
    for key, value in values.items():
        if value != usual[key] or key in ("name", "data", "model", "source"):
            section = isinstance(value, dict) and isinstance(usual[key], dict) and key != "overrides"
            result[key] = changed(value, usual[key]) if section else value
    return result


def _draw(path: Path, layers: Sequence[LayerSensitivity]) -> None:
    """Draw the KL divergence of each layer (x) at each bit width (y) as a colour; mark the proposed bit widths."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    widths = list(layers[0].divergence)
    values = np.array([[row.divergence[width] for row in layers] for width in widths])
    # Rounding turns a divergence of 0 into a tiny number of either sign.
    logarithms = np.log10(np.maximum(values, 1e-7))
    figure = Figure(figsize=(max(6.4, 1.5 + 0.28 * len(layers)), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(logarithms, aspect="auto", cmap="viridis", origin="lower")
    chosen = [widths.index(str(row.bits)) for row in layers]
    axes.plot(range(len(layers)), chosen, "o", color="white", markeredgecolor="black", label="proposed")
    axes.set_yticks(range(len(widths)), [f"{width} bits" for width in widths])
    axes.set_xticks(range(len(layers)), [row.layer for row in layers], rotation=90, fontsize=8)
    figure.colorbar(image, label="log10 of the KL divergence")
    axes.legend(loc="upper left", bbox_to_anchor=(0, 1.16), frameon=False)
    figure.savefig(path, dpi=120)
