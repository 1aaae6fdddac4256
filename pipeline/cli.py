"""The command line. Nothing heavy is imported before a stage needs it: help and a recipe's errors are instant."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from artifacts.errors import CrqatError, ToolError, UsageError

if TYPE_CHECKING:
    from pipeline.gate import Verdict
    from pipeline.recipe import Recipe
    from runtime_eval.remote import Board

INTERRUPTED = 130
# Where a training takes steps it has a line of its own, which says where it was saved.
_KEPT = "what was complete or saved still is: the same command goes on from there"
TEMPLATE = Path(__file__).parent / "templates" / "recipe.yaml"

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _recipe_arguments(command: _Command) -> _Command:
    command = click.option("--runs", type=click.Path(path_type=Path), default=Path("runs"), help="Default: runs.")(
        command
    )
    command = click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a recipe's value: --set qat.epochs=3"
    )(command)
    return click.argument("recipe", type=click.Path(path_type=Path))(command)


def _force_option(command: _Command) -> _Command:
    return click.option("--force", is_flag=True, help="Run it even if it is up to date or damaged.")(command)


def _training_options(command: _Command) -> _Command:
    command = click.option(
        "--save-every", type=click.FloatRange(min=0), default=300.0, metavar="SECONDS",
        help="Save the training's state so often, and at each epoch's end. Default: 300.",
    )(command)  # fmt: skip
    return click.option("--restart", is_flag=True, help="Begin an interrupted training anew.")(command)


def _on_option(command: _Command) -> _Command:
    help_text = "A board, ssh://[USER@]HOST[:PORT]; your ssh configuration applies."
    return click.option("--on", "address", metavar="ADDRESS", help=help_text)(command)


def _board(address: str, python: str = "python3", ssh_config: Path | None = None) -> Board:
    from runtime_eval.remote import Board

    return Board.parse(address, python, ssh_config)


def _load(path: Path, overrides: tuple[str, ...]) -> Recipe:
    from pipeline import recipe

    return recipe.load(path, overrides)


@click.group()
@click.version_option(package_name="crqat-edge", prog_name="crqat")
def crqat() -> None:
    """A float image classifier goes in, an INT8 model that is proven on its runtime comes out.

    \b
    Exit codes: 0 pass, 1 the gate failed, 2 usage or recipe,
    3 environment or tool, 4 the gate is inconclusive,
    130 interrupted, 143 terminated.
    """  # noqa: D301 - click's mark for lines that stay as they are


@crqat.command()
@_recipe_arguments
@_force_option
@_training_options
def run(recipe: Path, overrides: tuple[str, ...], runs: Path, force: bool, restart: bool, save_every: float) -> int:
    """Train, export, benchmark and judge; exit with the verdict."""
    from pipeline import launch, lock

    if launch.several():
        msg = "run: is of one process; start `train` by torchrun, and `crqat run` once when that has ended"
        raise UsageError(msg)
    config = _load(recipe, overrides)
    with lock.hold(runs / config.name):
        _run_stage("train", config, runs, force, restart=restart, save_every=save_every)
        for stage in ("export", "benchmark"):
            _run_stage(stage, config, runs, force)
        _show_results(config, runs)
        return _judge(config, runs)


@crqat.command()
@_recipe_arguments
@_force_option
@_training_options
@click.option("--nproc", type=click.IntRange(min=1), metavar="N", help="Train in so many processes on this machine.")
@click.option(
    "--max-restarts", type=click.IntRange(min=0), default=0, metavar="M",
    help="With --nproc: how often to go on by itself after a process has died. Default: 0.",
)  # fmt: skip
def train(
    recipe: Path,
    overrides: tuple[str, ...],
    runs: Path,
    force: bool,
    restart: bool,
    save_every: float,
    nproc: int | None,
    max_restarts: int,
) -> int:
    """Train the float network if need be, and quantize it; go on where it was interrupted."""
    from pipeline import launch

    config = _load(recipe, overrides)
    if max_restarts and nproc is None:
        msg = "--max-restarts: is of several processes; add --nproc N, or start it by torchrun and give it to that"
        raise UsageError(msg)
    payload: dict[str, Any] | None
    if nproc is not None and nproc > 1:
        arguments = [str(recipe), "--runs", str(runs), "--save-every", str(save_every)]
        arguments += [part for override in overrides for part in ("--set", override)]
        arguments += ["--force"] * force
        launch.check(config, nproc)
        return launch.run(arguments, ["--restart"] * restart, nproc, max_restarts)
    if launch.several():
        payload = launch.train(config, runs, force, restart, save_every)
    else:
        payload = _run_stage("train", config, runs, force, restart=restart, save_every=save_every)
    if payload is None:  # another process of the training tells it
        return 0
    click.echo(f"trained on {payload['device']}; fused: {payload['compiled']}; {payload['seconds']} s")
    click.echo(f"best: {payload['best']}; accuracy on the validation split:")
    for name, entry in {"float": payload["float"], **payload["candidates"]}.items():
        click.echo(f"  {name}: {100 * entry['validation_accuracy']:.2f} %")
    return 0


@crqat.command()
@_recipe_arguments
@_force_option
@click.option(
    "--unsafe", is_flag=True, help="Write files that break their runtime's rules, too; the gate fails on them."
)
@click.option(
    "--bisect", is_flag=True, help="If no engine can be made of tensorrt.onnx, write the smallest part that fails too."
)
def export(recipe: Path, overrides: tuple[str, ...], runs: Path, force: bool, unsafe: bool, bisect: bool) -> None:
    """Write one ONNX file per target and prove it."""
    config = _load(recipe, overrides)
    payload = _run_stage("export", config, runs, force, **({"unsafe": True} if unsafe else {}))
    for model in payload["models"]:
        path = runs / config.name / "export" / model["file"]
        proof = (model.get("verification") or {}).get("status", "the reference")
        click.echo(f"{path}: {proof}")
        for finding in model.get("findings", []):
            click.echo(f"{path}: breaks a rule: {finding}")
        if bisect and model["target"] == "tensorrt":
            from pipeline import inspection
            from runtime_eval.engine import EngineOptions

            inspection.inspect(path, EngineOptions(), bisect=True, out=None)


@crqat.command()
@_recipe_arguments
@_force_option
@_on_option
@click.option("--python", default="python3", help="The Python there, e.g. venv/bin/python. Default: python3.")
@click.option("--ssh-config", type=click.Path(path_type=Path), help="Instead of ~/.ssh/config.")
@click.option("--clean", is_flag=True, help="Remove what was copied there once the results are here.")
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
    config = _load(recipe, overrides)
    if address is None:
        if clean or ssh_config is not None or python != "python3":
            msg = "--python, --ssh-config and --clean are of a board; name it with --on ssh://HOST"
            raise UsageError(msg)
        _run_stage("benchmark", config, runs, force)
        _show_results(config, runs)
        return
    from pipeline import console, lock, stages

    board = _board(address, python, ssh_config)
    with lock.hold(runs / config.name), console.show_progress() as progress:
        stages.benchmark_on(board, config, runs, force, progress, clean)
    _show_results(config, runs, stages.device_stage(board))


@crqat.command()
@_recipe_arguments
@_on_option
@click.option(
    "--baseline", type=click.Path(path_type=Path), help="Earlier results.json, for gate.max_latency_regression."
)
def gate(recipe: Path, overrides: tuple[str, ...], runs: Path, address: str | None, baseline: Path | None) -> int:
    """Judge the benchmark's results, this machine's or a board's; exit with the verdict."""
    from pipeline import stages

    config = _load(recipe, overrides)
    return _judge(config, runs, stages.device_stage(_board(address) if address else None), baseline)


