"""`python -m tests.typing_stubs`: TensorRT's stubs for mypy, in `.stubs`, which is on mypy's path.

tensorrt-stubs is generated from the bindings, and a few of its signatures are no Python: an argument named `in`, one
without a default behind others with one. mypy gives up on such a file, so that it sees a repaired copy. Where the
package is not installed there is no copy, and mypy takes what comes from TensorRT for Any.
"""

from __future__ import annotations

import re
import shutil
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

STUBS = Path(__file__).parent.parent / ".stubs"


def repaired(text: str) -> str:
    """A stub file's text with the signatures that Python does not parse."""
    text = re.sub(r"\bin: (?=list\[)", "in_: ", text)
    return re.sub(r"(= None, channel_axis: int)\)", r"\1 = ...)", text)


def write(directory: Path = STUBS) -> int:
    """Write the copy anew; the number of its files, 0 if tensorrt-stubs is not installed."""
    shutil.rmtree(directory, ignore_errors=True)
    try:
        installed = [file for file in files("tensorrt-stubs") or [] if file.suffix == ".pyi"]
    except PackageNotFoundError:
        return 0
    for file in installed:
        copy = directory / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(repaired(Path(str(file.locate())).read_text()))
    return len(installed)


if __name__ == "__main__":
    print(f"{write()} stub files of TensorRT for mypy")
