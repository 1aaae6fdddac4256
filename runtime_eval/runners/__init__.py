"""The runtimes, one file each, and what they have in common."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class Runner(Protocol):
    """A model that is loaded and ready; a context manager that gives back what it holds."""

    def __enter__(self) -> Runner: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def infer(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits [N, classes] of normalized images [N, C, H, W]."""
        ...

    def compute_seconds(self) -> float | None:
        """Seconds that the device computed in the last inference, without the copies; None if it does not tell."""
        ...

    def describe(self) -> dict[str, Any]:
        """`runtime`, `version`, `provider`, and the file's own `metadata` (strings by name)."""
        ...
