"""The commands that need no training, or as little as possible: `quantize` and `advise`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from crqat.core import failures
from crqat.core.errors import UsageError
from crqat.pipeline.cli_options import force_option, json_option, load, recipe_arguments
from crqat.pipeline.cli_stages import judge_run, run_stage, show_results, show_warnings, train_stage, warn_of_failures

if TYPE_CHECKING:
    from crqat.pipeline.recipe.recipe import Recipe


@click.command()
@click.argument("model")
@click.option("--images", type=click.Path(path_type=Path), required=True, help="Folder of class folders or of images.")
@click.option("--test", type=click.Path(path_type=Path), help="Folder of test images. Default: a part of --images.")
@click.option("--weights", help="Checkpoint. Default: those of torchvision, timm or the file.")
@click.option("--no-labels", is_flag=True, help="Ignore class folders; measure agreement with the float network.")
@click.option("--classes", type=click.IntRange(min=2), help="Number of classes, needed without class folders.")
@click.option("--bits", default="8,8", metavar="W,A", help="Bits of weights and activations; first and last layer: 8.")
@click.option("--advise", "advised", is_flag=True, help="Try steps beyond calibration until one meets --max-drop.")
@click.option("--max-drop", type=click.FloatRange(min=0), help="Allowed accuracy drop in points; the gate judges it.")
@click.option("--mean", help="Mean of each channel in units of 0..1, such as 0.485,0.456,0.406.")
@click.option("--std", help="Standard deviation of each channel, like --mean.")
@click.option("--size", type=click.IntRange(min=1), help="Shorter side after resizing, in pixels.")
@click.option("--crop", type=click.IntRange(min=1), help="Side of the square center crop, in pixels.")
@click.option("--interpolation", type=click.Choice(["bilinear", "bicubic", "lanczos", "nearest"]))
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of the split. Default: 0.")
@click.option("--out", type=click.Path(path_type=Path), help="Directory to write. Default: runs/MODEL-wWaA.")
@force_option
@json_option
def quantize(
    model: str,
    images: Path,
    test: Path | None,
    weights: str | None,
    no_labels: bool,
    classes: int | None,
    bits: str,
    advised: bool,
    max_drop: float | None,
    mean: str | None,
    std: str | None,
    size: int | None,
    crop: int | None,
    interpolation: str | None,
    seed: int,
    out: Path | None,
    force: bool,
) -> int:
    """Quantize MODEL by calibration alone, from a folder of images, to verified files.

    \b
    MODEL is a torchvision or timm name, module:function with --weights,
    or a float ONNX file. The recipe is written next to the results.
    Without --max-drop the results are not judged; the exit code is 0.
    """  # noqa: D301 - click's mark for lines that stay as they are
    from crqat.pipeline import console
    from crqat.pipeline.commands import quantize as command
    from crqat.pipeline.commands import quantize_request as options
    from crqat.pipeline.stages import lock

    widths = options.numbers(bits, "--bits", int)
    if len(widths) != 2:
        msg = f"--bits: {bits} is not a pair of bit widths; give those of weights and activations, such as 8,8"
        raise UsageError(msg)
    preprocessing = {
        "mean": None if mean is None else options.numbers(mean, "--mean", float),
        "std": None if std is None else options.numbers(std, "--std", float),
        "size": size,
        "crop": crop,
        "interpolation": interpolation,
    }
    out = out or Path("runs") / options.run_name(model, widths)
    request = options.Request(
        model,
        images,
        test,
        weights,
        not no_labels,
        classes,
        (widths[0], widths[1]),
        advised,
        max_drop,
        seed,
        preprocessing,
        out,
    )
    with options.in_options(out), lock.hold(out):
        with console.show_progress() as progress:
            recipe = command.write_recipe(request, progress)
        config, runs = load(recipe, ()), out.parent
        if advised:
            return _advise(config, runs, None, every=False, trains=False)
        trained = train_stage(config, runs, force)
        for stage in ("export", "benchmark"):
            run_stage(stage, config, runs, force)
        show_results(config, runs)
        show_warnings(trained)
        click.echo(f"recipe: {recipe}")
        console.give(recipe=str(recipe))
        if max_drop is not None:
            return judge_run(config, runs)
        warn_of_failures(config, runs)
        return 0


@click.command()
@recipe_arguments
@click.option("--judge", type=click.Path(path_type=Path), help="Class folders to judge on. Default: held-out images.")
@click.option("--all", "every", is_flag=True, help="Run all steps, even after one has passed.")
@json_option
def advise(recipe: Path, overrides: tuple[str, ...], runs: Path, judge: Path | None, every: bool) -> int:
    """Find the cheapest step that passes the gate, from calibration to QAT, and measure it on the test images.

    \b
    Each step is judged on images that neither it nor the float training
    has seen; the test images are used only once, for the chosen step.
    The same command resumes an interrupted search. Exit code 1 if all
    steps fail, 4 if none passes and the best one is inconclusive, else
    the gate's.
    """  # noqa: D301 - click's mark for lines that stay as they are
    return _advise(load(recipe, overrides), runs, judge, every=every)


def _advise(config: Recipe, runs: Path, judge: Path | None, **further: bool) -> int:
    from crqat.pipeline import console
    from crqat.pipeline.commands import advise as command
    from crqat.pipeline.gate import rules
    from crqat.pipeline.stages import lock

    out = runs / f"{config.name}-advise"
    with lock.hold(out):
        with failures.explained("advise", out), console.show_progress() as progress:
            ladder = command.Ladder(config, runs, judge, progress, **further)
            advice = ladder.climb()
            command.write(ladder, advice, out)
        command.show(advice, out)
        console.give(advice=advice, recipe=str(out / command.RECIPE))
        chosen = ladder.configs[advice.chosen]
        for stage in ("export", "benchmark"):
            run_stage(stage, chosen, runs, False)
        show_results(chosen, runs)
        code = judge_run(chosen, runs)
        return code if advice.passed else rules.exit_code(command.chosen(advice).verdicts)


COMMANDS = (quantize, advise)
