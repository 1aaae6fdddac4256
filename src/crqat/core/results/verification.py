"""What the export found out about one of its files: the comparisons in integer codes, and what the runtime fused."""

from __future__ import annotations

from dataclasses import dataclass, field

from crqat.core.typed_json import OMIT


@dataclass(frozen=True)
class Check:
    """One comparison of the integer simulator with something else.

    Attributes:
        codes: How many were compared.
        differing: How many of them differ.
        violations: How many codes and logits differ by more than the bound allows; 0 is equality.
        at: The tensor with the largest difference, empty if there is none.
        differing_logits: How many logits differ by more than their bound.
        farthest_from_tie: The largest distance of a differing code's value from a rounding tie, in codes.
        largest_bound: Of that distance, in codes.
        observed_graph_is_shipped_graph: Whether ONNX Runtime computes the same with its codes shown.
        inexact: Codes that stand behind float operations.
        inexact_differing: How many of them lie on the other side of a tie.
        inexact_farthest_from_tie: As `farthest_from_tie`, of these.
        inexact_largest_bound: As `largest_bound`, of these.
    """

    codes: int
    differing: int
    violations: int
    at: str = ""
    differing_logits: int | None = field(default=None, metadata=OMIT)
    farthest_from_tie: float | None = field(default=None, metadata=OMIT)
    largest_bound: float | None = field(default=None, metadata=OMIT)
    observed_graph_is_shipped_graph: bool | None = field(default=None, metadata=OMIT)
    inexact: int | None = field(default=None, metadata=OMIT)
    inexact_differing: int | None = field(default=None, metadata=OMIT)
    inexact_farthest_from_tie: float | None = field(default=None, metadata=OMIT)
    inexact_largest_bound: float | None = field(default=None, metadata=OMIT)


@dataclass(frozen=True)
class Verification:
    """All checks of one file.

    Attributes:
        status: "passed", "failed: ..." or "not run: ...".
        images: How many were computed.
        codes: How many the check against the runtime compared; against torch, where the runtime did not run.
        differing_codes: How many of them differ.
        checks: By what the simulator was compared with: "torch", "runtime" or another target; a text says why not.
    """

    status: str
    images: int
    codes: int
    differing_codes: int
    checks: dict[str, Check | str] | None = field(default=None, metadata={**OMIT, "key": "links"}, repr=False)

    @property
    def passed(self) -> bool:
        """Whether codes were compared and none differs that should not."""
        return self.status == "passed"


@dataclass(frozen=True)
class FloatNode:
    """A node that ONNX Runtime computes in float.

    Attributes:
        node: Its name.
        operation: Its type.
        reason: Why.
    """

    node: str
    operation: str
    reason: str


@dataclass(frozen=True)
class Fusion:
    """What ONNX Runtime's optimizer made of a file.

    Attributes:
        expected: Integer operations that the file's layers should become, by type.
        operations: All operations of the optimized graph, by type.
        in_float: Layers that stayed float.
        complete: Whether every layer became an integer operation.
    """

    expected: dict[str, int]
    operations: dict[str, int]
    in_float: list[FloatNode] = field(metadata={"key": "float"})
    complete: bool