@crqat.command()
@click.argument("files", metavar="RESULTS...", type=click.Path(path_type=Path), nargs=-1, required=True)
def compare(files: tuple[Path, ...]) -> None:
    """Show the results.json of several devices side by side."""
    from pipeline import results
    from pipeline.results_file import read_results

    results.compare([(path, read_results(path)) for path in files])


@crqat.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Default: NAME-bundle.tar.gz.")
def bundle(run: Path, out: Path | None) -> None:
    """Write an export as one archive for a board, to be measured there without crqat."""
    from pipeline import stages

    archive, digest, how = stages.bundle(run, out)
    click.echo(f"wrote {archive}, bundle {digest}")
    click.echo(f"measures as the export's recipe says: {', '.join(f'{key}={value}' for key, value in how.items())}")
    click.echo("on the board:")
    click.echo(f"  tar xzf {archive.name} && cd crqat-bundle && python3 -m runtime_eval .")


@crqat.command()
@click.argument("path", type=click.Path(path_type=Path))
def check(path: Path) -> None:
    """Verify a run directory, a recipe, an ONNX file, Grids (grids.json) or results.json."""
    from pipeline import check as checks

    for line in checks.check(path):
        click.echo(line)


@crqat.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("report.html"), help="Default: report.html.")
@click.option("--layers", is_flag=True, help="Measure the accuracy with one layer at a time quantized.")
def report(run: Path, out: Path, layers: bool) -> None:
    """Write the report of a run directory again, as one HTML file."""
    from pipeline import console, stages

    with console.show_progress() as progress:
        stages.report(run, out, layers, progress)
    click.echo(f"wrote {out}")


