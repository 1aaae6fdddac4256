"""What the commands share: options and arguments. Nothing heavy is imported."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from crqat.pipeline.recipe.recipe import Recipe
    from crqat.runtime_eval.board.ssh import Board

_Command = TypeVar("_Command", bound=Callable[..., Any])


def recipe_arguments(command: _Command) -> _Command:
    """RECIPE, --set and --runs."""
    command = click.option("--runs", type=click.Path(path_type=Path), default=Path("runs"), help="Default: runs.")(
        command
    )
    command = click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a recipe's value: --set qat.epochs=3"
    )(command)
    return click.argument("recipe", type=click.Path(path_type=Path))(command)


def force_option(command: _Command) -> _Command:
    """--force."""
    return click.option("--force", is_flag=True, help="Run it even if it is up to date or damaged.")(command)


def training_options(command: _Command) -> _Command:
    """--save-every, --restart and --unchecked."""
    command = click.option(
        "--save-every", type=click.FloatRange(min=0), default=300.0, metavar="SECONDS",
        help="Save the training's state so often, and at each epoch's end. Default: 300.",
    )(command)  # fmt: skip
    command = click.option(
        "--unchecked", is_flag=True, help="Train without trying before how far the untrained network comes."
    )(command)
    return click.option("--restart", is_flag=True, help="Begin an interrupted training anew.")(command)


def on_option(command: _Command) -> _Command:
    """--on."""
    help_text = "A board, ssh://[USER@]HOST[:PORT]; your ssh configuration applies."
    return click.option("--on", "address", metavar="ADDRESS", help=help_text)(command)


def json_option(command: _Command) -> _Command:
    """--json; the command adds to the document by `crqat.pipeline.console.give`."""

    @functools.wraps(command)
    def run(*arguments: Any, as_json: bool, **options: Any) -> Any:
        if not as_json:
            return command(*arguments, **options)
        from crqat.pipeline import console

        with console.json_document():
            return command(*arguments, **options)

    text = "Data on stdout as one JSON document, all else on stderr."
    return click.option("--json", "as_json", is_flag=True, help=text)(run)  # type: ignore[return-value]


def board(address: str, python: str = "python3", ssh_config: Path | None = None) -> Board:
    """The board at an address."""
    from crqat.runtime_eval.board.ssh import Board

    return Board.parse(address, python, ssh_config)


def load(path: Path, overrides: tuple[str, ...]) -> Recipe:
    """Read a recipe; an error of it names key, file and fix."""
    from crqat.pipeline.recipe import recipe

    return recipe.load(path, overrides)
