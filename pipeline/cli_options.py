"""Options and arguments that several commands share. Imports nothing heavy."""

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
    """Add the argument RECIPE and the options --set and --runs to a command."""
    command = click.option(
        "--runs", type=click.Path(path_type=Path), default=Path("runs"), help="Directory of all runs. Default: runs."
    )(command)
    command = click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a recipe's value: --set qat.epochs=3"
    )(command)
    return click.argument("recipe", type=click.Path(path_type=Path))(command)


def force_option(command: _Command) -> _Command:
    """Add the option --force to a command."""
    return click.option("--force", is_flag=True, help="Run the stage even if its results are up to date or damaged.")(
        command
    )


def training_options(command: _Command) -> _Command:
    """Add the options --save-every, --restart and --unchecked to a command that trains."""
    command = click.option(
        "--save-every", type=click.FloatRange(min=0), default=300.0, metavar="SECONDS",
        help="Seconds between saved training states; each epoch's end is saved too. Default: 300.",
    )(command)  # fmt: skip
    command = click.option(
        "--unchecked", is_flag=True, help="Skip the check that exports the untrained network before training."
    )(command)
    return click.option("--restart", is_flag=True, help="Start an interrupted training from the beginning.")(command)


def on_option(command: _Command) -> _Command:
    """Add the option --on, the address of a board, to a command."""
    help_text = "A board, ssh://[USER@]HOST[:PORT]; your ssh configuration applies."
    return click.option("--on", "address", metavar="ADDRESS", help=help_text)(command)


def json_option(command: _Command) -> _Command:
    """Add the option --json to a command: print the values passed to `console.give` as one JSON document."""

    @functools.wraps(command)
    def run(*arguments: Any, as_json: bool, **options: Any) -> Any:
        if not as_json:
            return command(*arguments, **options)
        from crqat.pipeline import console

        with console.json_document():
            return command(*arguments, **options)

    text = "Print data to stdout as one JSON document, everything else to stderr."
    return click.option("--json", "as_json", is_flag=True, help=text)(run)  # type: ignore[return-value]


def board(address: str, python: str = "python3", ssh_config: Path | None = None) -> Board:
    """Return the board at an address.

    Args:
        address: ssh://[USER@]HOST[:PORT].
        python: Python interpreter on the board.
        ssh_config: File to use instead of ~/.ssh/config.
    """
    from crqat.runtime_eval.board.ssh import Board

    return Board.parse(address, python, ssh_config)


def load(path: Path, overrides: tuple[str, ...]) -> Recipe:
    """Return the recipe in the file `path`, with values replaced by `overrides` ("key.path=value", from --set).

    Raises:
        UsageError: The recipe is wrong; the message names the key, the file and the fix.
    """
    from crqat.pipeline.recipe import recipe

    return recipe.load(path, overrides)