@crqat.command()
@_recipe_arguments
@_force_option
@click.option(
    "--average-bits", type=click.FloatRange(2, 8), default=5.0, help="Largest mean width of the weights. Default: 5."
)
@click.option("--images", type=click.IntRange(min=1), default=128, help="Calibration images. Default: 128.")
def sensitivity(
    recipe: Path, overrides: tuple[str, ...], runs: Path, force: bool, average_bits: float, images: int
) -> None:
    """Measure what fewer bits cost each layer of a trained run, and propose a recipe of mixed widths."""
    from pipeline import sensitivity as proposal

    config = _load(recipe, overrides)
    _run_stage("sensitivity", config, runs, force, average_bits=average_bits, images=images)
    proposal.show(runs / config.name / "sensitivity")


@crqat.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--batch", type=click.IntRange(min=1), help="Build for this batch alone. Default: from 1 to 64.")
@click.option("--compute-capability", "targets", multiple=True, metavar="SM89", help="Build for this GPU; repeatable.")
@click.option("--bisect", is_flag=True, help="If it cannot be built, write the smallest part that cannot either.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the report here, as JSON.")
def inspect(path: Path, batch: int | None, targets: tuple[str, ...], bisect: bool, out: Path | None) -> None:
    """Show what TensorRT makes of an .onnx file, layer by layer, or show an engine.json."""
    from pipeline import inspection
    from runtime_eval.engine import EngineOptions

    batches = EngineOptions.batch if batch is None else (batch, batch, batch)
    inspection.inspect(path, EngineOptions(batch=batches, compute_capabilities=targets), bisect, out)


@crqat.group()
def nncf() -> None:
    """Take checkpoints to stock NNCF and from it."""


@nncf.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--candidate", type=click.Choice(["best", "student", "teacher"]), default="best", help="Default: best.")
@click.option("--out", type=click.Path(path_type=Path), help="Default: NAME-nncf.")
def nncf_export(run: Path, candidate: str, out: Path | None) -> None:
    """Write a finished training as a state dict and a configuration that stock NNCF loads."""
    from pipeline import nncf as checkpoints

    checkpoints.export(run, candidate, out)


@nncf.command("import")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--recipe", "recipe", type=click.Path(path_type=Path), required=True, help="Of the same network.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a recipe's value: --set qat.epochs=3"
)
@click.option("--out", type=click.Path(path_type=Path), help="Default: NAME-start.")
def nncf_import(checkpoint: Path, recipe: Path, overrides: tuple[str, ...], out: Path | None) -> None:
    """Make a network that nncf.quantize has quantized the start of a training."""
    from pipeline import console
    from pipeline import nncf as checkpoints

    with console.show_progress() as progress:
        checkpoints.take(checkpoint, recipe, _load(recipe, overrides), out, progress)


