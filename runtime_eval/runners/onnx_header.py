"""Reads metadata and external tensors from an ONNX file without the onnx package, which boards may not have.

An ONNX file is one protobuf message; fields that are not needed are skipped by their length.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from crqat.core.errors import UsageError

# Field numbers of onnx.proto: ModelProto.metadata_props, StringStringEntryProto.key and .value.
_METADATA, _KEY, _VALUE = 14, 1, 2
# Where tensors can be, by kind of message: the field's number, and the kind of message that it holds.
_PATHS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_TENSOR_NAME, _EXTERNAL_DATA = 8, 13
# Protobuf's wire types. ONNX files have no groups, but a reader skips them; their content counts as outside of them.
_VARINT, _FIXED64, _BYTES, _START_GROUP, _END_GROUP, _FIXED32 = range(6)


def read(path: Path) -> dict[str, str]:
    """Return the metadata entries of an ONNX file: values by name.

    Raises:
        UsageError: The file cannot be read or is not a protobuf message.
    """
    try:
        content = memoryview(path.read_bytes())
        entries = [dict(_fields(value)) for number, value in _fields(content) if number == _METADATA]
        return {str(entry.get(_KEY, b""), "utf-8"): str(entry.get(_VALUE, b""), "utf-8") for entry in entries}
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}"
        raise UsageError(msg) from error
    except (IndexError, ValueError) as error:
        msg = f"{path}: not an ONNX file, or a truncated one"
        raise UsageError(msg) from error


def external_tensor(path: Path) -> str | None:
    """Return the name of a tensor whose data are stored outside the ONNX file; None if there is none.

    Such a file is unsafe: ONNX Runtime and TensorRT open the data at any path that it names, and no hash of the data
    is recorded.

    Raises:
        UsageError: The file cannot be read or is not a protobuf message.
    """
    try:
        return _external(memoryview(path.read_bytes()), "model")
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}"
        raise UsageError(msg) from error
    except (IndexError, ValueError, RecursionError) as error:
        msg = f"{path}: not an ONNX file, or a truncated one"
        raise UsageError(msg) from error


def _external(message: memoryview, kind: str) -> str | None:
    if kind == "tensor":
        fields = dict(_fields(message))
        return str(fields.get(_TENSOR_NAME, b""), "utf-8") if _EXTERNAL_DATA in fields else None
    inner = _PATHS[kind]
    found = (_external(value, inner[number]) for number, value in _fields(message) if number in inner)
    return next((name for name in found if name is not None), None)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield number and content of each length-delimited field (bytes, text, message) of a protobuf message."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        kind, number = tag & 7, (tag & 0xFFFFFFFF) >> 3  # truncated as protobuf does
        if kind == _VARINT:
            _, position = _varint(message, position)
            continue
        if kind in (_START_GROUP, _END_GROUP):
            continue
        if kind == _BYTES:
            length, position = _varint(message, position)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            msg = f"a field has the unknown wire type {kind}"
            raise ValueError(msg)
        if position + length > len(message):
            msg = "a field is longer than the file"
            raise ValueError(msg)
        if kind == _BYTES:
            yield number, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """Return a variable-length number and the position after it: seven bits in each byte, the lowest first."""
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return value, position
        if shift == 70:
            msg = "a variable-length number has more than ten bytes"
            raise ValueError(msg)
