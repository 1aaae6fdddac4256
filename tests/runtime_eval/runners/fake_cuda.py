"""A CUDA device and TensorRT's engine objects as `TensorRTRunner` sees them, for a machine that has neither.

The stream does nothing before it is waited for, as a real one may, so that what is read too early is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
PLAN = b"a plan"


class FakeCuda:
    """Stands for `crqat.runtime_eval.runners.tensorrt.Cuda`.

    Attributes:
        memory: The device's memory by address.
        calls: What was asked of the device, in order.
    """

    capability = (8, 7)
    stream = 77
    here: FakeCuda

    def __init__(self) -> None:
        self.memory: dict[int, Array] = {}
        self.calls: list[str] = []
        self.clock = 0.0
        self._queue: list[Callable[[], None]] = []
        self._capturing: list[Callable[[], None]] | None = None
        FakeCuda.here = self

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return np.full(shape, 99, dtype)

    def device_memory(self, size: int) -> int:
        address = 4096 * (len(self.memory) + 1)
        self.memory[address] = np.full(size, 0xAB, np.uint8)
        return address

    def enqueue(self, work: Callable[[], None]) -> None:
        (self._queue if self._capturing is None else self._capturing).append(work)

    def to_device(self, address: int, array: Array) -> None:
        def work() -> None:
            self.memory[address][: array.nbytes] = np.ascontiguousarray(array).view(np.uint8).ravel()

        self.enqueue(work)

    def to_host(self, array: Array, address: int) -> None:
        def work() -> None:
            array[...] = self.memory[address][: array.nbytes].view(array.dtype).reshape(array.shape)

        self.enqueue(work)

    def event(self) -> list[float]:
        return []

    def record(self, event: list[float]) -> None:
        self.enqueue(lambda: event.append(self.clock))

    def milliseconds(self, start: list[float], end: list[float]) -> float:
        return end[-1] - start[-1]

    def synchronize(self) -> None:
        self.calls.append("synchronize")
        for work in self._queue:
            work()
        self._queue = []

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        self.calls.append("capture")
        captured: list[Callable[[], None]] = []
        self._capturing = captured
        enqueue()
        self._capturing = None
        return lambda: self._queue.extend(captured)

    def close(self) -> None:
        self.calls.append("close")
        self.memory = {}


class FakeEngine:
    """Logits are the sums of the channels' pixels, and 3 ms pass for each image of the batch.

    Attributes:
        smallest: Smallest batch of the profile; None makes a static engine of batch `largest`.
        trouble: The call that fails.
    """

    smallest: int | None = 1
    largest = 4
    names = ("logits", "input")
    dtype = "float32"
    image = (3, 2, 2)
    trouble: str | None = None
    num_io_tensors = 2

    def __init__(self) -> None:
        self._addresses: dict[str, int] = {}
        self._batch = self.largest

    def _goes_well(self, call: str) -> bool:
        if self.trouble == call:
            FakeTensorRT.log.log(FakeTensorRT.ILogger.ERROR, f"{call}\nwent wrong")
        return self.trouble != call

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if name == "input" else "OUTPUT"

    def get_tensor_dtype(self, name: str) -> str:
        return self.dtype if name == "input" else "float32"

    def get_tensor_shape(self, name: str) -> list[int]:
        return [self.largest if self.smallest is None else -1, *(self.image if name == "input" else (3,))]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        assert (name, profile_index) == ("input", 0)  # of an output it would crash
        return [[self.smallest or 0, 3, 2, 2], [1, 3, 2, 2], [self.largest, 3, 2, 2]]

    def create_execution_context(self) -> FakeEngine | None:
        return self if self._goes_well("create_execution_context") else None

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return self._goes_well("set_tensor_address")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.smallest is not None
        self._batch = shape[0]
        return self._goes_well("set_input_shape") and self.smallest <= shape[0] <= self.largest

    def infer_shapes(self) -> list[str]:
        return [] if self._goes_well("infer_shapes") else ["input"]

    def execute_async_v3(self, stream_handle: int) -> bool:
        cuda, batch = FakeCuda.here, self._batch
        assert stream_handle == cuda.stream
        cuda.calls.append("execute")

        def work() -> None:
            dtype = np.dtype(self.dtype)
            given = cuda.memory[self._addresses["input"]][: batch * 12 * dtype.itemsize].view(dtype)
            logits = given.reshape(batch, 3, 4).sum(axis=2).astype(np.float32)
            cuda.memory[self._addresses["logits"]][: logits.nbytes] = logits.view(np.uint8).ravel()
            cuda.clock += 3.0 * batch

        cuda.enqueue(work)
        return self._goes_well("execute_async_v3")


class FakeTensorRT(ModuleType):
    """The module `tensorrt`, version 10.3.0."""

    __version__ = "10.3.0"
    float32, float16, int8 = "float32", "float16", "int8"
    log: Any

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = 0, 1, 2

        def __init__(self) -> None:
            FakeTensorRT.log = self

    class TensorIOMode:
        INPUT, OUTPUT = "INPUT", "OUTPUT"

    class Runtime:
        def __init__(self, logger: Any) -> None:
            assert logger is FakeTensorRT.log

        def deserialize_cuda_engine(self, plan: bytes) -> FakeEngine | None:
            FakeTensorRT.log.log(FakeTensorRT.ILogger.WARNING, "no cause")
            if plan == PLAN:
                return FakeEngine()
            FakeTensorRT.log.log(FakeTensorRT.ILogger.ERROR, "magic tag does not match")
            return None
