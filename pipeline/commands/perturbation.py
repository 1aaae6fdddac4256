"""Robustness of trained networks to noise on inputs and weights, as tables and JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import click

from crqat.core.progress import Progress
from crqat.core.results.analysis import NoiseLevel, NoisyNetwork, Perturbation, PerturbationPayload, mean_and_deviation
from crqat.core.typed_json import read, text
from crqat.pipeline import console
from crqat.pipeline.recipe import recipe
from crqat.pipeline.report.html import NETWORKS, PERTURBATION


def measure(
    config: recipe.Recipe, runs: Path, out: Path, progress: Progress, draws: int, images: int | None
) -> PerturbationPayload:
    """Measure accuracy and loss of a run's networks under noise, and write them as JSON into `out`.

    Args:
        config: Recipe of the run, whose train stage must be finished.
        runs: Directory of all runs.
        out: Empty directory for the JSON file.
        progress: Callback for the progress over noise levels.
        draws: Number of random draws of the noise at each level.
        images: Largest number of validation images; None uses all.

    Returns:
        The numbers of images and draws, for the stage's manifest.
    """
    from crqat.export.analysis.perturbation import under_noise

    report = under_noise(
        runs / config.name / "train", recipe.train_config(config), config.name, progress, draws, images
    )
    (out / PERTURBATION).write_text(text(report))
    return PerturbationPayload(report.images, report.draws)


def show(directories: Sequence[Path]) -> None:
    """Print two tables that compare the runs in `directories`: under noise on the input, and on the weights."""
    reports = [
        read(Perturbation, directory / PERTURBATION, "run crqat sensitivity --perturbation again with --force")
        for directory in directories
    ]
    images = ", ".join(dict.fromkeys(f"{report.images}" for report in reports))
    about = f"validation images: {images}; mean ± standard deviation of {reports[0].draws} draws"
    _show_kind(f"noise on the input, standard deviation in units of normalized input; {about}", reports, _input_noise)
    _show_kind(f"noise on the weights, norm as a share of each layer's weight norm; {about}", reports, _weight_noise)
    click.echo(f"written: {', '.join(str(directory / PERTURBATION) for directory in directories)}")
    console.give(perturbation=reports)


def _input_noise(network: NoisyNetwork) -> list[NoiseLevel]:
    return network.input_noise


def _weight_noise(network: NoisyNetwork) -> list[NoiseLevel]:
    return network.weight_noise


def _show_kind(title: str, reports: Sequence[Perturbation], levels: Callable[[NoisyNetwork], list[NoiseLevel]]) -> None:
    rows = []
    for report in reports:
        for network in report.networks:
            accuracies = [_cell(level.accuracy, 100, 2) for level in levels(network)]
            losses = [_cell(level.loss, 1, 3) for level in levels(network)]
            rows.append([report.run, NETWORKS[network.network], "top-1 %", *accuracies])
            rows.append([report.run, NETWORKS[network.network], "loss", *losses])
    head = [f"{level.level:g}" for level in levels(reports[0].networks[0])]
    console.show_table(title, ["run", "network", "measure", *head], rows)


def _cell(values: list[float], factor: float, digits: int) -> str:
    mean, deviation = mean_and_deviation([factor * value for value in values])
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(values) > 1 else "")
