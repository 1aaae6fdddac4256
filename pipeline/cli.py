"""The command line. Nothing heavy is imported before a stage needs it: help and a recipe's errors are instant."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from crqat.core import failures
from crqat.core.errors import CrqatError, InternalError, Told, ToolError, UsageError
from crqat.pipeline import cli_quantize, cli_tools, console, streams
from crqat.pipeline.cli_options import (
    board,
    force_option,
    json_option,
    load,
    on_option,
    recipe_arguments,
    training_options,
)
from crqat.pipeline.cli_stages import judge_run, run_stage, show_results, show_warnings, train_stage

if TYPE_CHECKING:
    from crqat.core.results.export import ExportPayload
    from crqat.pipeline.recipe.recipe import Recipe

# Asks for a shell's completion instead of a command; click has named it.
_COMPLETE = "_CRQAT_COMPLETE"
INTERRUPTED, NOBODY_READS = 130, 128 + signal.SIGPIPE
# Where a training takes steps it has a line of its own, which says where it was saved.
# What most users need, in the order in which they do; `--help` shows the others behind.
FIRST = (
    "init", "quantize", "advise", "run", "train", "export", "benchmark", "gate", "report", "compare", "check",
    "explain", "doctor",
)  # fmt: skip
_KEPT = "what was complete or saved still is: the same command goes on from there"


class _Commands(click.Group):
    """The commands, each with --quiet, in two groups.

    A command's unexpected exception becomes an error of one line, before click makes something of it.
    """

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Take a command on."""
        for command in cmd.commands.values() if isinstance(cmd, click.Group) else (cmd,):
            command.params.append(_quiet_option())
        super().add_command(cmd, name)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names: first those that most users need."""
        others = [name for name in super().list_commands(ctx) if name not in FIRST]
        return [name for name in FIRST if name in self.commands] + others

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Both groups, for --help."""
        names = self.list_commands(ctx)
        limit = formatter.width - 6 - max(map(len, names))
        for title, first in (("Commands", True), ("Expert tools", False)):
            rows = [(name, self.commands[name].get_short_help_str(limit)) for name in names if (name in FIRST) is first]
            with formatter.section(title):
                formatter.write_dl(rows)

    def invoke(self, context: click.Context) -> Any:
        """Run the command that the arguments name."""
        try:
            return super().invoke(context)
        except (click.ClickException, click.exceptions.Exit, click.Abort, Told, CrqatError):
            raise
        except BrokenPipeError as error:
            if streams.nobody_reads():
                raise Told(NOBODY_READS) from error
            raise failures.explain(error, context.invoked_subcommand or "crqat") from error
        except (Exception, SystemExit) as error:
            raise failures.explain(error, context.invoked_subcommand or "crqat") from error


def _quiet_option() -> click.Option:
    text = "No progress: results and errors alone."
    return click.Option(["--quiet"], is_flag=True, expose_value=False, callback=console.be_quiet, help=text)


@click.group(cls=_Commands, params=[_quiet_option()])
@click.version_option(package_name="crqat-edge", prog_name="crqat")
def crqat() -> None:
    """A float image classifier goes in, an INT8 model that is verified on its runtime comes out.

    \b
    Exit codes: 0 pass, 1 measured and judged a failure (gate, run,
    models), 2 usage, recipe or input, 3 environment, tool or internal
    error, 4 inconclusive, 130 interrupted, 141 nobody reads the output,
    143 terminated.
    """  # noqa: D301 - click's mark for lines that stay as they are


for _command in (*cli_quantize.COMMANDS, *cli_tools.COMMANDS):
    crqat.add_command(_command)


@crqat.command()
@recipe_arguments
@force_option
@training_options
@json_option
def run(
    recipe: Path, overrides: tuple[str, ...], runs: Path, force: bool, restart: bool, unchecked: bool, save_every: float
) -> int:
    """Train, export, benchmark and judge; exit with the verdict."""
    from crqat.pipeline.stages import launch, lock

    if launch.several():
        msg = "run: is of one process; start `train` by torchrun, and `crqat run` once when that has ended"
        raise UsageError(msg)
    config = load(recipe, overrides)
    with lock.hold(runs / config.name):
        trained = train_stage(config, runs, force, restart=restart, save_every=save_every, unchecked=unchecked)
        for stage in ("export", "benchmark"):
            run_stage(stage, config, runs, force)
        show_results(config, runs)
        show_warnings(trained)
        return judge_run(config, runs)


