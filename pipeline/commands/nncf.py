"""The `nncf` commands: exchange checkpoints with stock NNCF."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from crqat.core import run_directory
from crqat.core.progress import Progress
from crqat.pipeline import console
from crqat.pipeline.recipe import recipe as recipes

if TYPE_CHECKING:
    from crqat.pipeline.recipe.recipe import Recipe


def export(run: Path, candidate: str, out: Path | None) -> None:
    """Write a network of a finished training run as a checkpoint of stock NNCF, and print how to load it.

    Args:
        run: Directory of the run.
        candidate: Network to write: "best", "student", "teacher" or "calibrated".
        out: Folder to write; None writes NAME-nncf, with the run's name, in the current directory.
    """
    from crqat.train.nncf import checkpoint as nncf_checkpoint

    network = recipes.from_resolved(run_directory.read_manifest(run / "train").config).model.name
    folder = out or Path(f"{run.resolve().name}-nncf")
    checkpoint = nncf_checkpoint.export(run / "train", candidate, folder, network)
    click.echo(f"wrote {folder}: {len(checkpoint.quantizers)} quantizers")
    click.echo(f"to load it in Python, call load() of {folder / nncf_checkpoint.HOWTO} with a new float {network}")
    console.give(folder=str(folder), quantizers=len(checkpoint.quantizers), model=network)


def take(path: Path, recipe_path: Path, config: Recipe, out: Path | None, progress: Progress) -> None:
    """Check that a stock NNCF checkpoint fits a recipe, and convert it into a folder that `model.nncf` can name.

    Then print what was imported, and the command that trains from it.

    Args:
        path: File of the checkpoint; `crqat.train.nncf.checkpoint.read` describes its formats.
        recipe_path: File of the recipe.
        config: The recipe.
        out: Folder to write; None writes NAME-start, with the recipe's name, in the current directory.
        progress: Callback for the progress of reading the data set.
    """
    from crqat.train.nncf import checkpoint as nncf_checkpoint
    from crqat.train.nncf import start_from

    checkpoint, edges = start_from.check(path, recipes.train_config(config), progress)
    folder = out or Path(f"{config.name}-start")
    nncf_checkpoint.write(checkpoint, folder, config.model.name)
    weights, activations = start_from.usual_bits(checkpoint)
    click.echo(f"wrote {folder}: {len(checkpoint.quantizers)} quantizers, W{weights}A{activations}")
    for edge in edges:
        if edge.note:
            click.echo(console.printable(f"  {edge.outcome}: {edge.name}: {edge.note}"))
    click.echo(f"edges: {start_from.summary(edges)}")
    changes = [f"model.nncf={folder}", "model.weights=null"]
    changes += ["model.weights_key=null"] * (config.model.weights_key is not None)
    asked = {
        "weights": (weights, config.quantization.weights),
        "activations": (activations, config.quantization.activations),
    }
    for key, (found, wanted) in asked.items():
        if found != wanted:
            click.echo(f"the recipe sets {wanted} bits for {key}, the checkpoint has {found}")
            changes.append(f"quantization.{key}={found}")
    console.give(folder=str(folder), quantizers=len(checkpoint.quantizers), edges=edges, settings=changes)
    click.echo(f"next: crqat train {recipe_path} {' '.join(f'--set {change}' for change in changes)}")
