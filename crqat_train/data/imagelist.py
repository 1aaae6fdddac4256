"""Reads image lists: JSON files that assign images in any folders to classes and to the training and test parts."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from crqat.core import typed_json
from crqat.core.errors import UsageError
from crqat.train.data.imagefolder import ImageFile, file_state


@dataclass(frozen=True)
class ImageList:
    """Content of an image list file.

    Attributes:
        classes: Class names, in the order of the logits.
        train: Training images: path to class, an index into `classes`. Paths are absolute or relative to `data.root`.
        test: Test images, as `train`.
        judging: Images reserved for `crqat advise`, as `train`; {} if there are none.
        labels_of: Name of the network whose predictions are the classes; "" if the classes are true labels.
    """

    classes: list[str]
    train: dict[str, int]
    test: dict[str, int]
    labels_of: str = ""
    judging: dict[str, int] = field(default_factory=dict)
    schema_version: int = field(default=1)


def read(path: Path) -> ImageList:
    """Read an image list.

    Raises:
        UsageError: The file is not an image list, a part is empty, or a class is not a valid index.
        ToolError: The file cannot be read.
    """
    found = typed_json.read(ImageList, path, "write it again by `crqat quantize`")
    for part, files in (("train", found.train), ("test", found.test), ("judging", found.judging)):
        if not files and part != "judging":
            msg = f"{path}: {part}: lists no images; write it again by `crqat quantize`"
            raise UsageError(msg)
        wrong = next((name for name, label in files.items() if not 0 <= label < len(found.classes)), None)
        if wrong is not None:
            msg = f"{path}: {part}: {wrong} has class {files[wrong]}, but the classes are 0..{len(found.classes) - 1}"
            raise UsageError(msg)
    return found


def files_of(root: Path, listed: dict[str, int]) -> tuple[ImageFile, ...]:
    """Return the images of one part of a list, with the present size and modification time of each file.

    Raises:
        ToolError: An image file cannot be read.
    """
    paths = {root / name: label for name, label in listed.items()}
    return tuple(ImageFile(path, label, *file_state(path)) for path, label in paths.items())


def outside(path: Path) -> list[Path]:
    """Return, as a list of one, the innermost folder that contains all images that a list names by absolute paths.

    The result is [] if the list has relative paths only. `path` is the image list.

    Raises:
        UsageError: See `read`.
        ToolError: See `read`.
    """
    listed = read(path)
    absolute = [name for name in (*listed.train, *listed.test, *listed.judging) if Path(name).is_absolute()]
    return [Path(os.path.commonpath([str(Path(name).parent) for name in absolute]))] if absolute else []
