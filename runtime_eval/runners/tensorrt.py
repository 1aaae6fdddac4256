"""Runs a TensorRT plan on a CUDA device through pycuda.

Tensors are addressed by name, which needs TensorRT 8.5 or later.

Only `Cuda` and TensorRT's own objects access the device; tests without a GPU replace them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from crqat.core.errors import ToolError
from crqat.runtime_eval.machine.host import cuda_device
from crqat.runtime_eval.runners import Description
from crqat.runtime_eval.trt import plan_file

if TYPE_CHECKING:
    import tensorrt as trt

Array = npt.NDArray[Any]
INPUT, OUTPUT = "input", "logits"


class TensorRTRunner:
    """`Runner` for a plan that takes "input" and returns "logits", with the batch as first dimension.

    One inference copies the images into page-locked memory and then, in one stream, to the device, computes, and copies
    back. More images than the plan's largest batch are run in parts; fewer than its smallest batch are padded with
    zeros.

    Args:
        path: File of the plan; its sidecar (see `crqat.runtime_eval.trt.plan_file`) lies next to it.
        graph: Whether to replay the computation as a CUDA graph, captured once for each batch size; needs cuda-python.

    Raises:
        ToolError: CUDA device, TensorRT or pycuda is missing; the plan is for another TensorRT or device; or TensorRT
            refuses the plan.
        UsageError: The plan or its sidecar is missing or damaged.
    """

    def __init__(self, path: Path, graph: bool = False) -> None:
        if not cuda_device():
            msg = "no CUDA device"
            raise ToolError(msg)
        version = tensorrt_version()
        self._path, self._graph = path, graph
        self._cuda = Cuda()
        try:
            plan, self._sidecar = plan_file.load(path, "tensorrt", version, self._cuda.capability)
            self._open(plan)
        except BaseException:
            self._close()
            raise
        self._compute: float | None = None

    def _open(self, plan: bytes) -> None:
        import tensorrt as trt

        self._log = _log()  # TensorRT's objects use it as long as they live
        self._runtime = trt.Runtime(self._log)
        engine = self._runtime.deserialize_cuda_engine(plan)
        self._check(engine is not None, "does not load the plan")
        self._engine = engine
        self._check(
            self._tensors() == {INPUT: True, OUTPUT: False},
            f"finds the tensors {sorted(self._tensors())} in the plan, not {[INPUT, OUTPUT]}",
        )
        context = engine.create_execution_context()
        self._check(context is not None, "makes no execution context")
        self._context = context
        shape = _shape(engine.get_tensor_shape(INPUT))
        self._check(min(shape[1:]) > 0, f"takes images of any size {list(shape)}, which no model of crqat does")
        self._dynamic = shape[0] < 0
        self._smallest = self._largest = shape[0]
        if self._dynamic:
            low, _, high = engine.get_tensor_profile_shape(INPUT, 0)
            self._smallest, self._largest = _shape(low)[0], _shape(high)[0]
        self._images = self._buffer(INPUT, (self._largest, *shape[1:]))
        self._logits = self._buffer(OUTPUT, (self._largest, *_shape(engine.get_tensor_shape(OUTPUT))[1:]))
        self._marks = self._cuda.event(), self._cuda.event()
        self._shape: tuple[int, ...] | None = None
        self._launch: Callable[[], None] = self._enqueue

    def _tensors(self) -> dict[str, bool]:
        """Return the names of the plan's input and output tensors, each with whether it is an input."""
        import tensorrt as trt

        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        return {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}

    def _buffer(self, name: str, shape: tuple[int, ...]) -> tuple[Array, int]:
        """Allocate page-locked memory and device memory for a tensor, and give TensorRT the device address."""
        import tensorrt as trt

        dtype = self._engine.get_tensor_dtype(name)
        self._check(dtype in (trt.float32, trt.float16), f"uses {dtype} for the tensor {name}, not a float type")
        host = self._cuda.pinned(shape, np.dtype(np.float16 if dtype == trt.float16 else np.float32))
        host[...] = 0
        address = self._cuda.device_memory(host.nbytes)
        self._check(self._context.set_tensor_address(name, address), f"takes no address for {name}")
        return host, address

    def __enter__(self) -> TensorRTRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        """Release all resources: TensorRT's objects first, because their memory belongs to the CUDA context."""
        for name in ("_launch", "_images", "_logits", "_marks", "_context", "_engine", "_runtime"):
            self.__dict__.pop(name, None)
        self._cuda.close()

    def infer(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return float32 logits [N, classes] of normalized float32 images [N, C, H, W]."""
        parts, compute = [], 0.0
        for start in range(0, len(images), self._largest):
            logits, seconds = self._infer(images[start : start + self._largest])
            parts.append(logits)
            compute += seconds
        self._compute = compute
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def compute_seconds(self) -> float | None:
        """Return the device's compute seconds of the last inference, without the copies."""
        return self._compute

    def _infer(self, images: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], float]:
        count = len(images)
        batch = max(count, self._smallest)
        (host, device), (host_logits, device_logits) = self._images, self._logits
        host[:count] = images
        host[count:batch] = 0
        self._prepare((batch, *host.shape[1:]))
        start, end = self._marks
        self._cuda.to_device(device, host[:batch])
        self._cuda.record(start)
        self._launch()
        self._cuda.record(end)
        self._cuda.to_host(host_logits[:batch], device_logits)
        self._cuda.synchronize()
        # A copy: the next inference overwrites the memory.
        return np.array(host_logits[:count], dtype=np.float32), self._cuda.milliseconds(start, end) / 1e3

    def _prepare(self, shape: tuple[int, ...]) -> None:
        """Prepare the context for inputs of a shape; does nothing if the last inputs had this shape."""
        if shape == self._shape:
            return
        if self._dynamic:
            self._check(self._context.set_input_shape(INPUT, shape), f"takes no input {list(shape)}")
            missing = self._context.infer_shapes()
            self._check(not missing, f"does not know the shape of {', '.join(missing)}")
        self._launch = self._enqueue
        if self._graph:
            self._enqueue()  # lazy allocations must not happen during the capture
            self._cuda.synchronize()
            self._launch = self._cuda.capture(self._enqueue)
        self._shape = shape

    def _enqueue(self) -> None:
        self._check(self._context.execute_async_v3(self._cuda.stream), "does not start the inference")

    def _check(self, good: bool, what: str) -> None:
        """Raise if a TensorRT call failed: such calls return False or None and log the cause."""
        if not good:
            cause = f": {self._log.last}" if self._log.last else ""
            msg = f"TensorRT {what} ({self._path.name}){cause}"
            raise ToolError(msg)

    def node_times(self, _image: npt.NDArray[np.float32]) -> None:
        """Return None: the time of each layer is not measured in TensorRT."""
        return

    def describe(self) -> Description:
        """Return TensorRT's version, the device's compute capability and the file's metadata, from the sidecar."""
        provider = f"compute capability {self._sidecar.compute_capability}"
        return Description("tensorrt", self._sidecar.version, provider, self._sidecar.metadata)


