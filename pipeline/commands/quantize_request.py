"""The options of one call of `crqat quantize`, and errors that name them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from crqat.core.errors import ToolError, UsageError
from crqat.train.config import is_onnx_file

_Number = TypeVar("_Number", int, float)
# Maps keys of a recipe in error messages to options, because users of this command have written no recipe.
_OPTIONS = {
    r"model\.name": "MODEL",
    r"model\.weights": "--weights",
    r"quantization\.(weights|activations)": "--bits",
    r"data\.(mean|std|size|crop|interpolation)(\.\d+)?": r"--\1",
    r"set data\.channels: 1": "give one number for --mean and for --std",
    r", or set data\.convert: true to convert such images": "",
    "--runs": "--out",
}


@dataclass(frozen=True)
class Request:
    """Options of one call of `crqat quantize`.

    Attributes:
        model: Network as in `model.name` of a recipe, such as a float ONNX file, or the bare name of a torchvision or
            timm network.
        images: Folder with one folder of images for each class, or with images alone.
        test: Folder of the same kind with the test images; None splits `images`.
        weights: Checkpoint; None uses weights that torchvision or timm publish, or those of an ONNX file.
        labels: Whether class folders are used as labels.
        classes: Number of logits if class folders do not give it; None means 1,000 for published weights, or an ONNX
            file's own number.
        bits: Bit widths of weights and activations.
        advise: Whether half of the test images select the quantization method; the other half tests the network
            that the selected method gives.
        max_drop: Allowed accuracy drop in percentage points; without it (None), the results are not judged.
        seed: Seed of the random split into calibration and test images.
        preprocessing: Given values of `mean`, `std`, `size`, `crop` and `interpolation`, by their key in a recipe's
            `data` section.
        out: Directory for the recipe, the list of images and the run.
    """

    model: str
    images: Path
    test: Path | None
    weights: str | None
    labels: bool
    classes: int | None
    bits: tuple[int, int]
    advise: bool
    max_drop: float | None
    seed: int
    preprocessing: dict[str, Any]
    out: Path


@contextmanager
def in_options(out: Path) -> Iterator[None]:
    """Context manager in which errors name the options of the command, not the keys of the recipe that it writes.

    Args:
        out: Directory of the recipe.
    """
    try:
        yield
    except (UsageError, ToolError) as error:
        parts = str(error).replace(f"{out / 'recipe.yaml'}: ", "").split("; ")
        for key, option in _OPTIONS.items():
            parts = [re.sub(key, option, part) for part in parts]
        # If several numbers of an option are wrong for the same reason, the reason is given once.
        raise type(error)("; ".join(dict.fromkeys(parts))) from error


def numbers(given: str, option: str, kind: Callable[[str], _Number]) -> list[_Number]:
    """Return the numbers in a text that separates them by commas, converted by `kind`.

    Raises:
        UsageError: The text is not a list of numbers; the message names the option.
    """
    try:
        return [kind(part) for part in given.split(",")]
    except ValueError:
        msg = f"{option}: {given} is not a list of numbers, such as 8,8 or 0.485,0.456,0.406"
        raise UsageError(msg) from None


def run_name(model: str, bits: Sequence[int]) -> str:
    """Return a name for the run of `model` at these bit widths that is valid as the name of a directory."""
    model = Path(model).stem if is_onnx_file(model) else model
    letters = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in model)
    return f"{letters}-w{bits[0]}a{bits[1]}"
