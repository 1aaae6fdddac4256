"""What a runtime requires of a quantized file.

A Target depends on no graph library: its attributes and methods hold, take and return plain values. The packages that
place quantizers in a torch network, write and check its ONNX files, and run them, apply a Target to their own graphs.
The check passes a description of each node to the Target: `QuantizeNode`, `LayerNode` or `ClipNode`.
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
# Which inputs of a residual Add carry quantizers: both, only the skip connection, or none.
Residual = Literal["none", "skip", "both"]

# How a kernel adds two tensors of codes: in float32 with fused multiply-adds, or in integers with 22-bit multipliers.
AddKernel = Literal["float32", "fixed_point"]

# Kernels with 16-bit sums add two products: max(code) * (|w1| + |w2|) must not exceed this.
INT16_MAX = 32767
_CODE_RANGES = {"int8": (-128, 127), "uint8": (0, 255)}


@dataclass(frozen=True)
class Broken:
    """A rule of a runtime that a node of a file violates.

    Attributes:
        rule: What must hold, and what happens otherwise.
        fix: What the user should do.
    """

    rule: str
    fix: str


@dataclass(frozen=True)
class QuantizeNode:
    """Description of a QuantizeLinear or DequantizeLinear node for lint.

    Attributes:
        of_constant: Whether the node reads a constant (a weight or a bias), not an activation.
        zero_point_type: ONNX type name of the zero point, "INT8" or "UINT8"; None without a zero point.
        zero_point_is_zero: Whether every zero point is 0.
        scalar_scale: Whether the scale has no dimension; None if the scale is not a constant.
    """

    of_constant: bool
    zero_point_type: str | None
    zero_point_is_zero: bool
    scalar_scale: bool | None


@dataclass(frozen=True)
class LayerNode:
    """Description of a Conv, ConvTranspose or Gemm node for lint.

    Attributes:
        operation: "Conv", "ConvTranspose" or "Gemm".
        input_quantized: Whether the input comes from a DequantizeLinear with only data movement in between.
        weight_quantized: Whether the weight comes from a DequantizeLinear with only data movement in between.
        stored_as_codes: Whether the weight's DequantizeLinear reads integers stored in the file; None unless both input
            and weight come directly from a DequantizeLinear.
        largest_input: Largest code that the input can have, before its zero point is subtracted; None unless
            `stored_as_codes` is True.
        largest_weight: Largest magnitude of the weight's codes; None unless `stored_as_codes` is True.
        depthwise: Whether the convolution is depthwise; see `is_depthwise`.
        constant_bias: Whether the bias is a constant of the file without a DequantizeLinear.
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
    """Description of a Clip node for lint.

    Attributes:
        float_before_quantizer: Whether the Clip has constant float bounds and is read by a QuantizeLinear.
    """

    float_before_quantizer: bool


Node = QuantizeNode | LayerNode | ClipNode


def no_rules(node: Node) -> Iterator[Broken]:
    """Yield nothing: the function `rules` of a runtime that has no rules."""
    del node
    yield from ()


@dataclass(frozen=True)
class CpuFamily:
    """CPUs on which a runtime computes the same codes.

    Attributes:
        name: Name of the family in results.
        machines: Values of Python's `platform.machine()` on these CPUs.
        add_kernel: Kernel that adds two tensors of codes on these CPUs. Addition is the only integer operation whose
            result the runtime rounds differently on different CPUs.
    """

    name: str
    machines: tuple[str, ...]
    add_kernel: AddKernel


