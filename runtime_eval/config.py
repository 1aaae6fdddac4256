"""Settings of the `benchmark` stage in a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar, Literal

from crqat.core.field_bounds import STRICT, Range

# Providers that a session can be required to run on, by ONNX Runtime's names.
Provider = Literal[
    "CPUExecutionProvider",
    "CUDAExecutionProvider",
    "TensorrtExecutionProvider",
    "NvTensorRTRTXExecutionProvider",
]
# On these providers, the file for TensorRT is the one that is timed.
TENSORRT_PROVIDERS = ("TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")


@dataclass(frozen=True)
class BenchmarkConfig:
    """Settings for measuring models.

    Attributes:
        threads: Threads that one inference may use.
        provider: ONNX Runtime's execution provider; it is an error if ONNX Runtime uses another one.
        warm_up_seconds: Duration of uncounted inferences at the start of each process.
        latency_rounds: Rounds in which the models take turns, each time in a new process. From 6 rounds on, the
            confidence interval of the median latency ratio reaches 95 %.
        latency_seconds: Total counted time of one model over all rounds.
        accuracy_batch: Batch size for measuring accuracy.
        cuda_graph: Run a TensorRT engine as a CUDA graph, which removes the host's kernel launches from the latency.
        openvino: Also measure the float file and the file for ONNX Runtime in OpenVINO.
        require: Runtimes whose latency must be measured; if one was not measured, `crqat gate` ends with exit code 3.
            If the list contains "openvino", OpenVINO is measured even if `openvino` is false.
        time_limit_seconds: A model's process that is silent for longer is considered hung, as is an engine build that
            takes longer.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    threads: Annotated[int, Range(ge=1)] = 1
    provider: Provider = "CPUExecutionProvider"
    warm_up_seconds: Annotated[float, Range(ge=0)] = 0.2
    latency_rounds: Annotated[int, Range(ge=6)] = 10
    latency_seconds: Annotated[float, Range(gt=0)] = 5.0
    accuracy_batch: Annotated[int, Range(ge=1)] = 64
    cuda_graph: bool = False
    openvino: bool = False
    require: tuple[Literal["onnxruntime", "tensorrt", "openvino"], ...] = ()
    time_limit_seconds: Annotated[float, Range(gt=0)] = 300.0


def of_json(values: Mapping[str, Any]) -> BenchmarkConfig:
    """Return the benchmark settings in a bundle after checking them without pydantic, which a board lacks.

    Raises:
        TypeError, ValueError: A key is unknown, or a value has another type or is not positive.
    """
    config = BenchmarkConfig(**values)
    for item in fields(config):
        value, default = getattr(config, item.name), item.default
        texts = isinstance(default, tuple) and isinstance(value, list) and all(isinstance(text, str) for text in value)
        if not texts and type(value) is not type(default) and not (type(value) is int and type(default) is float):
            msg = f"{item.name} has the wrong type: {value!r}"
            raise TypeError(msg)
        if not isinstance(value, bool | str | list | tuple) and not 0 <= value < 2**31:
            msg = f"{item.name} is {value}, not a number from 0 to 2**31 - 1"
            raise ValueError(msg)
    return replace(config, require=tuple(config.require))
