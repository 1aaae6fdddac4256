"""The process that runs one model; its arguments are MODEL IMAGES RUNTIME PROVIDER THREADS GRAPH.

MODEL is a TensorRT plan (.plan), for which GRAPH (0 or 1) selects a CUDA graph, or an ONNX file for RUNTIME
"onnxruntime" (on its execution PROVIDER) or "openvino", for which THREADS applies.

A model runs in its own process so that a crash of the runtime affects nothing else, the peak memory is the model's, and
each round of latency starts in a new process. One JSON command per line comes in on standard input. Each is answered on
standard output by any number of ``{"progress": [done, total]}`` and one ``{"result": ...}`` or ``{"error": "text"}``.
The first answer, before any command, reports that the model is loaded. The process ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from crqat.core.errors import CrqatError, ToolError
from crqat.core.preprocessing import Preprocessing
from crqat.core.typed_json import to_json
from crqat.runtime_eval.machine.host import die_first
from crqat.runtime_eval.measure.accuracy import top_classes
from crqat.runtime_eval.measure.worker_client import OPENVINO, PLAN, Loaded

if TYPE_CHECKING:
    from crqat.runtime_eval.runners import Runner

Images = npt.NDArray[np.uint8]
Answer = Callable[[Mapping[str, object]], None]


def preprocessing(metadata: dict[str, str]) -> Preprocessing:
    """Return the normalization of images that is stored in a model file's metadata.

    Raises:
        ToolError: The file does not store it.
    """
    try:
        return Preprocessing.from_json(json.loads(metadata["crqat.preprocessing"]))
    except (KeyError, TypeError, ValueError) as error:
        msg = f"the file's metadata has no usable crqat.preprocessing ({error!r}); export it again"
        raise ToolError(msg) from error


def latency(
    runner: Runner, image: npt.NDArray[np.float32], warm_up_seconds: float, seconds: float
) -> tuple[list[float], list[float]]:
    """Measure the seconds of each inference of `image`, float32 [1, C, H, W], for about `seconds` and at least once.

    Returns:
        The end-to-end times, and the device's compute times (empty if the runtime does not report them).
    """
    end = time.perf_counter() + warm_up_seconds
    while time.perf_counter() < end:
        runner.infer(image)
    samples: list[float] = []
    computed: list[float] = []
    end = time.perf_counter() + seconds
    while not samples or time.perf_counter() < end:
        start = time.perf_counter()
        runner.infer(image)
        samples.append(time.perf_counter() - start)
        if (compute := runner.compute_seconds()) is not None:
            computed.append(compute)
    return samples, computed


def predictions(
    runner: Runner, prepare: Preprocessing, images: Images, batch: int, progress: Callable[[int], None]
) -> npt.NDArray[np.int64]:
    """Return each image's most probable classes, int64 [N, min(5, classes)], best first.

    Raises:
        ToolError: A logit is not finite; the message names the image.
    """
    parts = []
    for start in range(0, len(images), batch):
        logits = runner.infer(prepare(images[start : start + batch]))
        finite = np.isfinite(logits).all(axis=1)
        if not finite.all():
            msg = f"the logits of test image {start + int(np.argmin(finite))} are not finite"
            raise ToolError(msg)
        parts.append(top_classes(logits))
        progress(min(start + batch, len(images)))
    return np.concatenate(parts)


def peak_memory() -> int | None:
    """Return the largest resident size of this process (interpreter, runtime and model) in bytes; None without /proc.

    getrusage's ru_maxrss is not usable: it survives exec, so a small process shows the size of its parent.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def serve(runner: Runner, images: Images, answer: Answer, model: Path, threads: int) -> None:
    """Execute the commands that arrive on standard input until it is closed.

    Args:
        runner: Runner that has loaded the model.
        images: Test images.
        answer: Function that writes an answer to standard output.
        model: File of the model.
        threads: Number of threads within one operator.

    Raises:
        ToolError: The model cannot be used; see `preprocessing` and `predictions`.
    """
    description = runner.describe()
    prepare = preprocessing(description.metadata)
    first = prepare(images[:1])
    classes = int(runner.infer(first).shape[1])
    answer({"result": to_json(Loaded(description.version, description.provider, classes, description.int8_layers))})
    for line in sys.stdin:
        command = json.loads(line)
        if command["command"] == "latency":
            answer({"result": latency(runner, first, command["warm_up_seconds"], command["seconds"])})
        elif command["command"] == "node_times":
            answer({"result": to_json(runner.node_times(first))})
        elif command["command"] == "memory":
            answer({"result": peak_memory()})
        elif command["command"] == "accuracy":
            top = predictions(
                runner, prepare, images, command["batch"], lambda done: answer({"progress": [done, len(images)]})
            )
            np.save(command["out"], top)
            answer({"result": None})
        elif command["command"] == "codes":
            from crqat.runtime_eval.measure.codes import check_codes

            answer({"result": to_json(check_codes(model, Path(command["expected"]), threads))})


def _open(model: Path, runtime: str, provider: str, threads: int, graph: bool) -> Runner:
    """Return the runner of a model file.

    The runtime is imported here, after `main` has redirected standard output: what the runtime prints would otherwise
    mix with the answers.
    """
    if model.suffix == PLAN:
        from crqat.runtime_eval.runners.tensorrt import TensorRTRunner

        return TensorRTRunner(model, graph)
    if runtime == OPENVINO:
        from crqat.runtime_eval.runners.openvino import OpenVINORunner

        return OpenVINORunner(model, threads)
    from crqat.runtime_eval.runners.onnxruntime import OnnxRuntimeRunner

    return OnnxRuntimeRunner(model, provider, threads)


def main() -> int:
    """Load the model that the arguments name and execute commands; return 0, or 3 if the model failed."""
    # Libraries may print to descriptor 1 at any time. Their output goes to standard error; the pipe is for answers
    # only.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: Mapping[str, object]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        model, images, runtime, provider, threads, graph = sys.argv[1:]
        with _open(Path(model), runtime, provider, int(threads), graph == "1") as runner:
            serve(runner, np.load(images, mmap_mode="r", allow_pickle=False), answer, Path(model), int(threads))
    except Exception as error:  # the parent reports it; a runtime may raise anything
        text = str(error) if isinstance(error, CrqatError) else f"{type(error).__name__}: {error}"
        answer({"error": text})
        return ToolError.exit_code
    return 0


if __name__ == "__main__":
    die_first()
    sys.exit(main())