def tensorrt_version() -> str:
    """Return the version of the installed TensorRT.

    Raises:
        ToolError: TensorRT is not installed. A stub-only `tensorrt` package counts as not installed.
    """
    try:
        import tensorrt as trt

        return str(trt.__version__)
    except (ImportError, AttributeError, OSError) as error:  # OSError: its shared libraries are missing
        msg = (
            "no TensorRT in this Python; JetPack's is in the system's interpreter "
            "(python3 -m venv --system-site-packages), elsewhere pip install tensorrt"
        )
        raise ToolError(msg) from error


def device_capability() -> tuple[int, int]:
    """Return the compute capability (major, minor) of this machine's CUDA device, for which plans are built.

    Raises:
        ToolError: There is no CUDA device, or CUDA does not start.
    """
    if not cuda_device():
        msg = "no CUDA device"
        raise ToolError(msg)
    cuda = Cuda()
    try:
        return cuda.capability
    finally:
        cuda.close()


def _shape(dims: trt.Dims) -> tuple[int, ...]:
    return tuple(dims[index] for index in range(len(dims)))


def _log() -> Any:
    """Return a TensorRT logger that keeps the last error, the cause of a failed call.

    The class is defined here because it needs TensorRT to be imported.
    """
    import tensorrt as trt

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = ""

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.last = " ".join(msg.split())

    return Log()


