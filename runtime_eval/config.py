"""The `benchmark` stage's part of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar, Literal

from crqat.core.field_bounds import STRICT, Range

# What a session is asserted to run on. Names of ONNX Runtime's own.
Provider = Literal[
    "CPUExecutionProvider",
    "CUDAExecutionProvider",
    "TensorrtExecutionProvider",
    "NvTensorRTRTXExecutionProvider",
]
# On these the file for TensorRT is the one that is timed.
TENSORRT_PROVIDERS = ("TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")


@dataclass(frozen=True)
class BenchmarkConfig:
    """How a model is measured.

    Attributes:
        threads: Threads that one inference may use.
        provider: ONNX Runtime's execution provider; another one taking its place is an error.
        warm_up_seconds: Inferences at the start of each process that are not counted.
        latency_rounds: Rounds in which the models take turns, each time in a new process. From 6 on the interval of the
            median ratio reaches 95 %.
        latency_seconds: Counted time of one model over all rounds.
        accuracy_batch: Images of one inference where accuracy is measured.
        cuda_graph: Run a TensorRT engine as a CUDA graph, which takes the host's launches out of the latency.
        openvino: Measure the float file and the one for ONNX Runtime in OpenVINO, too.
        require: Runtimes without whose latency the gate does not judge but ends with an error; "openvino" here
            measures it, too.
        time_limit_seconds: A model's process that is silent for longer than this is taken for hung; so is the build of
            an engine that takes longer.
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
    """The configuration that a bundle brings: a recipe's was checked by pydantic, which a board does not have.

    Raises:
        TypeError, ValueError: A key is unknown, or a value is of another type or not positive.
    """
    config = BenchmarkConfig(**values)
    for item in fields(config):
        value, default = getattr(config, item.name), item.default
        texts = isinstance(default, tuple) and isinstance(value, list) and all(isinstance(text, str) for text in value)
        if not texts and type(value) is not type(default) and not (type(value) is int and type(default) is float):
            msg = f"{item.name} is {value!r}"
            raise TypeError(msg)
        if not isinstance(value, bool | str | list | tuple) and not 0 <= value < 2**31:
            msg = f"{item.name} is {value}"
            raise ValueError(msg)
    return replace(config, require=tuple(config.require))