@crqat.command()
@recipe_arguments
@force_option
@training_options
@click.option("--nproc", type=click.IntRange(min=1), metavar="N", help="Train in so many processes on this machine.")
@click.option(
    "--max-restarts", type=click.IntRange(min=0), default=0, metavar="M",
    help="With --nproc: how often to go on by itself after a process has died. Default: 0.",
)  # fmt: skip
@json_option
def train(
    recipe: Path,
    overrides: tuple[str, ...],
    runs: Path,
    force: bool,
    restart: bool,
    unchecked: bool,
    save_every: float,
    nproc: int | None,
    max_restarts: int,
) -> int:
    """Train the float network if need be, and quantize it; go on where it was interrupted."""
    from crqat.pipeline.stages import launch

    config = load(recipe, overrides)
    if max_restarts and nproc is None:
        msg = "--max-restarts: is of several processes; add --nproc N, or start it by torchrun and give it to that"
        raise UsageError(msg)
    if nproc is not None and nproc > 1:
        arguments = [str(recipe), "--runs", str(runs), "--save-every", str(save_every)]
        arguments += [part for override in overrides for part in ("--set", override)]
        arguments += ["--force"] * force + ["--unchecked"] * unchecked
        arguments += ["--json"] * console.wants_json() + ["--quiet"] * console.quiet()
        launch.check(config, nproc)
        return launch.run(arguments, ["--restart"] * restart, nproc, max_restarts)
    if launch.several():
        payload = launch.train(config, runs, force, restart, save_every, unchecked)
    else:
        payload = train_stage(config, runs, force, restart=restart, save_every=save_every, unchecked=unchecked)
    if payload is None:  # another process of the training tells it
        return 0
    console.give(run=str(runs / config.name), training=payload)
    click.echo(f"trained on {payload.device}; fused: {payload.compiled}; {payload.seconds} s")
    for note in payload.preparation:
        click.echo(console.printable(note))
    click.echo(f"best: {payload.best}; accuracy on the validation split:")
    click.echo(f"  float: {100 * payload.float_network.validation_accuracy:.2f} %")
    for name, candidate in payload.candidates.items():
        click.echo(f"  {name}: {100 * candidate.validation_accuracy:.2f} %")
    show_warnings(payload)
    return 0


@crqat.command()
@recipe_arguments
@force_option
@click.option(
    "--unsafe", is_flag=True, help="Write files that break their runtime's rules, too; the gate fails on them."
)
@click.option(
    "--bisect", is_flag=True, help="If no engine can be made of tensorrt.onnx, write the smallest part that fails too."
)
@json_option
def export(recipe: Path, overrides: tuple[str, ...], runs: Path, force: bool, unsafe: bool, bisect: bool) -> None:
    """Write one ONNX file per target and verify it."""
    from crqat.core import run_directory
    from crqat.core.results import export as results
    from crqat.core.targets import builds_engine

    config = load(recipe, overrides)
    directory = run_stage("export", config, runs, force, **({"unsafe": True} if unsafe else {}))
    payload: ExportPayload = run_directory.payload_of(
        results.ExportPayload, directory, run_directory.read_manifest(directory)
    )
    console.give(run=str(runs / config.name), export=payload)
    for model in payload.models:
        path = runs / config.name / "export" / model.file
        status = "the reference" if model.verification is None else model.verification.status
        click.echo(f"{path}: {status}")
        if status.startswith("failed"):
            click.echo(
                f"{path}: the verification failed; the file is written for examination, and the gate fails on it"
            )
        for finding in model.findings or []:
            click.echo(f"{path}: breaks a rule: {finding}")
        if bisect and builds_engine(model.target):
            from crqat.pipeline.commands import inspect_engine
            from crqat.runtime_eval.trt.engine import EngineOptions

            inspect_engine.inspect(path, EngineOptions(), bisect=True, out=None)


@crqat.command()
@recipe_arguments
@force_option
@on_option
@click.option("--python", default="python3", help="The Python there, e.g. venv/bin/python. Default: python3.")
@click.option("--ssh-config", type=click.Path(path_type=Path), help="Instead of ~/.ssh/config.")
@click.option("--clean", is_flag=True, help="Remove what was copied there once the results are here.")
@json_option
def benchmark(
    recipe: Path,
    overrides: tuple[str, ...],
    runs: Path,
    force: bool,
    address: str | None,
    python: str,
    ssh_config: Path | None,
    clean: bool,
) -> None:
    """Measure every file, on this machine or on a board; the verdict is the gate's."""
    config = load(recipe, overrides)
    if address is None:
        if clean or ssh_config is not None or python != "python3":
            msg = "--python, --ssh-config and --clean are of a board; name it with --on ssh://HOST"
            raise UsageError(msg)
        run_stage("benchmark", config, runs, force)
        show_results(config, runs)
        return
    from crqat.pipeline.stages import boards, lock

    target = board(address, python, ssh_config)
    run = runs / config.name
    with failures.explained("benchmark", run), lock.hold(run), console.show_progress() as progress:
        boards.benchmark_on(target, config, runs, force, progress, clean)
    show_results(config, runs, boards.stage_of(target))


@crqat.command()
@recipe_arguments
@on_option
@click.option(
    "--baseline", type=click.Path(path_type=Path), help="Earlier results.json, for gate.max_latency_regression."
)
@click.option(
    "--results", type=click.Path(path_type=Path), help="results.json that a board wrote by hand, brought here as FILE."
)
@json_option
def gate(
    recipe: Path,
    overrides: tuple[str, ...],
    runs: Path,
    address: str | None,
    baseline: Path | None,
    results: Path | None,
) -> int:
    """Judge the benchmark's results, this machine's or a board's; exit with the verdict.

    With --results FILE they become the stage benchmark@NAME, NAME being the file's, and are judged as if ssh had
    brought them.
    """
    if results is not None and address:
        msg = f"--results {results}: --on {address} has results of its own; leave one of them out"
        raise UsageError(msg)
    from crqat.pipeline.stages import boards

    config = load(recipe, overrides)
    if results is not None:
        return judge_run(config, runs, boards.carried(config, runs, results), baseline)
    return judge_run(config, runs, boards.stage_of(board(address) if address else None), baseline)


