"""Images that a JSON file lists, with their classes: any folder, split as its writer wanted."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from crqat.core import typed_json
from crqat.core.errors import UsageError
from crqat.train.data.imagefolder import ImageFile, file_state


@dataclass(frozen=True)
class ImageList:
    """The file's layout.

    Attributes:
        classes: Names, in the order of the logits.
        train: Path to class, an index into `classes`; relative to `data.root`, or absolute.
        test: Likewise.
        judging: Likewise: what `crqat advise` judges on, seen by nothing else; {} if nothing is advised on.
        labels_of: What gave the classes if it was no person, such as a network's name; "" if they are labels.
    """

    classes: list[str]
    train: dict[str, int]
    test: dict[str, int]
    labels_of: str = ""
    judging: dict[str, int] = field(default_factory=dict)
    schema_version: int = field(default=1)


def read(path: Path) -> ImageList:
    """The list in a file.

    Raises:
        UsageError: It is no such file, a part is empty, or a class is no index.
        ToolError: It cannot be read.
    """
    found = typed_json.read(ImageList, path, "write it again by `crqat quantize`")
    for part, files in (("train", found.train), ("test", found.test), ("judging", found.judging)):
        if not files and part != "judging":
            msg = f"{path}: {part}: lists no images"
            raise UsageError(msg)
        wrong = next((name for name, label in files.items() if not 0 <= label < len(found.classes)), None)
        if wrong is not None:
            msg = f"{path}: {part}: {wrong} is of class {files[wrong]}, and there are {len(found.classes)} classes"
            raise UsageError(msg)
    return found


def files_of(root: Path, listed: dict[str, int]) -> tuple[ImageFile, ...]:
    """The images of one part, as they are now.

    Raises:
        ToolError: One cannot be read.
    """
    paths = {root / name: label for name, label in listed.items()}
    return tuple(ImageFile(path, label, *file_state(path)) for path, label in paths.items())


def outside(path: Path) -> list[Path]:
    """The folder that all absolute paths of a list lie in; none if there are none.

    Raises:
        UsageError: As `read`.
        ToolError: As `read`.
    """
    listed = read(path)
    absolute = [name for name in (*listed.train, *listed.test, *listed.judging) if Path(name).is_absolute()]
    return [Path(os.path.commonpath([str(Path(name).parent) for name in absolute]))] if absolute else []
