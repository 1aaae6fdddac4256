"""The interface `Runner` to a runtime that runs a model file; a module for each runtime implements it."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from crqat.core.results.benchmark import Int8Layers, NodeTime


@dataclass(frozen=True)
class Description:
    """Version and provider of a runtime, and metadata of the model file that it has loaded.

    Attributes:
        runtime: "onnxruntime", "openvino" or "tensorrt".
        version: Version of the runtime.
        provider: Execution provider or device.
        metadata: Metadata of the file.
        int8_layers: How many layers OpenVINO computes in INT8, and which it does not; None for other runtimes.
    """

    runtime: str
    version: str
    provider: str
    metadata: dict[str, str]
    int8_layers: Int8Layers | None = None


class Runner(Protocol):
    """A loaded model, ready to run; a context manager that releases its resources."""

    def __enter__(self) -> Runner: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def infer(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return logits [N, classes] of normalized images [N, C, H, W]."""
        ...

    def compute_seconds(self) -> float | None:
        """Return the device's compute seconds of the last inference, without copies; None if not reported."""
        ...

    def node_times(self, image: npt.NDArray[np.float32]) -> list[NodeTime] | None:
        """Return the time of each node for a normalized image [1, C, H, W]; None if the runtime does not report it."""
        ...

    def describe(self) -> Description:
        """Return the runtime's version and provider, and the file's metadata."""
        ...
