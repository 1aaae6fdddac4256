"""Builds a recipe's float network with the weights that it has before training, and checks both."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from crqat.core.errors import UsageError
from crqat.core.field_bounds import user_path
from crqat.core.progress import Progress
from crqat.train import distributed
from crqat.train.config import TrainConfig, is_onnx_file
from crqat.train.data.batches import evaluation_batches
from crqat.train.data.dataset import Dataset
from crqat.train.data.split import Split
from crqat.train.device import channels_last
from crqat.train.graph.explain import check_module
from crqat.train.models import build as models
from crqat.train.models import from_onnx
from crqat.train.nncf.checkpoint import Checkpoint
from crqat.train.quantizers.finalize import check_values


@dataclass
class Built:
    """A float network before training.

    Attributes:
        network: The network on the device of the training.
        unchanged: Whether its weights come from a file and are not trained further.
        notes: What was taken from the file of its weights, one line each.
        preparation: How a network converted from an ONNX file compares with that file, one line each.
    """

    network: nn.Module
    unchanged: bool = False
    notes: list[str] = field(default_factory=list)
    preparation: list[str] = field(default_factory=list)


def build(
    config: TrainConfig,
    dataset: Dataset,
    split: Split,
    nncf: Checkpoint | None,
    device: torch.device,
    progress: Progress,
) -> Built:
    """Build the float network, load its weights, and check that it can be trained and that its values are valid.

    Args:
        config: The training configuration.
        dataset: The data set of the recipe, which determines the number of classes and channels.
        split: Indices of the data set's training images by use.
        nncf: Checkpoint of the recipe's `model.nncf`, whose weights the network gets; None without that key.
        device: Device of the training.
        progress: Reports what was taken from files.

    Raises:
        UsageError: The network cannot be built or trained, or its weights do not fit it or are not valid.
        ToolError: Published weights cannot be downloaded, or ONNX Runtime cannot run an ONNX file.
    """
    channels = dataset.train_images.shape[1]
    classes, weights = len(dataset.class_names), config.model.weights
    if weights == "pretrained":
        with distributed.first_rank_first():
            model, new_classifier = models.pretrained(config.model.name, classes, channels)
        if new_classifier and config.float_training.epochs == 0:
            msg = (
                f"model.weights: the published weights of {config.model.name} are not for {classes} classes; "
                "add a `float` section to train the new classifier"
            )
            raise UsageError(msg)
    else:
        model = models.build(config.model.name, classes, channels)
    check_module(model)
    source, compared = _compare(config.model.name, model, dataset, split)
    # Never slower than the other layout in our measurements, and a third faster for depthwise convolutions.
    built = Built(channels_last(model.to(device)))
    if compared:
        built.preparation.append(compared)
        progress("network", 1, 1, compared)
    if nncf is not None:
        source = f"model.nncf: {config.model.nncf}"
        models.fill(built.network, nncf.weights, source)
    elif weights is not None and weights != "pretrained":
        source = f"model.weights: {weights}"
        said = models.load_weights(built.network, user_path(weights, "model.weights"), config.model.weights_key)
        if said:
            built.notes.append(f"model.weights: {said}")
            progress("weights", 1, 1, said)
    # A user's function may have loaded its own weights.
    check_values(built.network, source or f"model.name: {config.model.name}")
    built.unchanged = bool(source) and not config.float_training.fine_tune
    return built


def _compare(name: str, model: nn.Module, dataset: Dataset, split: Split) -> tuple[str, str]:
    """Compare a network converted from an ONNX file with that file in ONNX Runtime.

    Returns:
        "model.name: FILE", the source of the weights in messages, and a line with the result; "" for both for any other
        network, which is not compared.

    Raises:
        UsageError: A weight of the file is NaN or infinite, or the results differ by more than rounding; see
            `from_onnx.compare`.
        ToolError: ONNX Runtime cannot run the file.
    """
    if not is_onnx_file(name):
        return "", ""
    check_values(model, f"model.name: {name}")
    chosen = dataset.train_images[split.train[: from_onnx.COMPARED]]
    images = next(evaluation_batches(chosen, dataset.preprocessing, from_onnx.COMPARED))
    return f"model.name: {name}", from_onnx.compare(name, model, images)
