"""Commands that inspect or convert files, runs and images; the commands for stages are in `crqat.pipeline.cli`."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import click

from crqat.core import run_directory
from crqat.core.errors import ToolError, UsageError
from crqat.pipeline import console
from crqat.pipeline.cli_options import json_option, load


def _run_directory(path: Path) -> Path:
    """Return `path` after a check that it is the directory of a run.

    Raises:
        UsageError: It does not exist, is a file, or is the directory of a single stage.
    """
    if not path.is_dir():
        found = "a file, not a run directory" if path.exists() else "no such directory"
        msg = f"{path}: {found}; give the directory of a run, such as runs/NAME"
        raise UsageError(msg)
    if (path / run_directory.MANIFEST).is_file() and not (path / "train").exists():
        msg = f"{path}: the directory of a single stage; give the directory of the run, {path.parent}"
        raise UsageError(msg)
    return path


@click.command()
@click.argument("files", metavar="RUN_OR_RESULTS...", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--picture", type=click.Path(path_type=Path), help="Draw the runs into a .png, .svg or .pdf file.")
@json_option
def compare(files: tuple[Path, ...], picture: Path | None) -> None:
    """Show several runs side by side, or the results.json of one run from several devices.

    With run directories, each file is compared with the first run's file for the same target, image by image.
    """
    from crqat.core.results.benchmark import read_results
    from crqat.pipeline.report import tables as results

    missing = next((path for path in files if not path.exists()), None)
    if missing is not None:
        msg = f"{missing}: no such file or directory; give run directories, such as runs/NAME, or results.json files"
        raise UsageError(msg)
    folders = [path for path in files if path.is_dir()]
    if folders and len(folders) < len(files):
        other = next(path for path in files if path not in folders)
        msg = f"{other}: not a run directory, but {folders[0]} is; compare either run directories or results.json files"
        raise UsageError(msg)
    if folders:
        from crqat.pipeline.commands import compare_runs

        if picture is not None:
            compare_runs.check_picture(picture)
        comparison = compare_runs.compare([_run_directory(path) for path in folders])
        compare_runs.show(comparison)
        if picture is not None:
            compare_runs.draw(comparison, picture)
            click.echo(f"written: {picture}")
        console.give(comparison=comparison)
        return
    if picture is not None:
        msg = "--picture: draws runs only; name run directories instead of results.json files"
        raise UsageError(msg)
    several = [(path, read_results(path)) for path in files]
    results.compare(several)
    console.give(results=[{"file": str(path), "results": found} for path, found in several])


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Archive to write. Default: NAME-bundle.tar.gz.")
@json_option
def bundle(run: Path, out: Path | None) -> None:
    """Write an export as one archive for a board, to be measured there without crqat."""
    from crqat.pipeline.stages import boards

    archive, digest, how = boards.bundle(_run_directory(run), out)
    click.echo(f"wrote {archive}, bundle {digest}")
    click.echo(f"settings, from the export's recipe: {', '.join(f'{key}={value}' for key, value in how.items())}")
    click.echo("on the board:")
    click.echo(f"  tar xzf {archive.name} && cd crqat-bundle && python3 -m runtime_eval .")
    console.give(archive=str(archive), bundle=digest, benchmark=how)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a recipe's value.")
@click.option("--syntax", is_flag=True, help="Check only the recipe's keys and values, not its data and network.")
@json_option
def check(path: Path, overrides: tuple[str, ...], syntax: bool) -> None:
    """Verify a run directory, a recipe, an ONNX file, Grids (grids.json) or results.json.

    A recipe is tried with its untrained network on two images, from the data to the verified files.
    """
    from crqat.pipeline.commands import check as checks

    with console.show_progress() as progress:
        lines = checks.check(path, overrides, syntax, progress)
    for line in lines:
        click.echo(line)
    console.give(path=str(path), intact=True, found=lines)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("report.html"),
    help="HTML file to write. Default: report.html.",
)
@click.option("--layers", is_flag=True, help="Measure the accuracy with one layer at a time quantized.")
@json_option
def report(run: Path, out: Path, layers: bool) -> None:
    """Write the HTML report of a run directory again."""
    from crqat.pipeline.stages import run as stages

    if not out.parent.is_dir():
        msg = f"--out {out}: there is no folder {out.parent}; make it first"
        raise UsageError(msg)
    with console.show_progress() as progress:
        stages.report(_run_directory(run), out, layers, progress)
    click.echo(f"wrote {out}")
    console.give(report=str(out))


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
    """Start a training from a network that nncf.quantize has quantized."""
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
    """Run networks through all stages and report what was mapped, verified and computed in INT8; exit 1 on failure."""
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
@click.argument("key", required=False)
@json_option
def explain(key: str | None) -> None:
    """Explain a recipe KEY, such as qat.lr or gate; without KEY, list all keys."""
    from crqat.pipeline.recipe import keys

    if key is None:
        for entry in keys.every_key().values():
            click.echo(entry.key)
        console.give(keys=list(keys.every_key().values()))
        return
    found = keys.explain(key)
    for line in keys.lines(found):
        click.echo(line)
    console.give(**asdict(found))


@click.command()
@json_option
def doctor() -> int:
    """Report what works on this machine, and what is missing for what."""
    from crqat.pipeline.commands import doctor as examination

    return examination.show()


@click.command()
@click.argument("path", metavar="[RECIPE]", type=click.Path(path_type=Path), default=Path("recipe.yaml"))
@click.option(
    "--images", type=click.Path(path_type=Path), help="Folder with train/CLASS and test/CLASS, or with CLASS folders."
)
@click.option("--model", help="Torchvision or timm name, module:function, or a float ONNX file.")
@click.option("--weights", help="Checkpoint. Default: what torchvision or timm publish; else the network is trained.")
@click.option("--weights-key", help="Key of the state dict in that file. Default: the only one that fits.")
@click.option("--mean", help="Mean of each channel in units of 0..1, such as 0.485,0.456,0.406.")
@click.option("--std", help="Standard deviation of each channel, like --mean.")
@click.option("--size", type=click.IntRange(min=1), help="Shorter side after resizing, in pixels.")
@click.option("--crop", type=click.IntRange(min=1), help="Side of the square center crop, in pixels.")
@click.option("--all", "every", is_flag=True, help="Write every key with its default and what it means.")
@json_option
def init(
    path: Path,
    images: Path | None,
    model: str | None,
    weights: str | None,
    weights_key: str | None,
    mean: str | None,
    std: str | None,
    size: int | None,
    crop: int | None,
    every: bool,
) -> None:
    """Write a recipe for your images and network, or the commented one.

    \b
    With --images and --model, both are tried, and the recipe gets the
    keys that they need: calibration alone, for both runtimes. Without
    them, the recipe is for scikit-learn's digits and explains every
    key.
    """  # noqa: D301 - click's mark for lines that stay as they are
    from crqat.pipeline.commands import new_recipe as command

    if images is None or model is None:
        given: dict[str, object] = {
            "--images": images,
            "--model": model,
            "--weights": weights,
            "--mean": mean,
            "--std": std,
        }
        given |= {"--weights-key": weights_key, "--size": size, "--crop": crop}
        found = [option for option, value in given.items() if value is not None]
        if found:
            msg = f"{found[0]}: also needs {'--images' if images is None else '--model'}"
            raise UsageError(msg)
        command.write_default(path)
        console.give(recipe=str(path))
    else:
        from crqat.pipeline.commands.quantize import numbers

        preprocessing = {
            "mean": None if mean is None else numbers(mean, "--mean", float),
            "std": None if std is None else numbers(std, "--std", float),
            "size": size,
            "crop": crop,
        }
        request = command.Request(path, images, model, weights, weights_key, preprocessing, every)
        with console.show_progress() as progress:
            summary = command.write_for(request, progress)
        click.echo(
            f"{summary.train_images} training and {summary.test_images} test images of {summary.classes} classes, "
            f"{summary.channels} x {summary.crop} x {summary.crop}"
        )
        if summary.float_top1 is not None:
            click.echo(f"float network: {summary.float_top1:.1%} of {summary.tried_images} test images correct")
        for warning in summary.warnings:
            click.echo(f"warning: {warning}", err=True)
        console.give(**asdict(summary))
    click.echo(f"wrote {path}; next: crqat run {path}")


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a recipe's value everywhere.")
@click.option("--methods", default="", help="Methods, separated by commas. Default: all.")
@click.option("--seeds", default="0", help="Seeds, separated by commas. Default: 0.")
@click.option("--labels", default="", help="Numbers of labeled images, `all` for all. Default: the recipe's.")
@click.option("--bits", default="", help="Bit widths of weights and activations. Default: the recipe's.")
@click.option(
    "--equal",
    type=click.Choice(["steps", "time"]),
    default="steps",
    help="What the methods have in common. Default: steps.",
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

    The same command resumes where it was stopped; runs in the JSON next to OUT are not repeated.
    """
    from crqat.pipeline.study import report
    from crqat.pipeline.study import study as studies

    config = load(recipe, overrides)
    out, runs = out or Path("studies") / f"{config.name}.md", runs or Path("runs") / f"study-{config.name}"
    chosen = studies.load(recipe, overrides, out, runs)
    counts = _numbers(labels, "--labels") if labels else [config.data.labeled]
    widths = _numbers(bits, "--bits") if bits else [None]
    wanted = tuple(filter(None, (method.strip() for method in methods.split(","))))
    plan = chosen.plan(wanted, [seed or 0 for seed in _numbers(seeds, "--seeds")], counts, widths, equal)
    failed = studies.run(chosen, plan, jobs or len(os.sched_getaffinity(0)))
    for cell, rows in report.cells(chosen.rows).items():
        console.show_table(report.title(cell), report.COLUMNS, report.table(rows))
        if headline := report.headline(rows):
            click.echo(headline)
    click.echo(f"{chosen.out}, with the numbers and a picture next to it")
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


COMMANDS = (compare, bundle, check, report, inspect, nncf, models, study, scale, doctor, init, explain)
