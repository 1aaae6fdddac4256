"""The Grid: quantization parameters (scale, zero point, code range) of one edge, used by every stage after training.

A real value v has the integer code ``q = clip(rint(v / scale) + zero_point, qmin, qmax)``, and a code has the value
``(q - zero_point) * scale``; rint rounds half to even, as ONNX QuantizeLinear does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from crqat.core import strict_json
from crqat.core.errors import ToolError, UsageError


@dataclass(frozen=True)
class Grid:
    """Quantization parameters of one edge of the network.

    Attributes:
        scale: float32 array of shape [1] (per tensor) or [C] (per channel); every entry is finite and positive.
        zero_point: Code of the value 0.0, the same for all channels.
        qmin: Smallest code.
        qmax: Largest code.
        axis: Channel axis of a per-channel Grid; None for a per-tensor Grid.
    """

    scale: npt.NDArray[np.float32]
    zero_point: int
    qmin: int
    qmax: int
    axis: int | None = None

    def __post_init__(self) -> None:
        scale = np.asarray(self.scale, dtype=np.float32)
        object.__setattr__(self, "scale", scale)
        if scale.ndim != 1 or scale.size == 0 or (self.axis is None and scale.size != 1):
            msg = f"a Grid's scale has shape [1], or [channels] with an axis; got {scale.shape} with axis {self.axis}"
            raise ValueError(msg)
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            msg = "a Grid's scale must be finite and positive in every channel"
            raise ValueError(msg)
        if not self.qmin <= self.zero_point <= self.qmax or self.qmin == self.qmax:
            found = f"got qmin {self.qmin}, qmax {self.qmax}, zero point {self.zero_point}"
            msg = f"a Grid needs qmin < qmax, and a zero point from qmin to qmax; {found}"
            raise ValueError(msg)
        if self.qmin < -(2**31) or self.qmax >= 2**31:
            msg = f"a Grid's codes are 32-bit integers, not [{self.qmin}, {self.qmax}]"
            raise ValueError(msg)

    def _scale_for(self, ndim: int) -> npt.NDArray[np.float32]:
        if self.axis is None:
            return self.scale.reshape(())
        shape = [1] * ndim
        shape[self.axis] = -1
        return self.scale.reshape(shape)

    def quantize(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
        """Return the integer codes of float32 values, in the same shape; the values must not contain NaN."""
        codes = np.rint(values.astype(np.float32) / self._scale_for(values.ndim)) + np.float32(self.zero_point)
        clipped: npt.NDArray[np.int32] = np.clip(codes, self.qmin, self.qmax).astype(np.int32)
        return clipped

    def dequantize(self, codes: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Return the float32 values of integer codes, in the same shape."""
        return (codes.astype(np.int32) - self.zero_point).astype(np.float32) * self._scale_for(codes.ndim)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that `from_json` restores bit for bit (a double holds every float32 exactly)."""
        return {
            "scale": [float(s) for s in self.scale],
            "zero_point": self.zero_point,
            "qmin": self.qmin,
            "qmax": self.qmax,
            "axis": self.axis,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Grid:
        """Return the Grid of a JSON object that `to_json` made.

        Raises:
            ValueError: The object is not a Grid.
        """
        try:
            scale, axis = np.array(data["scale"], dtype=np.float32), data["axis"]
            integers = (data["zero_point"], data["qmin"], data["qmax"])
            if not all(type(value) is int for value in (*integers, 0 if axis is None else axis)):
                msg = "zero_point, qmin, qmax and axis must be integers"
                raise ValueError(msg)
            return cls(scale, *integers, axis)
        except (KeyError, TypeError, OverflowError) as error:
            msg = f"a Grid lacks a key, or has a value of a wrong type: {error!r}"
            raise ValueError(msg) from error


def save_grids(path: Path, grids: Mapping[str, Grid]) -> None:
    """Write the Grids of a network, by edge name, as a JSON file."""
    path.write_text(json.dumps({edge: grid.to_json() for edge, grid in grids.items()}, indent=1, sort_keys=True))


def load_grids(path: Path) -> dict[str, Grid]:
    """Return the Grids in a file that `save_grids` wrote, by edge name.

    Raises:
        UsageError: The file is not a JSON object of Grids.
        ToolError: The file cannot be read.
    """
    try:
        return {str(edge): Grid.from_json(data) for edge, data in strict_json.read(path).items()}
    except (ValueError, AttributeError) as error:
        msg = f"{path}: not a file of Grids ({error}); train the run again"
        raise UsageError(msg) from error
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}"
        raise ToolError(msg) from error


def grids_hash(grids: Mapping[str, Grid]) -> str:
    """Return the SHA-256 of all Grids of a network; it shows which trained network a file was exported from."""
    text = json.dumps({edge: grid.to_json() for edge, grid in grids.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
