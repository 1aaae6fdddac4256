"""Reads the ONNX file of a float classifier; an error names the node that is not supported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crqat.core.errors import UsageError
from crqat.train.models import untrusted_onnx
from crqat.train.models.onnx_operators import OPERATORS

if TYPE_CHECKING:
    import onnx

# Supported opsets: before 13 operators have other inputs, and later ones than 23 could not be tested.
OPSETS = (13, 23)
_CHANNELS = range(1, 5)
_LOOPS = ("Loop", "If", "Scan", "SequenceMap")
_STANDARD = ("", "ai.onnx")


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file that was read and checked.

    Attributes:
        path: Path of the file.
        model: The model with all tensors, including those of external data files.
        input: Name of the input.
        output: Name of the output.
        shape: Shape of the input, [N, C, H, W]; None for a size that the file leaves open.
    """

    path: Path
    model: onnx.ModelProto
    input: str
    output: str
    shape: tuple[int | None, int, int | None, int | None]


def read(path: Path) -> OnnxFile:
    """Read an ONNX file, and check all that can be checked before its conversion.

    Args:
        path: An ONNX file; its tensors may lie in external data files.

    Raises:
        UsageError: The file is not ONNX, is damaged, is not a float network with one input of images and one output,
            or has an unsupported operator; the message names the file and the node.
        ToolError: The file cannot be read.
    """
    if not path.is_file():
        msg = f"model.name: no file {path} (relative to {Path.cwd()}); correct the path"
        raise UsageError(msg)
    model = untrusted_onnx.read(path, beside=True)
    if not model.graph.node:
        msg = f"{path}: contains no operators; export it again"
        raise UsageError(msg)
    # Loops and branches are named first: another unsupported operator may only compute their condition.
    for node in sorted(model.graph.node, key=lambda node: node.op_type not in _LOOPS):
        _check_operator(path, node)
    versions = {entry.domain: entry.version for entry in model.opset_import if entry.domain in _STANDARD}
    version = max(versions.values(), default=0)
    if not OPSETS[0] <= version <= OPSETS[1]:
        msg = (
            f"{path}: has opset {version}; opsets {OPSETS[0]} to {OPSETS[1]} are supported: export it again with "
            "opset_version=17"
        )
        raise UsageError(msg)
    if model.functions:
        msg = f"{path}: defines functions, such as {model.functions[0].name}; export it without ONNX functions"
        raise UsageError(msg)
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    for kind, values in (("inputs", inputs), ("outputs", list(model.graph.output))):
        if len(values) != 1:
            names = ", ".join(value.name for value in values[:4])
            msg = f"{path}: has {len(values)} {kind} ({names}); a classifier has one: images in, logits out"
            raise UsageError(msg)
    untrusted_onnx.check(path, model)
    return OnnxFile(path, model, inputs[0].name, model.graph.output[0].name, _shape(path, inputs[0]))


def _check_operator(path: Path, node: onnx.NodeProto) -> None:
    kind, reason = node.op_type, ""
    if node.domain not in _STANDARD:
        reason = f"is an operator of {node.domain}; export with ONNX's own operators alone, before any optimizer"
    elif kind in _LOOPS:
        reason = "contains a subgraph; export the network without loops and branches"
    elif "Quantize" in kind or "Integer" in kind or kind.startswith("QLinear"):
        reason = "belongs to a quantized file; give the float file from which it was quantized"
    elif kind not in OPERATORS:
        reason = "is not a supported operator; change the network, or give it as module:function"
    if reason:
        raise refusal(path, node, reason)


def refusal(path: Path, node: onnx.NodeProto, reason: str) -> UsageError:
    """Return the error for a node that is not supported; it names the file, the node and its operator."""
    name = node.name or next(iter(node.output), "without a name")
    return UsageError(f"{path}: node {name} ({node.op_type}): {reason}")


def _shape(path: Path, value: onnx.ValueInfoProto) -> tuple[int | None, int, int | None, int | None]:
    """Return the shape of the input; None where it is free."""
    import onnx

    kind = value.type.tensor_type
    sizes = [side.dim_value if side.HasField("dim_value") and side.dim_value > 0 else None for side in kind.shape.dim]
    if kind.elem_type != onnx.TensorProto.FLOAT:
        name = onnx.TensorProto.DataType.Name(kind.elem_type)
        msg = f"{path}: the input {value.name} is {name}; only float32 images and weights are supported"
        raise UsageError(msg)
    if len(sizes) != 4 or sizes[1] is None or sizes[1] not in _CHANNELS:
        shape = " x ".join(str(size or "?") for size in sizes) or "no known shape"
        msg = (
            f"{path}: the input {value.name} has the shape {shape}; it must be N x C x H x W with a fixed C of 1 to 4: "
            "channels come before height and width"
        )
        raise UsageError(msg)
    return sizes[0], sizes[1], sizes[2], sizes[3]