@crqat.command()
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
    help="Instead: accuracy and loss of the run's networks under noise on input and weights.",
)
@click.option(
    "--run",
    "others",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="With --perturbation: the directory of another trained run, shown beside; may be given again.",
)
@click.option("--draws", type=click.IntRange(min=1), help="With --perturbation: draws of each noise. Default: 5.")
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
    """Measure what fewer bits cost each layer of a trained run, and propose a recipe of mixed bit widths."""
    config = load(recipe, overrides)
    if perturbation:
        if average_bits is not None:
            msg = "--average-bits: proposes bit widths, which --perturbation does not; leave one of them out"
            raise UsageError(msg)
        _perturb(config, runs, force, others, draws=draws or 5, images=images)
        return
    if others or draws is not None:
        msg = "--run and --draws are of noise; add --perturbation"
        raise UsageError(msg)
    from crqat.pipeline.commands import mixed_precision as proposal

    run_stage("sensitivity", config, runs, force, average_bits=average_bits or 5.0, images=images or 128)
    proposal.show(runs / config.name / "sensitivity")


def _perturb(config: Recipe, runs: Path, force: bool, others: tuple[Path, ...], **further: Any) -> None:
    """Measure this run and the others under noise, and show them together."""
    from crqat.core.run_directory import verify_stage
    from crqat.pipeline.commands import perturbation
    from crqat.pipeline.recipe.recipe import from_resolved

    asked = [(config, runs)]
    for other in others:
        path = other.resolve()
        found = from_resolved(verify_stage(path / "train").config)
        if _validation(found) != _validation(config):
            click.echo(f"warning: {other}: of another data.source, data.validation or seed: its images are others")
        asked.append((replace(found, name=path.name), path.parent))  # the directory may have another name by now
    directories = [run_stage("perturbation", found, where, force, **further) for found, where in asked]
    perturbation.show(directories)


def _validation(config: Recipe) -> tuple[object, ...]:
    """What the choice of the validation images depends on."""
    return config.data.source, config.data.root, config.data.validation, config.seed


def main() -> None:
    """The `crqat` command."""
    streams.prepare()
    # A recipe may name the user's own package.module:function; an installed command does not look here by itself.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        code = _run_command()
    finally:
        signal.signal(signal.SIGTERM, before)
    left = streams.flush()
    if left is not None and code == 0:
        if not isinstance(left, BrokenPipeError):
            _say_error(f"the output cannot be written: {left.strerror}", ToolError.exit_code)
        code = NOBODY_READS if isinstance(left, BrokenPipeError) else ToolError.exit_code
    sys.exit(code)


def _run_command() -> int:
    """Run what the arguments say, tell an error in one line, and give the exit code."""
    try:
        code = crqat.main(prog_name="crqat", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except CrqatError as error:
        of_rank = isinstance(error, InternalError) and "CRQAT_SAID" in os.environ
        code = InternalError.exit_code_of_rank if of_rank else error.exit_code
        _say_error(str(error), code)
        return code
    except click.ClickException as error:
        with suppress(OSError):
            error.show()
        return UsageError.exit_code  # click's own is 1 for some
    except (KeyboardInterrupt, click.Abort):
        _say_error(f"interrupted; {_KEPT}", INTERRUPTED)
        return INTERRUPTED
    except Told as ended:
        code = ended.code if isinstance(ended.code, int) else 0
        if isinstance(ended, _Terminated):
            _say_error(f"terminated; {_KEPT}", code)
        return code
    except (Exception, SystemExit) as error:
        if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):  # click exits by 1
            return NOBODY_READS
        if isinstance(error, SystemExit) and _COMPLETE in os.environ:  # click has written what a shell asked for
            return UsageError.exit_code if error.code else 0
        told = failures.explain(error, "crqat")
        _say_error(str(told), told.exit_code)
        return told.exit_code


class _Terminated(Told):
    """By SIGTERM. What is half written is removed on the way out, as after Ctrl-C."""


def _terminate(number: int, _: Any) -> None:
    """A training answers by itself, and saves."""
    raise _Terminated(128 + number)


def _say_error(message: str, code: int) -> None:
    if "CRQAT_SAID" in os.environ:  # of `crqat.pipeline.stages.launch`, which speaks where no process of a training has
        with suppress(FileExistsError), Path(os.environ["CRQAT_SAID"]).open("x") as said:
            said.write(str(code))
    with suppress(OSError):  # nobody reads it, or it goes to a full disk
        click.echo(f"crqat: error: {message}", err=True)


if __name__ == "__main__":
    main()
