"""Walks folders recursively, following links and visiting each real folder once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path


def walk(
    root: Path, hidden: bool = True, refuse: Callable[[OSError], None] | None = None
) -> Iterator[tuple[Path, list[str], list[str], list[str]]]:
    """Walk a folder and everything below it, in sorted order.

    Args:
        root: Folder to start in; may be a link.
        hidden: Whether to enter folders whose name begins with a dot.
        refuse: Function that is called with the error of each folder that cannot be read; None skips such folders.

    Yields:
        For each folder, a tuple: the folder, the names of its files, the names of its hidden folders that are not
        entered, and the names of its links that are not followed because their target is visited anyway. Names are
        sorted.
    """
    seen: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        status = Path(parent).stat()
        seen.add((status.st_dev, status.st_ino))
        left_out = [name for name in sorted(folders) if not hidden and name.startswith(".")]
        walked: list[str] = []
        again: list[str] = []
        for name in sorted(set(folders) - set(left_out)):
            status = Path(parent, name).stat()
            place = (status.st_dev, status.st_ino)
            (again if place in seen else walked).append(name)
            seen.add(place)
        folders[:] = walked  # os.walk continues with these
        yield Path(parent), sorted(files), left_out, again
