"""Folders that are read whole, with links in them followed and each real folder read once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path


def walk(
    root: Path, hidden: bool = True, refuse: Callable[[OSError], None] | None = None
) -> Iterator[tuple[Path, list[str], list[str], list[str]]]:
    """A folder and all below it, in sorted order.

    Args:
        root: Where to start; may be a link.
        hidden: Whether folders whose name begins with a dot are walked, too.
        refuse: Told of a folder that cannot be read; None passes over it.

    Yields:
        The folder, and the sorted names of its files, of its folders that are not walked because they are hidden, and
        of those that are not walked because they are links to a folder that is walked anyway.
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
        folders[:] = walked  # os.walk goes on with these
        yield Path(parent), sorted(files), left_out, again
