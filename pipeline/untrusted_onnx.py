"""An ONNX file from anywhere, read only as far as it is all there: nothing elsewhere is opened, nothing made large."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crqat.core.errors import ToolError, UsageError

if TYPE_CHECKING:
    import onnx
    from google.protobuf.message import Message  # type: ignore[import-untyped]

# Protobuf's own limit.
_MAX_BYTES = 2**31 - 1
# TensorRT's limit of a tensor's elements, and 8 GiB in float32.
_MAX_ELEMENTS = 2**31 - 1


def read(path: Path) -> onnx.ModelProto:
    """The model, none of whose tensors lies in another file or is larger than the file.

    Raises:
        UsageError: It is no ONNX file, or a tensor in it is refused; the message names both.
        ToolError: It cannot be read.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            msg = f"{path}: {size / 2**30:.1f} GiB; ONNX files end at 2 GiB, and external data is refused"
            raise UsageError(msg)
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        msg = f"{path}: not an ONNX file, or a truncated one"
        raise UsageError(msg) from error
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}"
        raise ToolError(msg) from error
    if not _all_text(model):
        msg = f"{path}: a name in it is no UTF-8 text; damaged"
        raise UsageError(msg)
    for tensor in _tensors(model):
        _check_tensor(path, tensor)
    return model


def check(path: Path, model: onnx.ModelProto) -> None:
    """Check a model by ONNX's rules, and that no tensor whose shape it fixes is beyond what a runtime can hold.

    Shapes that depend on the input's values are known to nobody before the model runs; it runs in a process of its own.

    Raises:
        UsageError: It breaks a rule, or has such a tensor.
    """
    import onnx

    try:
        onnx.checker.check_model(model)
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except UnicodeDecodeError as error:  # it cites bytes of the file
        msg = f"{path}: breaks ONNX's rules, and the checker's words on it are no text"
        raise UsageError(msg) from error
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError) as error:
        rule = (str(error).strip().splitlines() or [type(error).__name__])[0]
        msg = f"{path}: breaks ONNX's rules: {rule}"
        raise UsageError(msg) from error
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        sizes = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        elements = math.prod(size for size in sizes if size > 0)  # the others are known when it runs
        if elements > _MAX_ELEMENTS:
            shape = " x ".join(str(size) if size > 0 else "?" for size in sizes)
            msg = f"{path}: the tensor {value.name} has the shape {shape}; more than 2^31 elements are refused"
            raise UsageError(msg)


def _all_text(message: Message) -> bool:
    """Whether every text is one: protobuf gives what is no UTF-8 as bytes, which nothing behind it expects."""
    for field, value in message.ListFields():
        parts = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
        if field.type == field.TYPE_MESSAGE and not all(_all_text(part) for part in parts):
            return False
        if field.type == field.TYPE_STRING and not all(isinstance(part, str) for part in parts):
            return False
    return True


def _check_tensor(path: Path, tensor: onnx.TensorProto) -> None:
    import onnx

    # A tensor in another file is not covered by this one's hash, and its path may lead anywhere.
    if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
        msg = f"{path}: the tensor {tensor.name} lies in another file; external data is refused"
        raise UsageError(msg)
    if not tensor.HasField("raw_data") or min(tensor.dims, default=0) < 0:
        return  # the checker looks at these
    try:
        bits = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, TypeError):
        return  # and at these
    bits = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4}.get(onnx.TensorProto.DataType.Name(tensor.data_type), bits)
    needed = math.ceil(math.prod(tensor.dims) * bits / 8) if math.prod(tensor.dims) < 2**50 else 2**50
    if needed != len(tensor.raw_data):
        shape = " x ".join(map(str, tensor.dims)) or "one element"
        msg = f"{path}: the tensor {tensor.name} claims {shape} and has {len(tensor.raw_data)} bytes; damaged"
        raise UsageError(msg)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model, in subgraphs and functions too."""
    yield from _tensors_of_graph(model.graph)
    for training in model.training_info:
        yield from (*_tensors_of_graph(training.initialization), *_tensors_of_graph(training.algorithm))
    for function in model.functions:
        for node in function.node:
            yield from _tensors_of_node(node)


def _tensors_of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _tensors_of_node(node)


def _tensors_of_node(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for graph in (attribute.g, *attribute.graphs):
            yield from _tensors_of_graph(graph)
