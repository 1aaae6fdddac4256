"""Checks that all processes of a training run get enough images and equal shares of each batch.

Imports nothing heavy.
"""

from __future__ import annotations

from crqat.core.errors import UsageError
from crqat.train.config import TrainConfig


def check(config: TrainConfig, processes: int) -> None:
    """Check that every process gets an equal share of each batch and at least one calibration image.

    Raises:
        UsageError: The recipe's sizes do not allow it; the message names the key.
    """
    for name, section in (("float", config.float_training), ("qat", config.qat)):
        if section.epochs:
            check_batch(section.batch_size, f"{name}.batch_size", processes)
    check_images(config.quantization.calibration_images, "quantization.calibration_images", processes)


def check_images(count: int, key: str, processes: int) -> None:
    """Check that there is at least one image for each process: a process without any would leave the others waiting.

    Raises:
        UsageError: There are fewer images than processes.
    """
    if count < processes:
        msg = f"{key}: each of {processes} processes needs at least one image, but there are {count}"
        raise UsageError(msg)


def check_batch(size: int, key: str, processes: int) -> None:
    """Check that the processes can share a batch equally; its size counts the images of all processes.

    Raises:
        UsageError: The size is not a multiple of the number of processes.
    """
    if size % processes:
        msg = (
            f"{key}: {size} images a step cannot be shared equally by {processes} processes; take a multiple of "
            f"{processes}"
        )
        raise UsageError(msg)
