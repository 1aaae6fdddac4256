"""A pickle that runs a command when it is loaded, and a loader that lets it, in a process of its own."""

from __future__ import annotations

import os
from pathlib import Path

from tests import own_process

_LOADS = {
    "pickle": "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))",
    "torch": "import sys, torch; torch.load(sys.argv[1], weights_only=False)",
}


class Hostile:
    """An object whose pickle creates the file `marker` when it is loaded."""

    def __init__(self, marker: str | Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch '{self.marker}'",)


def load_without_care(path: Path, library: str) -> None:
    """Load a file as a reader that trusts it would.

    Args:
        path: The file.
        library: "pickle" or "torch".
    """
    ended = own_process.run(path.parent, "-c", _LOADS[library], str(path))
    assert ended.returncode == 0, ended.stderr
