"""Functions that the commands for stages share: run a stage, print its results, and apply the gate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from crqat.core import failures

if TYPE_CHECKING:
    from crqat.core.results.training import TrainingPayload
    from crqat.core.results.verdict import Verdict
    from crqat.pipeline.recipe.recipe import Recipe

# A drop that surely exceeds so many percentage points is reported even if nothing is judged.
_LARGE_DROP = 10.0
_VERDICTS = {0: "pass", 1: "fail", 3: "error", 4: "inconclusive"}


def run_stage(stage: str, config: Recipe, runs: Path, force: bool, **further: Any) -> Path:
    """Run one stage of a recipe unless it is up to date, and return its directory."""
    from crqat.pipeline import console
    from crqat.pipeline.stages import lock
    from crqat.pipeline.stages import run as stages

    run = runs / config.name
    with failures.explained(stage, run), lock.hold(run), console.show_progress() as progress:
        directory: Path = getattr(stages, stage)(config, runs, force, progress, **further)
    return directory


def train_stage(config: Recipe, runs: Path, force: bool, **further: Any) -> TrainingPayload:
    """Run the `train` stage unless it is up to date, and return its results from its manifest."""
    from crqat.core.results.training import TrainingPayload
    from crqat.core.run_directory import payload_of, read_manifest
    from crqat.pipeline import console

    directory = run_stage("train", config, runs, force, **further)
    payload = payload_of(TrainingPayload, directory, read_manifest(directory))
    console.give(run=str(runs / config.name), training=payload)
    return payload


def show_warnings(trained: TrainingPayload) -> None:
    """Print the warnings of a training run on stdout, and the notes that explain its accuracy or bit widths."""
    for warning in trained.warnings:
        click.echo(f"warning: {warning}")
    answers = [note for note in trained.notes if note.startswith("the labels are the answers")]
    for note in answers + _fewer_bits(trained.notes):
        click.echo(f"note: {note}")


def _fewer_bits(notes: Sequence[str]) -> list[str]:
    """Return a line for each reason why layers have other bit widths than the recipe asks for.

    Each line names one layer, the number of other layers with the same reason, and the reason.
    """
    layers: dict[str, list[str]] = {}
    for note in notes:
        layer, _, reason = note.partition(": ")
        if reason.partition(" ")[2].startswith("bits: "):
            layers.setdefault(reason, []).append(layer)
    lines = []
    for reason, names in layers.items():
        others = f" and {len(names) - 1} more layers" if len(names) > 1 else ""
        lines.append(f"{names[0]}{others}: {reason}")
    return lines


def show_results(config: Recipe, runs: Path, stage: str = "benchmark") -> None:
    """Print the benchmark results of a run on stdout; `stage` names the stage directory that holds them."""
    from crqat.core.results.benchmark import read_results
    from crqat.pipeline import console
    from crqat.pipeline.report import tables as results
    from crqat.pipeline.stages import run as stages

    path = runs / config.name / stage / stages.RESULTS
    with failures.explained("benchmark", runs / config.name):
        found = read_results(path)
        results.show(found, path.parent)
    names = (stages.RESULTS, stages.VERDICT, stages.JUNIT, stages.REPORT)
    files = {name.partition(".")[0]: str(path.parent / name) for name in names}
    console.give(run=str(runs / config.name), results=found, files=files)


def warn_of_failures(config: Recipe, runs: Path) -> None:
    """Apply the gate to a run and print each failed rule, and each large accuracy drop, as a warning.

    The exit code of the command is not affected.
    """
    from crqat.core.results.benchmark import read_results
    from crqat.pipeline import console
    from crqat.pipeline.stages import run as stages

    for verdict in stages.gate(config, runs):
        if verdict.status == "fail":
            click.echo(console.printable(f"warning: {verdict.file}: {verdict.rule}: {verdict.message}"))
    for name, model in read_results(runs / config.name / "benchmark" / stages.RESULTS).models.items():
        if model.versus_float is not None and model.versus_float.drop_interval_points[0] > _LARGE_DROP:
            drop, (low, high) = model.versus_float.drop_points, model.versus_float.drop_interval_points
            click.echo(
                f"warning: {console.printable(name)}: the accuracy drop is {drop:.2f} [{low:.2f}, {high:.2f}] points; "
                "--advise --max-drop POINTS looks for a step that loses less"
            )


def judge_run(config: Recipe, runs: Path, stage: str = "benchmark", baseline: Path | None = None) -> int:
    """Apply the gate to the benchmark results of a run, print each rule's verdict, and return the exit code."""
    from crqat.pipeline import console
    from crqat.pipeline.gate import rules
    from crqat.pipeline.report import tables as results
    from crqat.pipeline.stages import run as stages

    with failures.explained("gate", runs / config.name):
        verdicts: list[Verdict] = stages.gate(config, runs, stage, baseline)
    results.show_verdicts(verdicts)
    code = rules.exit_code(verdicts)
    console.give(run=str(runs / config.name), verdict=_VERDICTS[code], exit_code=code, rules=verdicts)
    return code
