"""The target ONNX Runtime: what its CPU provider requires of a file, on x86 with and without VNNI and on ARM."""

from __future__ import annotations

from collections.abc import Iterator

from crqat.core.targets.base import INT16_MAX, Broken, ClipNode, CpuFamily, LayerNode, Node, QuantizeNode, Target


def _rules(node: Node) -> Iterator[Broken]:
    if isinstance(node, QuantizeNode):
        if node.scalar_scale is None or node.of_constant:
            return
        if not node.scalar_scale:
            yield Broken("a per-tensor scale must be a scalar: with shape [1] no Add fuses", "export again")
        if node.zero_point_type != "UINT8":
            yield Broken(
                "activations must be UINT8: x86 kernels for signed ones are slower than float",
                "export with `targets: [onnxruntime]`",
            )
    elif isinstance(node, LayerNode):
        yield from _layer(node)
    elif isinstance(node, ClipNode) and node.float_before_quantizer:
        yield Broken("a float Clip before a quantizer keeps its Conv in float", "export again")


def _layer(node: LayerNode) -> Iterator[Broken]:
    if node.stored_as_codes is False:
        yield Broken("weights must be stored as integers", "export again")
    if node.largest_input is not None and node.largest_weight is not None:
        fitting = ONNXRUNTIME.largest_weight(node.largest_input, node.depthwise)
        if fitting is not None and node.largest_weight > fitting:
            sums = f"{node.largest_input} * 2 * {node.largest_weight} > {INT16_MAX}"
            yield Broken(
                f"16-bit sums saturate on x86 without VNNI: {sums}",
                "train with `targets: [onnxruntime]`, which limits this weight to 7 bits",
            )
    if node.operation == "Gemm" and node.constant_bias and node.input_quantized and node.weight_quantized:
        yield Broken("QGemm needs an int32 bias after a DequantizeLinear", "export again")


ONNXRUNTIME = Target(
    name="onnxruntime",
    title="ONNX Runtime",
    # x86 kernels for signed activations are slower than float; unsigned ones take any zero point.
    activation_type="uint8",
    zero_points=True,
    # The u8*s8 kernels of x86 without VNNI add two products in 16 bits, and saturate silently.
    sum_limit=INT16_MAX,
    # QGemm needs its bias as int32 in units of s_x s_w; QLinearConv would convert a float bias to the same.
    bias_type="int32",
    # An Add is fused only with both inputs quantized.
    residual="both",
    quantize_before_activation=True,
    moves_codes=True,
    integer_clip=True,
    fusions={
        "Conv": "QLinearConv",
        "Gemm": "QGemm",
        "Add": "QLinearAdd",
        "Mul": "QLinearMul",
        "Sigmoid": "QLinearSigmoid",
        "LeakyRelu": "QLinearLeakyRelu",
        "AveragePool": "QLinearAveragePool",
        "GlobalAveragePool": "QLinearGlobalAveragePool",
        "MatMul": "QLinearMatMul",
    },
    # A product of codes with a float result that no quantizer reads, as in attention.
    float_results={"MatMul": "MatMulIntegerToFloat"},
    always_float=(
        "ConvTranspose", "HardSwish", "HardSigmoid", "Elu", "Tanh", "Erf", "PRelu", "Div", "BatchNormalization",
        "ReduceMean",
        "LayerNormalization", "LogSoftmax", "InstanceNormalization", "LpNormalization", "Max", "Min", "Sub", "Pow",
        "Softplus", "Softsign", "Selu", "Celu", "ThresholdedRelu", "Exp", "Log", "Sqrt", "Reciprocal", "Abs", "Neg",
        "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare", "Einsum",
    ),
    # Convolutions, products and global means round alike on both. QLinearMul does not, but codes after it are not
    # exact.
    cpus=(
        CpuFamily("x86", ("x86_64", "AMD64"), "float32"),
        CpuFamily("arm", ("aarch64", "arm64", "ARM64"), "fixed_point"),
    ),
    not_run=None,
    # OpenVINO reads the codes of this file unchanged, with an integer Clip fused after the convolution: measured, all
    # of a ResNet-20's layers were INT8.
    runs_also=("openvino",),
    rules=_rules,
)  # fmt: skip
