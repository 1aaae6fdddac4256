"""Builds a serialized engine from an ONNX file, with any supported version of TensorRT.

TensorRT reports most failures by returning None or False and logs the cause, so every return value is checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crqat.core.errors import ToolError
from crqat.core.results.engine import BuildError
from crqat.runtime_eval.trt import plan_layers
from crqat.runtime_eval.trt import timing_cache as timings
from crqat.runtime_eval.trt.coverage import Message
from crqat.runtime_eval.trt.versions import Capability, network_flags

if TYPE_CHECKING:
    import tensorrt

Batch = tuple[int, int, int]
# How builders name the operation that they cannot compile: first tensorrt_rtx, then tensorrt.
_BLAMED = (re.compile(r"Cannot compile operation '(.+?)'"), re.compile(r"implementation for node (.+?)\.?(?: due|$)"))


class BuildFailure(Exception):
    """Raised if no engine can be built from an ONNX file.

    Attributes:
        reason: Where and why the build failed.
    """

    def __init__(self, rule: str, node: str | None = None, operator: str | None = None, stage: str = "build") -> None:
        super().__init__(rule)
        self.reason = BuildError(stage, node or None, operator or None, " ".join(rule.split()))


@dataclass
class Build:
    """One build of an engine; if it fails, the attributes keep what is known up to then.

    Attributes:
        trt: Python module of the builder.
        row: What this version of the builder supports.
        hear: Callback that is called with each message of the builder.
        messages: All messages so far.
        flags: Names of the network flags and builder flags that are set.
        precisions: Types of all tensors that the parsed network's layers write, sorted.
        timing_cache_sha256: SHA-256 of the timing cache after the build; None if none was used.
    """

    trt: Any
    row: Capability
    hear: Callable[[str, str], None]
    messages: list[Message] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    precisions: list[str] = field(default_factory=list)
    timing_cache_sha256: str | None = None

    def __post_init__(self) -> None:
        self._logger = _logger(self)

    def run(
        self, model: Path, batch: Batch, targets: Sequence[str], timing_cache: Path | None, parsed: Callable[[], None]
    ) -> bytes:
        """Build the engine of an ONNX file.

        Args:
            model: The ONNX file.
            batch: Minimum, optimum and maximum batch size; equal values make the engine static.
            targets: Compute capabilities; empty for the builder's default.
            timing_cache: Timing cache; see `crqat.runtime_eval.trt.engine.EngineOptions`.
            parsed: Callback that is called when the file has been parsed.

        Returns:
            The serialized engine.

        Raises:
            BuildFailure: No engine can be built from the file.
            ToolError: The builder does not start, rejects even an empty timing cache, or cannot lock or write its file.
        """
        trt = self.trt
        try:
            builder = trt.Builder(self._logger)
        except TypeError as error:  # raised by its binding for a null pointer
            msg = f"{trt.__name__} {trt.__version__} does not start: {self._last_error() or error}"
            raise ToolError(msg) from error
        flags, self.flags = network_flags(trt, self.row)
        network = builder.create_network(flags)
        if network is None:
            raise BuildFailure(self._last_error() or f"the builder makes no network with {', '.join(self.flags)}")
        self._parse(trt.OnnxParser(network, self._logger), network, model)
        parsed()
        self.precisions = _precisions(network)
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        self._allow_precisions(config)
        self._set_targets(config, targets)
        set_batch(builder, network, config, batch)
        cached = timing_cache if self.row.timing_cache else None
        cache = None if cached is None else timings.attach(config, cached)
        serialized = builder.build_serialized_network(network, config)
        if serialized is None:
            rule = self._last_error() or "the builder returned nothing and reported no error"
            raise BuildFailure(rule, next((m[1] for m in (p.search(rule) for p in _BLAMED) if m), None))
        if cached is not None and cache is not None:
            self.timing_cache_sha256 = timings.merge(config, cache, cached)
        return bytes(serialized)

    def _last_error(self) -> str | None:
        return next((text for severity, text in reversed(self.messages) if severity.endswith("ERROR")), None)

    def _parse(self, parser: tensorrt.OnnxParser, network: tensorrt.INetworkDefinition, model: Path) -> None:
        done = parser.parse(model.read_bytes(), str(model))
        if parser.num_errors:
            error = parser.get_error(0)
            raise BuildFailure(error.desc(), error.node_name(), error.node_operator(), "parse")
        rule = None if done else self._last_error() or "the parser refused the file and reported no error"
        if rule is None and (network.num_outputs == 0 or network.num_layers == 0):
            # The parser takes bytes that are not an ONNX file for an empty one.
            rule = "the file holds no network with an output; is it an ONNX file?"
        if rule is not None:
            raise BuildFailure(rule, stage="parse")

    def _allow_precisions(self, config: tensorrt.IBuilderConfig) -> None:
        """Set the flags that let a weakly typed network run in the file's own types instead of float32."""
        if self.row.typing != "weak":
            return
        for flag, precision in (("FP16", "HALF"), ("INT8", "INT8")):
            if flag in self.row.precision_flags and precision in self.precisions:
                config.set_flag(getattr(self.trt.BuilderFlag, flag))
                self.flags.append(flag)

    def _set_targets(self, config: Any, names: Sequence[str]) -> None:
        if not names:
            return
        config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            if not config.set_compute_capability(getattr(self.trt.ComputeCapability, name), index):
                msg = f"the builder does not support the compute capability {name}"
                raise BuildFailure(msg)

    def inspect(self, serialized: bytes) -> list[plan_layers.Layer]:
        """Return the layers of an engine from its inspector; none if this machine cannot load the engine."""
        engine = self.trt.Runtime(self._logger).deserialize_cuda_engine(serialized)
        if engine is None:
            return []
        text = engine.create_engine_inspector().get_engine_information(self.trt.LayerInformationFormat.JSON)
        return plan_layers.from_inspector(json.loads(text))


