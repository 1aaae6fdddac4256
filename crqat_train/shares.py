"""What a recipe must allow for to be trained in several processes. Imports nothing heavy."""

from __future__ import annotations

from crqat.core.errors import UsageError
from crqat.train.config import TrainConfig


def check(config: TrainConfig, processes: int) -> None:
    """Check that so many processes find their shares of each batch.

    Raises:
        UsageError: They do not; the message names the key.
    """
    for name, section in (("float", config.float_training), ("qat", config.qat)):
        if section.epochs:
            check_batch(section.batch_size, f"{name}.batch_size", processes)
    check_images(config.quantization.calibration_images, "quantization.calibration_images", processes)


def check_images(count: int, key: str, processes: int) -> None:
    """Each process calibrates with a share of the images; one without any would leave the others waiting.

    Raises:
        UsageError: There are too few.
    """
    if count < processes:
        msg = f"{key}: each of {processes} processes needs at least one, and they are {count}"
        raise UsageError(msg)


def check_batch(size: int, key: str, processes: int) -> None:
    """A batch is that of all processes together; each takes an equal share.

    Raises:
        UsageError: It cannot.
    """
    if size % processes:
        msg = f"{key}: {size} images a step cannot be shared equally by {processes} processes; take a multiple"
        raise UsageError(msg)
