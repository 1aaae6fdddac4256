"""The runtimes, one file each, and what they have in common."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from crqat.core.results.benchmark import Int8Layers, NodeTime


@dataclass(frozen=True)
class Description:
    """What a runner says of itself and of its file.

    Attributes:
        runtime: "onnxruntime", "openvino" or "tensorrt".
        version: Of the runtime.
        provider: The execution provider or device.
        metadata: The file's own.
        int8_layers: What OpenVINO made of the layers that multiply; None in another runtime.
    """

    runtime: str
    version: str
    provider: str
    metadata: dict[str, str]
    int8_layers: Int8Layers | None = None


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

    def node_times(self, image: npt.NDArray[np.float32]) -> list[NodeTime] | None:
        """What each node of the runtime's graph takes for a normalized image [1, C, H, W]; None if it does not tell."""
        ...

    def describe(self) -> Description:
        """What it is, and the file's own metadata."""
        ...