@dataclass(frozen=True, kw_only=True)
class Target:
    """One runtime on one kind of hardware, and what it requires of a quantized file.

    Attributes:
        name: Name in recipes, files and results.
        title: Name in messages.
        activation_type: Type in which files store the codes of activations.
        zero_points: Whether an activation's zero point may be nonzero. If it may, codes are shifted so that the
            smallest code is the smallest value of `activation_type`.
        sum_limit: Largest magnitude of a sum of two products of codes that does not saturate; None if sums have 32
            bits.
        float_types: Allowed types of the operations that are not INT8, the default first.
        scale_type: Narrowest type in which a file stores scales. Trained scales are rounded up to values that this type
            can represent.
        bias_type: "int32", in units of the input's scale times the weight's scale, or "float". With "int32", a weight's
            codes of 6 bits or fewer are multiplied by a power of two and its scale is divided by it, so that the bias
            is rounded in smaller units.
        float_weights: Whether weights may also be stored as float values with a Q/DQ pair.
        residual: Which inputs of a residual Add carry quantizers.
        quantize_before_activation: Whether a convolution needs a quantizer before an activation other than ReLU and
            ReLU6, because the runtime fuses no other activation.
        moves_codes: Whether Reshape, MaxPool, Concat and similar operations are written on codes, before the
            DequantizeLinear. The runtime fuses an operation only if a DequantizeLinear comes directly before it.
        integer_clip: Whether the float Clip of a ReLU6 is written as an integer Clip after its quantizer, because a
            float Clip would be fused into a float convolution.
        fusions: Maps each ONNX operation that the runtime fuses, if its operands and result are quantized, to the
            integer operation that it becomes.
        float_results: Like `fusions`, for operations with quantized operands whose result stays float.
        always_float: ONNX operations without an integer kernel.
        cpus: CPU families for which it is known how the runtime rounds. Where the codes of several targets are
            compared, the simulator rounds as on the first family. Empty if the runtime does not run on CPUs.
        not_run: Why an export cannot run the runtime and compare codes; None if it can.
        builds_engine: Whether a benchmark builds an engine from the file and reads its plan.
        runs_also: Other runtimes in which a benchmark measures the file too, by their names in results.
        rules: Function that yields the rules that a node violates.
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
        """Return the smallest and the largest code of `activation_type`."""
        return _CODE_RANGES[self.activation_type]

    @property
    def largest_nonnegative(self) -> int:
        """Return the largest code that an activation without negative values has in training, with zero point 0."""
        low, high = self.code_range
        return high - low if self.zero_points else high

    def largest_weight(self, input_codes: int, depthwise: bool) -> int | None:
        """Return the largest magnitude of a weight's codes whose sums do not saturate; None if there is no limit.

        Args:
            input_codes: Largest code that the activation can have, before its zero point is subtracted; the smallest is
                0.
            depthwise: Whether the layer is depthwise (see `is_depthwise`): such a layer does not add pairs of products,
                so it has no limit.
        """
        if self.sum_limit is None or depthwise or input_codes <= 0:
            return None
        return self.sum_limit // (2 * input_codes)

    def cpu(self, machine: str) -> CpuFamily | None:
        """Return the CPU family that a machine belongs to; None if `cpus` does not list it.

        Args:
            machine: Value of `platform.machine()`.
        """
        return next((family for family in self.cpus if machine in family.machines), None)

    def float_type(self, asked: FloatType) -> FloatType:
        """Return the type of the operations that are not INT8: `asked` if the runtime allows it, else its default."""
        return asked if asked in self.float_types else self.float_types[0]


def is_depthwise(weight_shape: Sequence[int], groups: int) -> bool:
    """Return whether a 2-D convolution is depthwise: one filter with one input channel per channel.

    Args:
        weight_shape: [out channels, in channels / groups, height, width].
        groups: Groups of the convolution; 1 for a linear layer.
    """
    return len(weight_shape) == 4 and weight_shape[1] == 1 and weight_shape[0] == groups


def weight_codes(bits: int) -> tuple[int, int]:
    """Return the smallest and the largest code of a weight: (-127, 127) at 8 bits, (-8, 7) at 4 bits."""
    return (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def activation_codes(bits: int, nonnegative: bool) -> tuple[int, int]:
    """Return the smallest and the largest code that an activation can have at a bit width.

    A target may allow fewer codes; see `crqat.core.targets.constraints.Constraints.activation_codes`.

    Args:
        bits: Bit width.
        nonnegative: Whether the activation has no negative values; its codes then start at 0.
    """
    return (0, 2**bits - 1) if nonnegative else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
