"""Commands beside the stages that most users need: recipes, runs, reports and the machine. See `crqat.pipeline.cli`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from crqat.core import run_directory
from crqat.core.errors import UsageError
from crqat.pipeline import console
from crqat.pipeline.cli_options import json_option


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
        msg = "--picture: draws runs only; give run directories instead of results.json files"
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
    settings = ", ".join(f"{key}={value}" for key, value in how.items())
    click.echo(f"the bundle contains the benchmark settings of the export's recipe: {settings}")
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
    """Report what works on this machine, and what a missing part prevents."""
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
    """Write a recipe for your images and network, or an explained example.

    \b
    With --images and --model, both are tried, and the recipe gets the
    keys that they need. It quantizes by calibration, without training,
    for ONNX Runtime and TensorRT. Without the two options, the recipe
    is for scikit-learn's digits and explains every key.
    """  # noqa: D301 - click's mark for lines that stay as they are
    from crqat.pipeline.commands import network_fit
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
        from crqat.pipeline.commands.quantize_request import numbers

        preprocessing = {
            "mean": None if mean is None else numbers(mean, "--mean", float),
            "std": None if std is None else numbers(std, "--std", float),
            "size": size,
            "crop": crop,
        }
        request = network_fit.Request(path, images, model, weights, weights_key, preprocessing, every)
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


COMMANDS = (compare, bundle, check, report, doctor, init, explain)
