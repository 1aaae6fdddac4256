"""The target TensorRT: what it requires of a file with explicit quantization, on GPUs."""

from __future__ import annotations

from collections.abc import Iterator

from crqat.core.targets.base import Broken, LayerNode, Node, QuantizeNode, Target


def _rules(node: Node) -> Iterator[Broken]:
    if isinstance(node, QuantizeNode):
        if node.zero_point_type != "INT8":
            yield Broken(
                f"TensorRT's INT8 is signed; it reads {node.zero_point_type or 'none'} with the same scale and clips "
                "half of the range",
                "export with `targets: [tensorrt]`",
            )
        elif not node.zero_point_is_zero:
            yield Broken("TensorRT refuses a zero point other than 0", "export with `targets: [tensorrt]`")
    # TensorRT multiplies in INT8 if both operands come from a DequantizeLinear. If neither does, the layout wants the
    # layer in float, as NNCF does in squeeze-and-excitation; the gate's `min_int8_coverage` counts that.
    elif isinstance(node, LayerNode) and node.input_quantized != node.weight_quantized:
        missing, there = ("weight", "input") if node.input_quantized else ("input", "weight")
        yield Broken(
            f"its {missing} is not quantized though its {there} is, so TensorRT runs it in float",
            "quantize it, or leave tensorrt out of `export.targets`",
        )


TENSORRT = Target(
    name="tensorrt",
    title="TensorRT",
    # TensorRT has no unsigned INT8: it reads UINT8 as INT8 with the same scale and silently clips half of the range.
    activation_type="int8",
    zero_points=False,
    # A strongly typed network runs the float parts in the file's own type; boards need float16.
    float_types=("float16", "float32"),
    scale_type="float16",
    bias_type="float",
    float_weights=True,
    # TensorRT fuses an Add with the convolution before it; a quantizer there would only add work.
    residual="skip",
    not_run="no CUDA device",
    builds_engine=True,
    rules=_rules,
)
