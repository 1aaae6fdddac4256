"""Reads untrusted ONNX files: checks all sizes before allocating, and opens no file outside of the model's folder.

Tensors in external data files are read for float networks only, because exporters write such files by default.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crqat.core.errors import ToolError, UsageError

if TYPE_CHECKING:
    import onnx
    from google.protobuf.message import Message  # type: ignore[import-untyped]

# Size limit of protobuf, in bytes.
_MAX_BYTES = 2**31 - 1
# TensorRT's limit on the elements of a tensor; 8 GiB in float32.
_MAX_ELEMENTS = 2**31 - 1


def read(path: Path, beside: bool = False) -> onnx.ModelProto:
    """Read a model and check that each tensor has as many bytes as its shape requires.

    Args:
        path: The file.
        beside: Read external data files in its folder or below it, as large models have them. By default they are
            refused, because the model's hash does not cover them.

    Raises:
        UsageError: The file is not an ONNX file, or one of its tensors is refused; the message names both.
        ToolError: The file cannot be read.
    """
    model = _parsed(path)
    left = _MAX_BYTES - model.ByteSize()
    for tensor in _tensors(model):
        if beside and _is_external(tensor):
            left -= _take_in(path, tensor, left)
        _check_tensor(path, tensor)
    return model


def files_beside(path: Path) -> list[Path]:
    """Return the external data files of a model, each once.

    Raises:
        UsageError: See `read`.
        ToolError: See `read`.
    """
    found = [_External.of(path, tensor).path for tensor in _tensors(_parsed(path)) if _is_external(tensor)]
    return list(dict.fromkeys(found))


def _parsed(path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            msg = f"{path}: {size / 2**30:.1f} GiB; ONNX files are limited to 2 GiB"
            raise UsageError(msg)
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        msg = f"{path}: not an ONNX file, or a truncated one"
        raise UsageError(msg) from error
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}"
        raise ToolError(msg) from error
    if not _all_text(model):
        msg = f"{path}: a name in it is not UTF-8; the file is damaged, export it again"
        raise UsageError(msg)
    return model


def check(path: Path, model: onnx.ModelProto) -> None:
    """Check a model by ONNX's rules, and that no tensor of known shape is larger than a runtime can hold.

    Shapes that depend on the input's values are known only when the model runs, which it does in a separate process.

    Raises:
        UsageError: The model breaks a rule, or has a tensor that is too large.
    """
    import onnx

    try:
        onnx.checker.check_model(model)
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except UnicodeDecodeError as error:  # the checker quotes bytes of the file
        msg = f"{path}: breaks ONNX's rules, and the checker's message is not valid text"
        raise UsageError(msg) from error
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError) as error:
        rule = (str(error).strip().splitlines() or [type(error).__name__])[0]
        msg = f"{path}: breaks ONNX's rules: {rule}"
        raise UsageError(msg) from error
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        sizes = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        elements = math.prod(size for size in sizes if size > 0)  # other sizes are known when it runs
        if elements > _MAX_ELEMENTS:
            shape = " x ".join(str(size) if size > 0 else "?" for size in sizes)
            msg = f"{path}: the tensor {value.name} has the shape {shape}; more than 2^31 elements are refused"
            raise UsageError(msg)


def _all_text(message: Message) -> bool:
    """Whether every string is UTF-8: protobuf returns other strings as bytes, which later code does not expect."""
    for field, value in message.ListFields():
        parts = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
        if field.type == field.TYPE_MESSAGE and not all(_all_text(part) for part in parts):
            return False
        if field.type == field.TYPE_STRING and not all(isinstance(part, str) for part in parts):
            return False
    return True


def _check_tensor(path: Path, tensor: onnx.TensorProto) -> None:
    # This file's hash does not cover tensors in another file, whose path may lead anywhere.
    if _is_external(tensor):
        msg = f"{path}: the tensor {tensor.name} lies in another file; external data is refused"
        raise UsageError(msg)
    needed = _bytes(tensor) if tensor.HasField("raw_data") else None
    if needed is not None and needed != len(tensor.raw_data):
        shape = " x ".join(map(str, tensor.dims)) or "one element"
        msg = f"{path}: the tensor {tensor.name} claims {shape} and has {len(tensor.raw_data)} bytes; damaged"
        raise UsageError(msg)


def _bytes(tensor: onnx.TensorProto) -> int | None:
    """Return the bytes that a tensor's shape and type require; None if these are invalid, which the checker reports."""
    import onnx

    if min(tensor.dims, default=0) < 0:
        return None
    try:
        bits = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, TypeError):
        return None
    bits = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4}.get(onnx.TensorProto.DataType.Name(tensor.data_type), bits)
    elements = math.prod(tensor.dims)
    return math.ceil(elements * bits / 8) if elements < 2**50 else 2**50


