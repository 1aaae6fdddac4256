"""The metadata of an ONNX file, read without onnx or ONNX Runtime: a board may have TensorRT alone.

An ONNX file is one protobuf message. Its fields are skipped by their lengths but for `metadata_props`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from artifacts.errors import UsageError

# Numbers of onnx.proto: ModelProto.metadata_props, StringStringEntryProto.key and .value.
_METADATA, _KEY, _VALUE = 14, 1, 2
# Protobuf's wire types, of which ONNX files have these.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read(path: Path) -> dict[str, str]:
    """The metadata, strings by name.

    Raises:
        UsageError: The file cannot be read or is no protobuf message.
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


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each field that holds bytes; the others are passed over."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == _VARINT:
            _, position = _varint(message, position)
            continue
        if kind == _BYTES:
            length, position = _varint(message, position)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            msg = f"wire type {kind}"
            raise ValueError(msg)
        if position + length > len(message):
            msg = "a field is longer than the file"
            raise ValueError(msg)
        if kind == _BYTES:
            yield tag >> 3, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """A number of variable length, and where it ends: seven bits in each byte, the lowest first."""
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return value, position
