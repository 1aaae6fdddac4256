"""The expert tools: engines, NNCF, networks, scaling, studies and sensitivity. See `crqat.pipeline.cli`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from crqat.core.errors import ToolError, UsageError
from crqat.pipeline import console
from crqat.pipeline.cli_options import force_option, json_option, load, recipe_arguments
from crqat.pipeline.cli_stages import run_stage

if TYPE_CHECKING:
    from crqat.pipeline.recipe.recipe import Recipe


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--batch", type=click.IntRange(min=1), help="Build for this batch size only. Default: from 1 to 64.")
@click.option("--compute-capability", "targets", multiple=True, metavar="SM89", help="Build for this GPU; repeatable.")
@click.option("--bisect", is_flag=True, help="If the build fails, write the smallest part of the file that fails too.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the report here, as JSON.")
@json_option
def inspect(path: Path, batch: int | None, targets: tuple[str, ...], bisect: bool, out: Path | None) -> None:
    """Show the TensorRT layers of an .onnx file's engine, or of an engine.json."""
    from crqat.pipeline.commands import inspect_engine
    from crqat.runtime_eval.trt.engine import EngineOptions

    batches = EngineOptions.batch if batch is None else (batch, batch, batch)
    inspect_engine.inspect(path, EngineOptions(batch=batches, compute_capabilities=targets), bisect, out)


@click.group()
def nncf() -> None:
    """Exchange checkpoints with stock NNCF."""


@nncf.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--candidate",
    type=click.Choice(["best", "student", "teacher", "calibrated"]),
    default="best",
    help="Network to export. Default: best.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write. Default: NAME-nncf.")
@json_option
def nncf_export(run: Path, candidate: str, out: Path | None) -> None:
    """Write a finished training run as a state dict and a configuration that stock NNCF loads."""
    from crqat.pipeline.commands import nncf as checkpoints

    checkpoints.export(run, candidate, out)


@nncf.command("import")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--recipe", "recipe", type=click.Path(path_type=Path), required=True, help="Recipe of the same network.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a recipe's value: --set qat.epochs=3"
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write. Default: NAME-start.")
@json_option
def nncf_import(checkpoint: Path, recipe: Path, overrides: tuple[str, ...], out: Path | None) -> None:
    """Convert a network that nncf.quantize has quantized into the start of a training."""
    from crqat.pipeline.commands import nncf as checkpoints

    with console.show_progress() as progress:
        checkpoints.take(checkpoint, recipe, load(recipe, overrides), out, progress)


@click.command()
@click.argument("names", metavar="[NAMES]...", nargs=-1)
@click.option("--cifar10", type=click.Path(path_type=Path), help="Folder of CIFAR-10. Default: noise images.")
@click.option("--size", type=click.IntRange(min=32), default=224, help="Height and width of the images. Default: 224.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Write the table to this file, as Markdown. Default: only show it."
)
@click.option("--force", is_flag=True, help="Replace a file that this command did not write.")
@click.option("--channels", type=click.Choice(["1", "3"]), default="3", help="Channels; 1 is grey. Default: 3.")
@click.option("--engines/--no-engines", default=True, help="Build TensorRT engines too. Default: --engines.")
@click.option(
    "--resume", is_flag=True, help="Skip networks that the --out file already has rows of, for the same images."
)
@click.option(
    "--limit",
    type=click.FloatRange(min=0, min_open=True),
    default=1800.0,
    help="Time limit for each network, in seconds. Default: 1800.",
)
@json_option
def models(
    names: tuple[str, ...],
    cifar10: Path | None,
    size: int,
    out: Path | None,
    force: bool,
    channels: str,
    engines: bool,
    resume: bool,
    limit: float,
) -> int:
    """Run networks through all stages; report quantizers, verification and INT8 share; exit 1 on failure."""
    from crqat.pipeline.commands import model_survey

    return model_survey.run(names, cifar10, size, out, force, int(channels), engines, not resume, limit)


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a recipe's value.")
@click.option(
    "--processes", multiple=True, type=click.IntRange(min=1), metavar="N", help="Predict for N processes; repeatable."
)
@click.option("--bandwidth", type=float, metavar="B/S", help="Bandwidth between machines, in bytes per second.")
@click.option("--latency", type=float, metavar="S", help="Latency between machines, in seconds per message.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("scale.json"),
    help="JSON file to write. Default: scale.json.",
)
@json_option
def scale(
    recipe: Path,
    overrides: tuple[str, ...],
    processes: tuple[int, ...],
    bandwidth: float | None,
    latency: float | None,
    out: Path,
) -> None:
    """Measure the time of a training step on this machine, and predict it for more processes."""
    from crqat.pipeline.commands import scale as scaling

    scaling.scale(load(recipe, overrides), processes, bandwidth, latency, out)


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a recipe's value in all runs.")
@click.option("--methods", default="", help="Methods, separated by commas. Default: all.")
@click.option("--seeds", default="0", help="Seeds, separated by commas. Default: 0.")
@click.option("--labels", default="", help="Numbers of labeled images, such as 500,all. Default: the recipe's.")
@click.option("--bits", default="", help="Bit widths, each for weights and activations: 8,4. Default: the recipe's.")
@click.option(
    "--equal",
    type=click.Choice(["steps", "time"]),
    default="steps",
    help="Give all methods equally many steps, or about equal time. Default: steps.",
)
@click.option("--jobs", type=click.IntRange(1), default=None, help="Parallel training runs. Default: one per core.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="Markdown file to write. Default: studies/NAME.md."
)
@click.option(
    "--runs", type=click.Path(path_type=Path), default=None, help="Directory of the runs. Default: runs/study-NAME."
)
@json_option
def study(
    recipe: Path,
    overrides: tuple[str, ...],
    methods: str,
    seeds: str,
    labels: str,
    bits: str,
    equal: str,
    jobs: int | None,
    out: Path | None,
    runs: Path | None,
) -> None:
    """Compare training methods on one recipe, over several seeds, with the necessary controls.

    The same command resumes where it was stopped: it repeats no run whose results are in the JSON file next to OUT.
    """
    from crqat.pipeline.study import report, runner
    from crqat.pipeline.study import study as studies

    config = load(recipe, overrides)
    out, runs = out or Path("studies") / f"{config.name}.md", runs or Path("runs") / f"study-{config.name}"
    chosen = studies.load(recipe, overrides, out, runs)
    counts = _numbers(labels, "--labels") if labels else [config.data.labeled]
    widths = _numbers(bits, "--bits") if bits else [None]
    wanted = tuple(filter(None, (method.strip() for method in methods.split(","))))
    plan = chosen.plan(wanted, [seed or 0 for seed in _numbers(seeds, "--seeds")], counts, widths, equal)
    with console.show_progress() as progress:
        failed = runner.run(chosen, plan, jobs or len(os.sched_getaffinity(0)), progress)
    for cell, rows in report.cells(chosen.rows).items():
        console.show_table(report.title(cell), report.COLUMNS, report.table(rows))
        if headline := report.headline(rows):
            click.echo(headline)
    click.echo(f"written: {chosen.out}, and next to it the numbers (.json) and a picture (.png)")
    console.give(study=str(chosen.out), rows=chosen.rows)
    if failed:
        more = f"; {len(failed) - 1} more failed or were not run" if len(failed) > 1 else ""
        msg = f"{failed[0]}{more}; run the same command to retry"
        raise ToolError(msg)


