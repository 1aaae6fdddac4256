"""Starts and controls the process `crqat.runtime_eval.measure.worker`; any failure of it becomes a one-line error."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from crqat.core import failures, typed_json
from crqat.core.errors import ToolError
from crqat.core.results.benchmark import CountedCodes, Int8Layers, NodeTime
from crqat.runtime_eval.config import BenchmarkConfig

RUNTIME, OPENVINO = "onnxruntime", "openvino"
# File extension of a TensorRT engine.
PLAN = ".plan"
# Working directory of the worker: `python -m` searches it first and finds these packages, not the user's files.
PACKAGES = Path(__file__).parents[3]


@dataclass(frozen=True)
class Loaded:
    """First answer of a worker, sent when its model is loaded.

    Attributes:
        version: Version of the runtime.
        provider: Execution provider or device.
        classes: Number of classes that the model distinguishes.
        int8_layers: How many layers OpenVINO computes in INT8, and which it does not; None for other runtimes.
    """

    version: str
    provider: str
    classes: int
    int8_layers: Int8Layers | None


class Worker:
    """Context manager that runs one model in a process of its own; inside the `with` block the model is loaded.

    Entering it and every method raise `ToolError`, with the model, the runtime and the cause, if the process dies, is
    silent for longer than the time limit, or reports that the model failed. The process is then gone.

    Args:
        model: The ONNX file or the TensorRT plan.
        images: The .npy file of the test images, uint8 [N, C, H, W].
        config: Provider, threads and time limit.
        runtime: Runtime for an ONNX file: "onnxruntime" or "openvino".

    Attributes:
        runtime: "onnxruntime", "openvino" or "tensorrt".
        version: Version of the runtime.
        provider: Execution provider or device that runs the model.
        classes: Number of classes that the model distinguishes.
        int8_layers: How many layers OpenVINO computes in INT8, and which it does not; None for other runtimes.
    """

    runtime: str
    version: str
    provider: str
    classes: int
    int8_layers: Int8Layers | None

    def __init__(self, model: Path, images: Path, config: BenchmarkConfig, runtime: str = RUNTIME) -> None:
        self._name = model.name
        self.runtime = "tensorrt" if model.suffix == PLAN else runtime
        self._limit = config.time_limit_seconds
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (`close` closes it)
        arguments = [str(model.resolve()), str(images.resolve()), self.runtime, config.provider]
        arguments += [str(config.threads), str(int(config.cuda_graph))]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "crqat.runtime_eval.measure.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=PACKAGES,
        )
        # None marks the end. A thread reads, because not every system can read a pipe with a time limit.
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None  # noqa: S101 (a pipe was asked for; this tells mypy)
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def __enter__(self) -> Worker:
        try:
            opened = self._wait(self._limit)
        except BaseException:  # also after an interrupt, the process must not be left behind
            self._close()
            raise
        loaded = typed_json.from_json(Loaded, opened)
        self.version, self.provider, self.classes = loaded.version, loaded.provider, loaded.classes
        self.int8_layers = loaded.int8_layers
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def latency(self, warm_up_seconds: float, seconds: float) -> tuple[list[float], list[float]]:
        """Measure the seconds of each inference at batch 1 for `seconds`, after `warm_up_seconds`.

        Returns:
            The end-to-end times, and the device's compute times (empty if the runtime does not report them).
        """
        limit = self._limit + warm_up_seconds + seconds
        command = {"command": "latency", "warm_up_seconds": warm_up_seconds, "seconds": seconds}
        samples, computed = self._ask(command, limit)
        return samples, computed

    def node_times(self) -> list[NodeTime] | None:
        """Return the time of each node at batch 1; None if the runtime does not report it."""
        found = self._ask({"command": "node_times"}, self._limit)
        return None if found is None else [typed_json.from_json(NodeTime, row) for row in found]

    def memory(self) -> int | None:
        """Return the peak resident bytes of the process so far; None if the system does not report them."""
        peak: int | None = self._ask({"command": "memory"}, self._limit)
        return peak

    def accuracy(self, batch: int, out: Path, progress: Callable[[int, int], None]) -> None:
        """Write the most probable classes of each image, best first, to a .npy file: int64 [N, min(5, classes)].

        Args:
            batch: Batch size.
            out: The .npy file.
            progress: Callback with (number of images done, number of all images).
        """
        self._ask({"command": "accuracy", "batch": batch, "out": str(out.resolve())}, self._limit, progress)

    def codes(self, expected: Path) -> CountedCodes:
        """Count the codes on this CPU that differ from the expected ones; see `measure.codes.check_codes`."""
        counted = self._ask({"command": "codes", "expected": str(expected.resolve())}, self._limit)
        return typed_json.from_json(CountedCodes, counted)

    def _close(self) -> None:
        """Kill the process, wait until it is gone, and close its pipes."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):  # the process is gone before a command was sent
                if pipe is not None:
                    pipe.close()
        self._errors.close()

    def _ask(
        self, command: Mapping[str, object], limit: float, progress: Callable[[int, int], None] | None = None
    ) -> Any:
        assert self._process.stdin is not None  # noqa: S101 (as above)
        with contextlib.suppress(BrokenPipeError):  # the process died; `_wait` finds the cause
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        return self._wait(limit, progress)

    def _wait(self, limit: float, progress: Callable[[int, int], None] | None = None) -> Any:
        while True:
            try:
                line = self._lines.get(timeout=limit)
            except queue.Empty:
                cause = f"no answer for {limit:g} s, considered hung and killed"
                raise self._failure(cause) from None
            if line is None or not line.endswith("\n"):  # half a line: the process died in the middle of an answer
                raise self._failure(self._death())
            answer = json.loads(line)
            if "error" in answer:
                raise self._failure(" ".join(answer["error"].split()))
            if "result" in answer:
                return answer["result"]
            if progress is not None:
                progress(*answer["progress"])

    def _death(self) -> str:
        """Return why the process ended by itself, with its last line of output."""
        code = self._process.wait()
        cause = (
            f"its process was ended by {failures.signal_name(-code)}" if code < 0 else f"its process exited with {code}"
        )
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(words) if line.strip()), None)
        return f"{cause}, last output: {last}" if last else cause

    def _failure(self, cause: str) -> ToolError:
        self._close()
        return ToolError(f"{self._name} in {self.runtime}: {cause}")
