"""What the product asks of a runtime: its rules as data, and as functions of numbers.

A Target knows no graph. Placement (torch), lowering and lint (onnx) and the runners read it and apply it to graphs of
their own; lint hands it plain descriptions of nodes. numpy is imported where it computes, so that checking a recipe
takes no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    pass

CodeType = Literal["int8", "uint8"]
FloatType = Literal["float32", "float16"]
BiasType = Literal["int32", "float"]
# Which inputs of a residual Add carry quantizers: both, the skip connection alone, or none.
Residual = Literal["none", "skip", "both"]

# How a kernel adds two tensors of codes: in float32 by fused multiply-adds, or in integers by multipliers of 22 bits.
AddKernel = Literal["float32", "fixed_point"]

# Kernels with 16-bit sums add two products: max(code) * (|w1| + |w2|) has to stay within this.
INT16_MAX = 32767
_CODE_RANGES = {"int8": (-128, 127), "uint8": (0, 255)}


@dataclass(frozen=True)
class Broken:
    """A rule that a node breaks.

    Attributes:
        rule: What must hold, and what happens if it does not.
        fix: What to do.
    """

    rule: str
    fix: str


@dataclass(frozen=True)
class QuantizeNode:
    """A QuantizeLinear or DequantizeLinear, as lint describes it.

    Attributes:
        of_constant: Whether it reads a constant: a weight or a bias, not an activation.
        zero_point_type: ONNX's name of the type, "INT8" or "UINT8"; None without a zero point.
        zero_point_is_zero: Whether every zero point is 0.
        scalar_scale: Whether the scale has no dimension; None if it is no constant.
    """

    of_constant: bool
    zero_point_type: str | None
    zero_point_is_zero: bool
    scalar_scale: bool | None


@dataclass(frozen=True)
class LayerNode:
    """A Conv, ConvTranspose or Gemm, as lint describes it.

    Attributes:
        operation: "Conv", "ConvTranspose" or "Gemm".
        input_quantized: Whether its input comes out of a DequantizeLinear, with nothing but data movement between.
        weight_quantized: Likewise of its weight.
        stored_as_codes: Whether the weight's DequantizeLinear reads integers of the file; None unless input and weight
            both come straight out of one.
        largest_input: Upper bound of its input's stored codes, None where `stored_as_codes` is not True.
        largest_weight: Largest magnitude of its weight's codes, likewise.
        depthwise: See `is_depthwise`.
        constant_bias: Whether its bias is a constant of the file, without a DequantizeLinear.
    """

    operation: str
    input_quantized: bool
    weight_quantized: bool
    stored_as_codes: bool | None = None
    largest_input: int | None = None
    largest_weight: int | None = None
    depthwise: bool = False
    constant_bias: bool = False


@dataclass(frozen=True)
class ClipNode:
    """A Clip, as lint describes it.

    Attributes:
        float_before_quantizer: Whether it has constant float bounds and a QuantizeLinear reads it.
    """

    float_before_quantizer: bool


Node = QuantizeNode | LayerNode | ClipNode


def no_rules(node: Node) -> Iterator[Broken]:
    """The rules of a runtime that asks for nothing."""
    del node
    yield from ()


@dataclass(frozen=True)
class CpuFamily:
    """CPUs on which a runtime computes the same codes.

    Attributes:
        name: As results spell it.
        machines: What Python's `platform.machine()` says on them.
        add_kernel: How it adds two tensors of codes there: the one operation, of those whose codes are exact, that it
            does not round alike on all CPUs.
    """

    name: str
    machines: tuple[str, ...]
    add_kernel: AddKernel


@dataclass(frozen=True, kw_only=True)
class Target:
    """One runtime on one kind of hardware.

    Attributes:
        name: As recipes, files and results spell it.
        title: As messages spell it.
        activation_type: Type in which its files store activations' codes.
        zero_points: Whether an activation's zero point may be other than 0. Codes are then shifted so that the smallest
            one is the type's.
        sum_limit: Largest magnitude that a sum of two products of codes may have without saturating; None where sums
            have 32 bits.
        float_types: Types that the operations beside INT8 may have, the usual one first.
        scale_type: The narrowest type in which a file stores scales; trained scales are moved onto its values.
        bias_type: "int32" in units of s_x s_w, or "float". With int32, codes of few bits are multiplied by a power of
            two, which makes the unit smaller.
        float_weights: Whether weights may also be stored as float values with a pair of Q and DQ.
        residual: Which inputs of a residual Add are to carry quantizers.
        quantize_before_activation: Whether a convolution needs a quantizer before an activation other than ReLU and
            ReLU6, because it is fused with nothing else.
        moves_codes: Whether Reshape, MaxPool, Concat and their like are written on codes, with one DequantizeLinear
            after them, so that it stands right before the operation that is to be fused.
        integer_clip: Whether the float Clip of a ReLU6 is written as an integer Clip behind its quantizer, because a
            float one is fused into a float convolution.
        fusions: ONNX operation between Q and DQ to the integer operation that the runtime makes of it.
        float_results: Likewise where the result stays float.
        always_float: ONNX operations without an integer kernel.
        cpus: The families of CPUs whose codes are known, first the one that targets are compared on; none where it
            runs on no CPU.
        not_run: Why an export cannot run its runtime and compare codes; None where it can.
        builds_engine: Whether a benchmark builds an engine from the file and reads its plan.
        runs_also: Other runtimes that measure its file, as results name them.
        rules: Says of a node which rules it breaks.
    """

    name: str
    title: str
    activation_type: CodeType
    zero_points: bool
    sum_limit: int | None = None
    float_types: tuple[FloatType, ...] = ("float32",)
    scale_type: FloatType = "float32"
    bias_type: BiasType = "float"
    float_weights: bool = False
    residual: Residual = "skip"
    quantize_before_activation: bool = False
    moves_codes: bool = False
    integer_clip: bool = False
    fusions: Mapping[str, str] = field(default_factory=dict)
    float_results: Mapping[str, str] = field(default_factory=dict)
    always_float: tuple[str, ...] = ()
    cpus: tuple[CpuFamily, ...] = ()
    not_run: str | None = "its runtime is not part of the export"
    builds_engine: bool = False
    runs_also: tuple[str, ...] = ()
    rules: Callable[[Node], Iterator[Broken]] = no_rules

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code of `activation_type`."""
        return _CODE_RANGES[self.activation_type]

    @property
    def largest_nonnegative(self) -> int:
        """Largest code of an activation without negative values, in training: its zero point is 0 there."""
        low, high = self.code_range
        return high - low if self.zero_points else high

    def largest_weight(self, input_codes: int, depthwise: bool) -> int | None:
        """Largest magnitude of a weight's codes whose sums do not saturate; None where any fits.

        Args:
            input_codes: Largest stored code of what the weight meets, its smallest being 0.
            depthwise: See `is_depthwise`: with one product at a time there is no sum of two.
        """
        if self.sum_limit is None or depthwise or input_codes <= 0:
            return None
        return self.sum_limit // (2 * input_codes)

    def cpu(self, machine: str) -> CpuFamily | None:
        """The family of CPUs to which a machine belongs, None if its codes are not known.

        Args:
            machine: As `platform.machine()` has it.
        """
        return next((family for family in self.cpus if machine in family.machines), None)

    def float_type(self, asked: FloatType) -> FloatType:
        """The type beside INT8: what is asked for where the runtime offers it, else its usual one."""
        return asked if asked in self.float_types else self.float_types[0]


def is_depthwise(weight_shape: Sequence[int], groups: int) -> bool:
    """Whether a convolution of two dimensions has one filter of one channel per channel.

    Args:
        weight_shape: [out channels, in channels / groups, height, width].
        groups: Of the convolution; 1 for a linear layer.
    """
    return len(weight_shape) == 4 and weight_shape[1] == 1 and weight_shape[0] == groups


def weight_codes(bits: int) -> tuple[int, int]:
    """Smallest and largest code of a weight: symmetric with 8 bits, all of two's complement with fewer."""
    return (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def activation_codes(bits: int, nonnegative: bool) -> tuple[int, int]:
    """Smallest and largest code of an activation of so many bits, before a target's limits."""
    return (0, 2**bits - 1) if nonnegative else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