def _numbers(text: str, option: str) -> list[int | None]:
    """Parse numbers separated by commas; `all` becomes None."""
    try:
        return [None if part.strip() == "all" else int(part) for part in text.split(",")]
    except ValueError:
        msg = f"{option}: {text} is not a list of numbers, such as 0,1,2"
        raise UsageError(msg) from None


@click.command()
@recipe_arguments
@force_option
@click.option("--average-bits", type=click.FloatRange(2, 8), help="Largest mean bit width of the weights. Default: 5.")
@click.option(
    "--images",
    type=click.IntRange(min=1),
    help="Calibration images, default: 128; with --perturbation validation images, default: all.",
)
@click.option(
    "--perturbation",
    is_flag=True,
    help="Instead: measure accuracy and loss of the run's networks under noise on inputs and weights.",
)
@click.option(
    "--run",
    "others",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="With --perturbation: directory of another trained run to compare with; repeatable.",
)
@click.option("--draws", type=click.IntRange(min=1), help="With --perturbation: draws at each noise level. Default: 5.")
@json_option
def sensitivity(
    recipe: Path,
    overrides: tuple[str, ...],
    runs: Path,
    force: bool,
    average_bits: float | None,
    images: int | None,
    perturbation: bool,
    others: tuple[Path, ...],
    draws: int | None,
) -> None:
    """Measure each layer's sensitivity to fewer bits in a trained run, and propose a mixed bit-width recipe."""
    config = load(recipe, overrides)
    if perturbation:
        if average_bits is not None:
            msg = "--average-bits: does not apply to --perturbation; leave one of them out"
            raise UsageError(msg)
        _perturb(config, runs, force, others, draws=draws or 5, images=images)
        return
    if others or draws is not None:
        msg = "--run and --draws apply only with --perturbation; add it, or leave them out"
        raise UsageError(msg)
    from crqat.pipeline.commands import mixed_precision as proposal

    run_stage("sensitivity", config, runs, force, average_bits=average_bits or 5.0, images=images or 128)
    proposal.show(runs / config.name / "sensitivity")


def _perturb(config: Recipe, runs: Path, force: bool, others: tuple[Path, ...], **further: Any) -> None:
    """Measure accuracy and loss under noise, for this run and for `others`, and show the results together."""
    from crqat.core.run_directory import verify_stage
    from crqat.pipeline.commands import perturbation
    from crqat.pipeline.recipe.recipe import from_resolved

    asked = [(config, runs)]
    for other in others:
        path = other.resolve()
        found = from_resolved(verify_stage(path / "train").config)
        if _validation(found) != _validation(config):
            click.echo(f"warning: {other}: has another data.source, data.validation or seed, so its images differ")
        asked.append((replace(found, name=path.name), path.parent))  # the directory may have been renamed
    directories = [run_stage("perturbation", found, where, force, **further) for found, where in asked]
    perturbation.show(directories)


def _validation(config: Recipe) -> tuple[object, ...]:
    """Return the settings that determine the validation images."""
    return config.data.source, config.data.root, config.data.validation, config.seed


COMMANDS = (inspect, nncf, models, study, scale, sensitivity)
