"""The command line. Heavy modules are imported only when a stage needs them, so help and recipe errors are instant."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from crqat.core import failures
from crqat.core.errors import CrqatError, InternalError, Told, ToolError, UsageError
from crqat.pipeline import cli_expert, cli_quantize, cli_tools, console, streams
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

# Name of the variable by which a shell asks for completion instead of a command; set by click.
_COMPLETE = "_CRQAT_COMPLETE"
INTERRUPTED, NOBODY_READS = 130, 128 + signal.SIGPIPE
# What most users need, in the order of use; `--help` shows the other commands after these.
FIRST = (
    "init", "quantize", "advise", "run", "train", "export", "benchmark", "gate", "report", "compare", "check",
    "explain", "doctor",
)  # fmt: skip
# While a training takes steps, it prints its own line, which says where it was saved.
_KEPT = "completed and saved work is kept; run the same command again to resume"


class _Commands(click.Group):
    """Group of all commands: lists them for --help in two sections, and gives each the option --quiet.

    An unexpected exception of a command is turned into an error of one line before click handles it.
    """

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Register a command and give it the option --quiet."""
        for command in cmd.commands.values() if isinstance(cmd, click.Group) else (cmd,):
            command.params.append(_quiet_option())
        super().add_command(cmd, name)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands; those that most users need (`FIRST`) come first."""
        others = [name for name in super().list_commands(ctx) if name not in FIRST]
        return [name for name in FIRST if name in self.commands] + others

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands for --help: the usual commands, then the expert tools."""
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
    text = "Show no progress, only results and errors."
    return click.Option(["--quiet"], is_flag=True, expose_value=False, callback=console.be_quiet, help=text)


@click.group(cls=_Commands, params=[_quiet_option()])
@click.version_option(package_name="crqat-edge", prog_name="crqat")
def crqat() -> None:
    """Quantize an image classifier to INT8 and verify it on its target runtime.

    \b
    Exit codes: 0 pass, 1 measured and judged a failure (gate, run,
    models), 2 usage, recipe or input, 3 environment, tool or internal
    error, 4 inconclusive, 130 interrupted, 141 nobody reads the output,
    143 terminated.
    """  # noqa: D301 - click's mark for lines that stay as they are


for _command in (*cli_quantize.COMMANDS, *cli_tools.COMMANDS, *cli_expert.COMMANDS):
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
        msg = "run: cannot be started with torchrun; start `crqat train` with torchrun, and then `crqat run` without it"
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
@click.option("--nproc", type=click.IntRange(min=1), metavar="N", help="Train in N processes on this machine.")
@click.option(
    "--max-restarts", type=click.IntRange(min=0), default=0, metavar="M",
    help="With --nproc: number of automatic restarts after a process has died. Default: 0.",
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
    """Train the float network if necessary, then quantize it; resume an interrupted training."""
    from crqat.pipeline.stages import launch

    config = load(recipe, overrides)
    if max_restarts and nproc is None:
        msg = "--max-restarts: needs several processes; add --nproc N, or give the option to torchrun instead"
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
    if payload is None:  # another process of the training prints the result
        return 0
    console.give(run=str(runs / config.name), training=payload)
    click.echo(f"trained on {payload.device} in {payload.seconds} s; compiled: {payload.compiled}")
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
    "--unsafe", is_flag=True, help="Also write files that break their runtime's rules; the gate fails on them."
)
@click.option(
    "--bisect", is_flag=True, help="If no engine can be built from tensorrt.onnx, write its smallest part that fails."
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
@click.option("--python", default="python3", help="Python on the board, e.g. venv/bin/python. Default: python3.")
@click.option("--ssh-config", type=click.Path(path_type=Path), help="File to use instead of ~/.ssh/config.")
@click.option("--clean", is_flag=True, help="Remove the copied files from the board after the results arrived.")
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
    """Measure every file on this machine or on a board; `crqat gate` judges the results."""
    config = load(recipe, overrides)
    if address is None:
        if clean or ssh_config is not None or python != "python3":
            msg = "--python, --ssh-config and --clean apply only to a board; name it with --on ssh://HOST"
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
@click.option("--results", type=click.Path(path_type=Path), help="A results.json that was measured by hand on a board.")
@json_option
def gate(
    recipe: Path,
    overrides: tuple[str, ...],
    runs: Path,
    address: str | None,
    baseline: Path | None,
    results: Path | None,
) -> int:
    """Judge the benchmark results of this machine or a board; exit with the verdict.

    --results FILE imports the results as stage benchmark@NAME, where NAME is the file's name, and judges them like
    results fetched over ssh.
    """
    if results is not None and address:
        msg = f"--results {results}: cannot be combined with --on {address}; leave one of them out"
        raise UsageError(msg)
    from crqat.pipeline.stages import boards

    config = load(recipe, overrides)
    if results is not None:
        return judge_run(config, runs, boards.carried(config, runs, results), baseline)
    return judge_run(config, runs, boards.stage_of(board(address) if address else None), baseline)


def main() -> None:
    """Entry point of the `crqat` command."""
    streams.prepare()
    # A recipe may name the user's own package.module:function; an installed command does not search this folder by
    # itself.
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
    """Run the command that the process's arguments name; print an error as one line; return the exit code."""
    try:
        code = crqat.main(prog_name="crqat", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except CrqatError as error:
        of_rank = isinstance(error, InternalError) and "CRQAT_SAID" in os.environ
        code = InternalError.exit_code_of_rank if of_rank else error.exit_code
        _say_error(str(error), code)
        return code
    except click.exceptions.NoArgsIsHelpError as error:
        with suppress(OSError):
            error.show()
        return UsageError.exit_code
    except click.ClickException as error:
        said = " ".join(error.format_message().split()).removesuffix(".")
        context = getattr(error, "ctx", None)
        _say_error(f"{said}; see {context.command_path if context else 'crqat'} --help", UsageError.exit_code)
        return UsageError.exit_code  # click's own code is 1 for some errors
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
    """Exception that ends the process after SIGTERM; like Ctrl-C, it lets the code remove partial files first."""


def _terminate(number: int, _: Any) -> None:
    """Raise `_Terminated` on SIGTERM. A training run replaces this handler by its own, which saves its state."""
    raise _Terminated(128 + number)


def _say_error(message: str, code: int) -> None:
    if "CRQAT_SAID" in os.environ:  # set by `stages.launch`, which reports for silent processes
        with suppress(FileExistsError), Path(os.environ["CRQAT_SAID"]).open("x") as said:
            said.write(str(code))
    with suppress(OSError):  # nobody reads it, or the disk is full
        click.echo(f"crqat: error: {message}", err=True)


if __name__ == "__main__":
    main()
