"""Layout of engine.json, the full report of a TensorRT build, and of its summary in results.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from crqat.core.typed_json import OMIT, OMIT_EMPTY

Severity = Literal["error", "warning", "harmless"]
BUILT = "built"


@dataclass(frozen=True)
class Builder:
    """The builder that made an engine.

    Attributes:
        name: "tensorrt" or "tensorrt_rtx"; "unknown" if the engine is known from its inspector only.
        version: Version of the builder.
    """

    name: str
    version: str | None


@dataclass(frozen=True)
class BuildError:
    """Where and why the build of an engine failed.

    Attributes:
        stage: "parse", "build", or "process" if the builder's process died or was stopped.
        node: Name of the ONNX node, if the builder names it.
        operator: Operator type of that node.
        rule: The builder's own error text.
    """

    stage: str
    node: str | None = None
    operator: str | None = None
    rule: str = ""


@dataclass(frozen=True)
class EngineLayer:
    """One layer of a TensorRT engine.

    Attributes:
        name: Name of the layer in the engine.
        kind: "matmul" for Conv and Gemm; otherwise "pointwise", "pooling", "reformat", "copy", "opaque", "sync",
            "shape" or "other".
        type: Layer type in the engine's own words.
        inputs: Precision of each input.
        outputs: Precision of each output.
        weights: Precision of a matmul's second operand, if it is reported.
        int8: Whether a matmul multiplies INT8 by INT8.
        macs: Number of multiply-accumulates, if known.
        nodes: Names of the ONNX nodes that the layer was made from.
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
    """A Conv or Gemm node that is not computed in INT8.

    Attributes:
        node: Name of the node.
        reason: Types that it multiplies instead, such as "multiplies Half by Half".
        macs: Number of its multiply-accumulates, if known.
    """

    node: str
    reason: str
    macs: int | None = None


@dataclass(frozen=True)
class Coverage:
    """Share of the Conv and Gemm nodes that multiply INT8 by INT8.

    Attributes:
        by_macs: Share of the multiply-accumulates that are in INT8; None if their numbers are not known.
        nodes: Number of Conv and Gemm nodes, or of layers if the multiply-accumulates are not known.
        int8_nodes: How many of the `nodes` are in INT8.
        by_count: Share of the nodes that are in INT8; None if there are no Conv and Gemm nodes.
        macs: Number of all multiply-accumulates.
        int8_macs: Number of multiply-accumulates in INT8.
        uncovered: Nodes that are not in INT8, the largest first; in engine.json only, not in results.json.
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
    """Number of an engine's layers in all (`layers`) and of each kind that `EngineLayer` lists, by the kind's name.

    If an engine has no layer of the kind, `sync`, `shape` or `other` is None instead of 0 and left out of the JSON.
    """

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
        severity: "error" if the engine computes something other than the ONNX file specifies, "harmless" if no value
            changes, otherwise "warning".
        message: Meaning of the warning, in one line.
        count: How often the builder gave the warning.
        nodes: The first ONNX nodes that it concerns.
        kind: "uint8_read_as_int8", "float16_scales", "subnormal_weights", "unread_plan" or "other".
    """

    severity: Severity
    message: str
    count: int
    nodes: list[str]
    kind: str = "other"


@dataclass(frozen=True, kw_only=True)
class EngineSummary:
    """Summary of an engine for results.json; if no builder could run, only the status is set.

    Attributes:
        status: "built", "failed: ..." or "not run: ...".
        failure: Why the build failed; None if it did not.
        builder: Builder of the engine.
        compute_capabilities: Compute capabilities of the GPUs that the engine is for.
        flags: Names of the network flags and builder flags.
        batch: Minimum, optimum and maximum batch size.
        seconds: Duration of the build, in seconds.
        size_bytes: Size of the engine, in bytes.
        source: What reported the engine's layers: "verbose log" or "engine inspector".
        coverage: INT8 coverage of the engine.
        uncovered: The largest nodes that are not in INT8.
        counts: Number of layers of each kind.
        messages: The builder's warnings.
        notices: What the engine is not valid for, such as GPUs that its builder does not support.
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
        """Reject an engine with status "built" that lacks its description."""
        _refuse_half(self)


@dataclass(frozen=True, kw_only=True)
class EngineReport:
    """Full report of one build; further attributes as in `EngineSummary`.

    Attributes:
        model: Name of the ONNX file.
        model_sha256: SHA-256 of the ONNX file.
        precisions: Types of all tensors that the engine's layers write.
        engine_sha256: SHA-256 of the engine.
        timing_cache_sha256: SHA-256 of the timing cache after the build; None if none was used.
        layers: Layers of the engine.
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
        """Reject an engine with status "built" that lacks its description."""
        _refuse_half(self)


def _refuse_half(engine: EngineSummary | EngineReport) -> None:
    for name in ("builder", "coverage", "counts"):
        if engine.status == BUILT and getattr(engine, name) is None:
            msg = f"has status built but no {name}"
            raise ValueError(msg)


@dataclass(frozen=True)
class Engines:
    """Layout of engine.json: maps the name of each ONNX file to the report of the engine that was built from it."""

    engines: dict[str, EngineReport]
    schema_version: int = 1