def _logger(build: Build) -> Any:
    """Return a logger that passes on every message. It must not raise: TensorRT would swallow the exception."""

    class Logger(build.trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            build.trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            build.messages.append((severity.name, text))
            build.hear(severity.name, text)

    return Logger()


def _precisions(network: tensorrt.INetworkDefinition) -> list[str]:
    found = set()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        found |= {layer.get_output(number).dtype.name for number in range(layer.num_outputs)}
    return sorted(found)


def set_batch(
    builder: tensorrt.Builder,
    network: tensorrt.INetworkDefinition,
    config: tensorrt.IBuilderConfig,
    batch: Batch,
) -> None:
    """Set the batch sizes of an engine: one fixed size if all values in `batch` are equal, else the range they span.

    Raises:
        BuildFailure: An input has another fixed batch size or another dynamic dimension, or the builder refuses.
    """
    profile = builder.create_optimization_profile()
    smallest, usual, largest = batch
    bounded = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape: Any = tensor.shape  # a tuple at run time; the stubs have another type
        first, *rest = tuple(shape)
        if min(rest, default=1) < 0:
            msg = f"the network's input {tensor.name} has a dynamic dimension that is not the batch"
            raise BuildFailure(msg)
        if first >= 0:
            if not smallest <= first <= largest:
                msg = f"the network's input {tensor.name} has the fixed batch {first}, not {usual}"
                raise BuildFailure(msg)
        elif smallest == largest:
            tensor.shape = (usual, *rest)  # type: ignore[assignment]
        else:
            bounds: Any = [(size, *rest) for size in batch]
            profile.set_shape(tensor.name, *bounds)
            bounded = True
    if bounded and config.add_optimization_profile(profile) < 0:
        msg = f"the builder does not support the batch sizes {smallest}, {usual}, {largest}"
        raise BuildFailure(msg)
