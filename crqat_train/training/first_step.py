"""Checks the first forward pass and the first training step of a network before training, and explains failures."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from crqat.core.errors import UsageError
from crqat.core.progress import quiet
from crqat.train.config import OptimizerConfig
from crqat.train.graph.explain import check_module, failing_module, forward_of, one_line, passes_through, where
from crqat.train.training import loop
from crqat.train.training.optimizer import Fit

# Sizes and channels that are tried to find out which images a network takes, and the time limit in seconds.
_SIZES, _CHANNELS, _SECONDS = (224, 32, 28, 64, 299, 256, 384, 96, 128), (1, 3), 5.0
_FEW_VALUES = "more than 1 value per channel"
_LEARNING_RATE = 1e-3


def check_forward(network: nn.Module, images: Tensor, classes: int) -> None:
    """Run a network in eval mode and check that its output fits the data.

    Args:
        network: Float network; it is left in eval mode and is otherwise unchanged.
        images: Normalized, float32 of shape [N, C, H, W], on the network's device.
        classes: Number of classes of the data.

    Raises:
        UsageError: The network raises, or does not return one float number for each image and class.
    """
    check_module(network)
    network.eval()
    with torch.no_grad():
        try:
            logits = network(images)
        except Exception as error:  # the forward is the user's: it may raise anything
            if passes_through(error):
                raise
            shape = list(images.shape[1:])
            msg = (
                f"model.name: {_fails(network, error)} on images of shape {shape}{one_line_of(error)}; "
                f"{_what_it_takes(network, images)}"
            )
            raise UsageError(msg) from error
    _check_logits(network, logits, len(images), classes, "")


def check_step(
    network: nn.Module, images: Tensor, labels: Tensor, section: OptimizerConfig, key: str, processes: int = 1
) -> None:
    """Check that a network can be trained, by one training step without torch.compile.

    Args:
        network: Float or quantized network; it is changed.
        images: Normalized, float32 of shape [N, C, H, W], on the network's device; at most one batch of a process.
        labels: int64 of shape [N].
        section: Settings of the training.
        key: The section's name in the recipe.
        processes: Number of processes that share the batch.

    Raises:
        UsageError: The forward or the backward pass raises an error, the output is not logits, or the loss is not
            finite.
    """
    fit = Fit(network, replace(section, epochs=1, lr=_LEARNING_RATE), 1, key, images.device, quiet)
    network.train()
    try:
        with fit.autocast():
            logits = network(images)
            _check_logits(network, logits, len(images), None, " in training")
            loss = functional.cross_entropy(logits, labels)
        loop.update(fit, loss)
    except Exception as error:
        if passes_through(error):
            raise
        _refuse_one_image(network, images, error, f"{key}.batch_size", 2 * processes)
        msg = f"model.name: {_fails(network, error)} in the first step of training{one_line_of(error)}"
        raise UsageError(msg) from error
    finally:
        network.eval()
    if not torch.isfinite(loss):
        msg = (
            f"model.name: the loss of {type(network).__name__}{forward_of(network)} is {float(loss.detach())} in the "
            "first step of training; look for a logarithm, root or quotient of values that may be 0"
        )
        raise UsageError(msg)


def check_statistics(network: nn.Module, images: Tensor, key: str) -> None:
    """Check that BatchNorm's statistics can be re-estimated from a batch, by one forward pass in training mode.

    Args:
        network: Network to run; it is changed.
        images: Normalized, float32 of shape [N, C, H, W]: one batch of the estimation.
        key: The recipe's key for the number of images; used in the message.

    Raises:
        UsageError: There are too few images.
    """
    try:
        with torch.no_grad():
            network.train()(images)
    except ValueError as error:
        _refuse_one_image(network, images, error, key, 2)
        raise
    finally:
        network.eval()


def _refuse_one_image(network: nn.Module, images: Tensor, error: Exception, key: str, least: int) -> None:
    if len(images) == 1 and _FEW_VALUES in str(error):
        msg = (
            f"{key}: {failing_module(network, error) or 'a BatchNorm'} cannot compute statistics of one image with one "
            f"value per channel; take at least {least}"
        )
        raise UsageError(msg) from error


def one_line_of(error: BaseException) -> str:
    """Return the kind of an error and its text, as " (RuntimeError: ...)"."""
    kind, text = type(error).__name__, one_line(error)
    return f" ({kind})" if text == kind else f" ({kind}: {text})"


def _fails(network: nn.Module, error: BaseException) -> str:
    module = failing_module(network, error)
    part = f" in {module}" if module else ""
    return f"the forward of {type(network).__name__} fails{part}{where(error) or forward_of(network)}"


def _check_logits(network: nn.Module, logits: object, images: int, classes: int | None, when: str) -> None:
    what = f"model.name: the forward of {type(network).__name__}{forward_of(network)}"
    if not isinstance(logits, Tensor):
        kind = type(logits).__name__
        if isinstance(logits, (tuple, list, Mapping)):
            kind += f" of {len(logits)}"
        remedy = "leave auxiliary heads out (they are no part of what is delivered)" if when else "return them alone"
        msg = (
            f"{what} returns a {kind}{when} instead of the logits; {remedy}, or wrap the network in a module that "
            "returns the logits"
        )
        raise UsageError(msg)
    if not logits.is_floating_point():
        msg = f"{what} returns {logits.dtype}{when}; return the logits, which are floating-point numbers"
        raise UsageError(msg)
    if logits.ndim != 2 or len(logits) != images:
        msg = (
            f"{what} gives {list(logits.shape)}{when} for {images} images; logits have one row for each image and one "
            "column for each class"
        )
        raise UsageError(msg)
    if classes is not None and logits.shape[1] != classes:
        msg = (
            f"model.name: the network gives {logits.shape[1]} logits, the data has {classes} classes; let the last "
            f"layer of {type(network).__name__}{forward_of(network)} have as many outputs as the data has classes"
        )
        raise UsageError(msg)


def _what_it_takes(network: nn.Module, images: Tensor) -> str:
    """Return advice for a message: the number of channels or the image size that the network accepts in a trial."""
    _, channels, height, width = images.shape
    end = time.monotonic() + _SECONDS
    try:
        twin = copy.deepcopy(network)
    except Exception:  # some tensors cannot be copied
        return "correct it, or choose another network"

    def runs(shape: tuple[int, int, int]) -> bool:
        try:
            twin(images.new_zeros(2, *shape))
        except Exception:
            return False
        return True

    for other in _CHANNELS:
        if other != channels and runs((other, height, width)):
            one = "channel" if other == 1 else "channels"
            return (
                f"it takes images of {other} {one} and the data has {channels}: build it for {channels}, or convert "
                "the images"
            )
    for size in _SIZES:
        if (size, size) != (height, width) and time.monotonic() < end and runs((channels, size, size)):
            return (
                f"it takes images of {size} x {size} pixels and the data has {height} x {width}: resize the images "
                "(data.size and data.crop of stored images), or choose a network for their size"
            )
    return "correct it, or choose another network"