def _is_external(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == tensor.EXTERNAL or bool(tensor.external_data)


@dataclass(frozen=True)
class _External:
    """Location of an external tensor: a file in the model's folder or below it, and a range of bytes.

    Attributes:
        path: Path with links resolved; the file exists.
        offset: First byte of the tensor.
        length: Number of bytes; None extends to the file's end.
    """

    path: Path
    offset: int
    length: int | None

    @classmethod
    def of(cls, path: Path, tensor: onnx.TensorProto) -> _External:
        said = {entry.key: entry.value for entry in tensor.external_data}
        location = said.get("location", "")
        folder = path.parent.resolve()
        try:
            file = (folder / location).resolve()
            offset, length = (int(said.get(key) or 0) for key in ("offset", "length"))
        except (ValueError, OSError, RuntimeError) as error:  # a zero byte, no number, links in a circle
            msg = f"{path}: the location of the tensor {tensor.name} is not valid; the file is damaged, export it again"
            raise UsageError(msg) from error
        # No path in the file may lead outside of the folder, not even through links.
        if folder not in file.parents:
            msg = f"{path}: the tensor {tensor.name} lies in {location!r}, outside of the file's own folder; refused"
            raise UsageError(msg)
        if not file.is_file():
            msg = (
                f"{path}: the tensor {tensor.name} lies in {location}, which is not there; put that file beside it, or "
                "export with external_data=False"
            )
            raise UsageError(msg)
        if offset < 0 or length < 0:
            msg = (
                f"{path}: the byte range of the tensor {tensor.name} is not valid; the file is damaged, export it again"
            )
            raise UsageError(msg)
        return cls(file, offset, length if "length" in said else None)


def _take_in(path: Path, tensor: onnx.TensorProto, most: int) -> int:
    """Read an external tensor into the model and return its size in bytes."""
    place, needed = _External.of(path, tensor), _bytes(tensor)
    if needed is not None and needed > most:
        msg = f"{path}: more than 2 GiB with the files beside it; ONNX Runtime cannot take that as one model"
        raise UsageError(msg)
    try:
        there = place.path.stat().st_size - place.offset
        if needed is None or there < needed or place.length not in (None, needed):
            takes = "has no valid shape or type" if needed is None else f"takes {needed} bytes by its shape and type"
            stated = "no length" if place.length is None else f"{place.length} bytes"
            msg = (
                f"{path}: the tensor {tensor.name} {takes}; its entry states {stated}, and {place.path.name} has "
                f"{max(there, 0)} from its first byte on; the file is damaged, export it again"
            )
            raise UsageError(msg)
        with place.path.open("rb") as file:
            file.seek(place.offset)
            content = file.read(needed)
    except OSError as error:
        msg = f"{place.path}: cannot be read: {error.strerror}"
        raise ToolError(msg) from error
    tensor.ClearField("external_data")
    tensor.data_location = tensor.DEFAULT
    tensor.raw_data = content
    return needed


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of a model, including those in subgraphs and functions."""
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
