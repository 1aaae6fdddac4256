"""What a TensorRT builder made of an ONNX file: the whole report (engine.json), and what results.json keeps of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from crqat.core.typed_json import OMIT, OMIT_EMPTY

Severity = Literal["error", "warning", "harmless"]
BUILT = "built"


@dataclass(frozen=True)
class Builder:
    """Which builder.

    Attributes:
        name: "tensorrt" or "tensorrt_rtx"; "unknown" if only the engine's inspector tells of it.
        version: Its version.
    """

    name: str
    version: str | None


@dataclass(frozen=True)
class BuildError:
    """Why no engine can be made of a file.

    Attributes:
        stage: "parse", "build", or "process": the builder's process died or was stopped.
        node: The ONNX node, as far as the builder names it.
        operator: Its type.
        rule: What was broken, in the builder's words.
    """

    stage: str
    node: str | None = None
    operator: str | None = None
    rule: str = ""


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine.

    Attributes:
        name: The engine's own.
        kind: "matmul" for Conv and Gemm, or what else it does.
        type: The engine's own word for what it is.
        inputs: Precision of each input.
        outputs: Precision of each output.
        weights: Of a matmul: the precision of its second operand, if that is reported.
        int8: Of a matmul: whether it multiplies INT8 by INT8.
        macs: Multiply-accumulates, if they are known.
        nodes: Names of the ONNX nodes that it came from.
    """

    name: str
    kind: str
    type: str
    inputs: list[str]
    outputs: list[str]
    weights: str | None
    int8: bool | None
    macs: int | None
    nodes: list[str]


@dataclass(frozen=True)
class Uncovered:
    """A Conv or Gemm that is not computed in INT8.

    Attributes:
        node: Its name.
        reason: What it multiplies instead.
        macs: Its multiply-accumulates, if they are known.
    """

    node: str
    reason: str
    macs: int | None = None


@dataclass(frozen=True)
class Coverage:
    """How much of Conv and Gemm multiplies INT8 by INT8.

    Attributes:
        by_macs: Share of the multiply-accumulates; None if they are not known.
        nodes: Conv and Gemm nodes, or layers if the MACs are not known.
        int8_nodes: Those of them in INT8.
        by_count: Share of the nodes; None if there are none.
        macs: All multiply-accumulates.
        int8_macs: Those in INT8.
        uncovered: The nodes that are not in INT8, the largest first; left to the report's own file in results.json.
    """

    by_macs: float | None
    nodes: int
    int8_nodes: int
    by_count: float | None = None
    macs: int | None = None
    int8_macs: int | None = None
    uncovered: list[Uncovered] | None = field(default=None, metadata=OMIT)


@dataclass(frozen=True)
class LayerCounts:
    """How many layers there are of each kind; a kind without a 0 here is not written while it is None."""

    layers: int
    reformat: int
    matmul: int = 0
    pointwise: int = 0
    pooling: int = 0
    copy: int = 0
    opaque: int = 0
    sync: int | None = field(default=None, metadata=OMIT)
    shape: int | None = field(default=None, metadata=OMIT)
    other: int | None = field(default=None, metadata=OMIT)


@dataclass(frozen=True)
class BuilderMessage:
    """The builder's warnings of one kind.

    Attributes:
        severity: "error" if the engine computes something else than the file says.
        message: What it means, one line.
        count: How often it was said.
        nodes: The first ONNX nodes of which it was said.
        kind: "uint8_read_as_int8", "float16_scales", "subnormal_weights", "unread_plan" or "other".
    """

    severity: Severity
    message: str
    count: int
    nodes: list[str]
    kind: str = "other"


@dataclass(frozen=True, kw_only=True)
class EngineSummary:
    """What results.json keeps of an engine. Where none was built because there is no builder, there is a status alone.

    Attributes:
        status: "built", "failed: ..." or "not run: ...".
        failure: Why the build failed.
        builder: Who built it.
        compute_capabilities: For which GPUs.
        flags: Names of the network's and the builder's flags.
        batch: Smallest, usual and largest batch.
        seconds: That the build took.
        size_bytes: Of the engine.
        source: Where its layers are known from.
        coverage: How much of it is INT8.
        uncovered: The largest nodes that are not.
        counts: Layers by kind.
        messages: The builder's warnings.
        notices: What the report does not tell.
    """

    status: str
    failure: BuildError | None = field(default=None, metadata=OMIT)
    builder: Builder | None = field(default=None, metadata=OMIT)
    compute_capabilities: list[str] = field(default_factory=list, metadata=OMIT_EMPTY)
    flags: list[str] = field(default_factory=list, metadata=OMIT_EMPTY)
    batch: tuple[int, int, int] | None = field(default=None, metadata=OMIT)
    seconds: float | None = field(default=None, metadata=OMIT)
    size_bytes: int | None = field(default=None, metadata=OMIT)
    source: str | None = field(default=None, metadata=OMIT)
    coverage: Coverage | None = field(default=None, metadata=OMIT)
    uncovered: list[Uncovered] = field(default_factory=list, metadata=OMIT_EMPTY)
    counts: LayerCounts | None = field(default=None, metadata=OMIT)
    messages: list[BuilderMessage] = field(default_factory=list, metadata={**OMIT_EMPTY, "key": "remarks"})
    notices: list[str] = field(default_factory=list, metadata=OMIT_EMPTY)

    def __post_init__(self) -> None:
        """Refuse an engine that is said to be built and is not described."""
        _refuse_half(self)


@dataclass(frozen=True, kw_only=True)
class EngineReport:
    """All of one build; attributes as in `EngineSummary`, and those below.

    Attributes:
        model: The ONNX file's name.
        model_sha256: Of that file.
        precisions: Types of all tensors that the network's layers write.
        engine_sha256: Of the engine.
        timing_cache_sha256: Of the timing cache after the build, None if none was used.
        layers: The plan.
    """

    schema_version: int = 1
    model: str
    model_sha256: str
    status: str
    failure: BuildError | None
    builder: Builder
    compute_capabilities: list[str]
    flags: list[str]
    precisions: list[str]
    batch: tuple[int, int, int]
    seconds: float | None
    size_bytes: int | None
    engine_sha256: str | None
    timing_cache_sha256: str | None
    source: str | None
    layers: list[EngineLayer]
    coverage: Coverage | None
    counts: LayerCounts | None
    messages: list[BuilderMessage] = field(metadata={"key": "remarks"})
    notices: list[str]

    def __post_init__(self) -> None:
        """Refuse an engine that is said to be built and is not described."""
        _refuse_half(self)


def _refuse_half(engine: EngineSummary | EngineReport) -> None:
    for name in ("builder", "coverage", "counts"):
        if engine.status == BUILT and getattr(engine, name) is None:
            msg = f"is built, and its {name} is missing"
            raise ValueError(msg)


@dataclass(frozen=True)
class Engines:
    """engine.json: the reports of a benchmark by the file that each engine was built from."""

    engines: dict[str, EngineReport]
    schema_version: int = 1