class Cuda:
    """Access to CUDA: the first device's primary context, one stream, memory, events and graphs.

    The context is the primary one, so that other libraries of the process share it. It belongs to this thread until
    `close`.

    Attributes:
        capability: Compute capability of the device, major and minor.
        stream: Handle of the stream.

    Raises:
        ToolError: pycuda is not installed, or CUDA does not start.
    """

    def __init__(self) -> None:
        try:
            import pycuda.driver as driver
        except (ImportError, OSError) as error:
            msg = f"pycuda is not installed ({error}); with CUDA's nvcc on PATH: pip install pycuda"
            raise ToolError(msg) from error
        self._driver = driver
        try:
            driver.init()
            device = driver.Device(0)
            major, minor = device.compute_capability()
            self._context = device.retain_primary_context()
            self._context.push()
        except driver.Error as error:
            msg = f"CUDA does not start: {error}; check the device's driver"
            raise ToolError(msg) from error
        self.capability = (int(major), int(minor))
        self._stream = driver.Stream()
        self.stream = int(self._stream.handle)
        self._memory: list[Any] = []
        self._graphs: list[Callable[[], None]] = []

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return page-locked host memory, which can be copied to and from the device asynchronously."""
        memory: Array = self._driver.pagelocked_empty(shape, dtype)
        return memory

    def device_memory(self, size: int) -> int:
        """Return the address of `size` bytes on the device, kept until `close`."""
        self._memory.append(self._driver.mem_alloc(size))
        return int(self._memory[-1])

    def to_device(self, address: int, array: Array) -> None:
        """Enqueue a copy of a host array to an address on the device."""
        self._driver.memcpy_htod_async(address, array, self._stream)

    def to_host(self, array: Array, address: int) -> None:
        """Enqueue a copy from an address on the device to a host array."""
        self._driver.memcpy_dtoh_async(array, address, self._stream)

    def event(self) -> Any:
        """Return a CUDA event that records the time."""
        return self._driver.Event()

    def record(self, event: Any) -> None:
        """Record an event after the work enqueued so far."""
        event.record(self._stream)

    def milliseconds(self, start: Any, end: Any) -> float:
        """Return the device time between two completed events, in milliseconds."""
        return float(start.time_till(end))

    def synchronize(self) -> None:
        """Wait until all enqueued work is done."""
        self._stream.synchronize()

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Return a function that replays, as a CUDA graph, the work that `enqueue` enqueues. Frees the previous graph.

        Raises:
            ToolError: cuda-python is not installed, or the work cannot be captured.
        """
        try:
            from cuda.bindings import runtime
        except ImportError:
            try:
                from cuda import cudart as runtime  # before cuda-python 12.8
            except ImportError as error:
                msg = "CUDA graphs need cuda-python; pip install cuda-python or set benchmark.cuda_graph to false"
                raise ToolError(msg) from error
        self._free_graphs()
        _cuda_call("cudaStreamBeginCapture", runtime, self.stream, runtime.cudaStreamCaptureMode(1))  # this thread
        try:
            enqueue()
        finally:  # a stream left in capture mode would be unusable
            results = runtime.cudaStreamEndCapture(self.stream)
        graph = _checked("cudaStreamEndCapture", results)
        executable = _cuda_call("cudaGraphInstantiate", runtime, graph, 0)
        self._graphs = [
            lambda: _cuda_call("cudaGraphExecDestroy", runtime, executable),
            lambda: _cuda_call("cudaGraphDestroy", runtime, graph),
        ]
        return lambda: _cuda_call("cudaGraphLaunch", runtime, executable, self.stream)

    def _free_graphs(self) -> None:
        for free in self._graphs:
            free()
        self._graphs = []

    def close(self) -> None:
        """Free graphs, device memory and stream, and release the CUDA context."""
        self._free_graphs()
        for memory in self._memory:
            memory.free()
        self._memory = []
        del self._stream
        self._context.pop()
        self._context.detach()


def _cuda_call(name: str, runtime: Any, *arguments: Any) -> Any:
    """Call a function of cuda-python's runtime, which never raises, and check its error code."""
    return _checked(name, getattr(runtime, name)(*arguments))


def _checked(name: str, results: tuple[Any, ...]) -> Any:
    """Return the result of a CUDA call, which follows the error code in `results`; None if it has no result.

    Raises:
        ToolError: The error code is not 0.
    """
    if int(results[0]) != 0:
        msg = f"{name} failed: {getattr(results[0], 'name', results[0])}; set benchmark.cuda_graph to false"
        raise ToolError(msg)
    return results[1] if len(results) > 1 else None
