"""Runs one training of a study in its own process, and evaluates its networks on the test images."""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from crqat.core.errors import CrqatError
from crqat.core.progress import Progress, quiet
from crqat.core.results.training import TrainingPayload
from crqat.core.run_directory import payload_of, read_manifest
from crqat.pipeline import console
from crqat.pipeline.recipe import recipe
from crqat.pipeline.stages import lock
from crqat.pipeline.stages import run as stages
from crqat.train.checkpoint import read_tensors
from crqat.train.data import sources
from crqat.train.load_trained import rebuild
from crqat.train.models import build as models
from crqat.train.models import published
from crqat.train.training.evaluate import answers


def run(path: Path, overrides: tuple[str, ...], runs: Path, progress: Progress) -> dict[str, Any]:
    """Run or resume a training, and measure the accuracy of each of its networks on all test images.

    Args:
        path: Path of the recipe.
        overrides: Changes to the recipe, as `crqat.pipeline.recipe.recipe.load` takes them.
        runs: Directory of the study's runs.
        progress: Callback for the progress of the training.

    Returns:
        A dictionary with "seconds" of the training, "n" test images and "networks": validation accuracy and `packed`
        correct images of each network.
    """
    config = recipe.load(path, overrides)
    with lock.hold(runs / config.name):
        directory = stages.train(config, runs, False, progress, save_every=60.0, unchecked=True)
    payload = payload_of(TrainingPayload, directory, read_manifest(directory))
    training = recipe.train_config(config)
    dataset = sources.of_recipe(published.data_section(training), quiet)
    float_network = models.build(config.model.name, len(dataset.class_names), payload.input_shape[0])
    float_network.load_state_dict(read_tensors(directory / "float.safetensors"))
    networks: dict[str, tuple[float, nn.Module]] = {
        "float": (payload.float_network.validation_accuracy, float_network.eval())
    }
    for name, candidate in payload.candidates.items():
        networks[name] = candidate.validation_accuracy, rebuild(directory, training, payload, name)

    def right(network: nn.Module) -> Tensor:
        return answers(network, dataset.test_images, dataset.preprocessing) == dataset.test_labels

    return {
        "seconds": payload.seconds,
        "n": len(dataset.test_labels),
        "networks": {
            name: {"validation": validation, "correct": packed(right(network))}
            for name, (validation, network) in networks.items()
        },
    }


def packed(correct: Tensor) -> str:
    """Encode bools of shape [N] as text: base64 of one bit per image, the first in each byte's highest bit."""
    return base64.b64encode(np.packbits(correct.numpy()).tobytes()).decode()


def _end_with_the_study() -> None:
    """Wait until the study's process has ended, which closes the pipe to this one; then save the training and exit."""
    os.read(0, 1)  # not sys.stdin's, whose lock the interpreter would wait for at exit
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Run the training that the JSON file in the only argument describes, and write its .result file next to it."""
    job = Path(sys.argv[1])
    given = json.loads(job.read_text())
    threading.Thread(target=_end_with_the_study, daemon=True).start()
    try:
        with console.show_progress() as progress:
            result = run(Path(given["recipe"]), tuple(given["settings"]), Path(given["runs"]), progress)
    except CrqatError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    partial = job.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    partial.replace(job.with_suffix(".result"))


if __name__ == "__main__":
    main()
