"""Results of the export's verification of one file: integer code comparisons, and fusion by the runtime."""

from __future__ import annotations

from dataclasses import dataclass, field

from crqat.core.typed_json import OMIT


@dataclass(frozen=True)
class Check:
    """One comparison of the integer simulator with another computation.

    Attributes:
        codes: Number of codes compared.
        differing: Number of codes that differ.
        violations: Number of codes and logits that differ by more than their error bounds allow; 0 if the check passes.
        at: Name of the tensor with the largest difference; empty if nothing differs.
        differing_logits: Number of logits that differ by more than their bound.
        farthest_from_tie: Largest distance of a differing code's value from a rounding tie, in codes.
        largest_bound: Largest distance from a tie, over all codes, that rounding errors can explain, in codes.
        observed_graph_is_shipped_graph: Whether ONNX Runtime runs the same operations in the shipped file and in the
            copy with the codes as additional outputs, from which the codes were read.
        inexact: Number of codes that are rounded from results of float operations, which correct computations may
            round differently.
        inexact_differing: Number of inexact codes that fell on the other side of a rounding tie.
        inexact_farthest_from_tie: As `farthest_from_tie`, but only for the inexact codes.
        inexact_largest_bound: As `largest_bound`, but only for the inexact codes.
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
    """Result of all checks of one file.

    Attributes:
        status: "passed", "failed: ..." or "not run: ...".
        images: Number of images that were computed.
        codes: Number of codes compared with the runtime, or with torch if the runtime did not run.
        differing_codes: How many of the `codes` differ.
        checks: Maps the computation that the simulator was compared with ("torch", "runtime" or another target) to the
            check, or to a text that says why the check was not run.
    """

    status: str
    images: int
    codes: int
    differing_codes: int
    checks: dict[str, Check | str] | None = field(default=None, repr=False, metadata={**OMIT, "key": "links"})

    @property
    def passed(self) -> bool:
        """Whether all checks ran and found no difference that rounding cannot explain."""
        return self.status == "passed"


@dataclass(frozen=True)
class FloatNode:
    """A node that ONNX Runtime computes in float instead of integers.

    Attributes:
        node: Name of the node.
        operation: Operator type.
        reason: Why the node stayed in float.
    """

    node: str
    operation: str
    reason: str


@dataclass(frozen=True)
class Fusion:
    """Result of ONNX Runtime's graph optimizer on one file.

    Attributes:
        expected: Expected number of integer operations, by type.
        operations: Number of operations in the optimized graph, by type.
        in_float: Layers that stayed float.
        complete: Whether every layer became an integer operation.
    """

    expected: dict[str, int]
    operations: dict[str, int]
    in_float: list[FloatNode] = field(metadata={"key": "float"})
    complete: bool