@crqat.command()
@click.argument("names", metavar="[NAMES]...", nargs=-1)
@click.option("--cifar10", type=click.Path(path_type=Path), help="Folder of CIFAR-10, to be enlarged. Default: noise.")
@click.option("--size", type=click.IntRange(min=32), default=224, help="Height and width of the images. Default: 224.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/models.md"), help="Default: docs/models.md.")
def models(names: tuple[str, ...], cifar10: Path | None, size: int, out: Path) -> None:
    """Take networks through everything and write what is mapped, equal and computed in integers."""
    from pipeline import networks

    networks.run(names, cifar10, size, out)


@crqat.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a recipe's value.")
@click.option(
    "--processes", multiple=True, type=click.IntRange(min=1), metavar="N", help="Predict for so many; repeatable."
)
@click.option("--bandwidth", type=float, metavar="B/S", help="Bytes a second between machines.")
@click.option("--latency", type=float, metavar="S", help="Seconds of a message between machines.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("scale.json"), help="Default: scale.json.")
def scale(
    recipe: Path,
    overrides: tuple[str, ...],
    processes: tuple[int, ...],
    bandwidth: float | None,
    latency: float | None,
    out: Path,
) -> None:
    """Measure here what a training step costs, and predict it for more processes."""
    from pipeline import scale as scaling

    scaling.scale(_load(recipe, overrides), processes, bandwidth, latency, out)


@crqat.command()
def doctor() -> int:
    """Say what this machine can do and what is missing for what."""
    from pipeline import doctor as examination

    return examination.show()


@crqat.command()
@click.argument("path", type=click.Path(path_type=Path), default=Path("recipe.yaml"))
def init(path: Path) -> None:
    """Write a commented recipe."""
    try:
        with path.open("x") as file:
            file.write(TEMPLATE.read_text())
    except FileExistsError as error:
        msg = f"{path}: exists already; name another file"
        raise UsageError(msg) from error
    except OSError as error:
        msg = f"{path}: cannot be written: {error.strerror}"
        raise ToolError(msg) from error
    click.echo(f"wrote {path}; next: crqat run {path}")


def _run_stage(stage: str, config: Recipe, runs: Path, force: bool, **further: Any) -> dict[str, Any]:
    from artifacts.store import read_manifest
    from pipeline import console, lock, stages

    with lock.hold(runs / config.name), console.show_progress() as progress:
        directory = getattr(stages, stage)(config, runs, force, progress, **further)
    return read_manifest(directory).payload


def _show_results(config: Recipe, runs: Path, stage: str = "benchmark") -> None:
    from pipeline import results, stages
    from pipeline.results_file import read_results, shown

    path = runs / config.name / stage / stages.RESULTS
    with shown(path):
        results.show(read_results(path), path.parent)


def _judge(config: Recipe, runs: Path, stage: str = "benchmark", baseline: Path | None = None) -> int:
    from pipeline import gate as rules
    from pipeline import results, stages

    verdicts: list[Verdict] = stages.gate(config, runs, stage, baseline)
    results.show_verdicts(verdicts)
    return rules.exit_code(verdicts)


def main() -> None:
    """The `crqat` command."""
    # A recipe may name the user's own package.module:function; an installed command does not look here by itself.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        code = crqat.main(prog_name="crqat", standalone_mode=False)
    except CrqatError as error:
        _say_error(str(error))
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        _say_error(f"interrupted; {_KEPT}")
        code = INTERRUPTED
    except _Terminated as ended:
        _say_error(f"terminated; {_KEPT}")
        code = ended.code
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.exit(code if isinstance(code, int) else 0)


class _Terminated(SystemExit):
    """By SIGTERM. What is half written is removed on the way out, as after Ctrl-C."""


def _terminate(number: int, _: Any) -> None:
    """A training answers by itself, and saves."""
    raise _Terminated(128 + number)


def _say_error(message: str) -> None:
    if "CRQAT_SAID" in os.environ:  # of `pipeline.launch`, which speaks where no process of a training has
        Path(os.environ["CRQAT_SAID"]).touch()
    click.echo(f"crqat: error: {message}", err=True)


if __name__ == "__main__":
    main()
