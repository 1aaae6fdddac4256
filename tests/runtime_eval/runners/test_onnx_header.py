from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import helper

from crqat.core.errors import UsageError
from crqat.runtime_eval.runners import onnx_header
from tests.runtime_eval.conftest import WriteExport, metadata


@pytest.mark.parametrize("target", ["float", "onnxruntime", "tensorrt"])
def test_it_reads_what_onnx_reads(write_export: WriteExport, target: str) -> None:
    path = write_export() / f"{target}.onnx"
    model = onnx.load(path)
    assert onnx_header.read(path) == {entry.key: entry.value for entry in model.metadata_props} == metadata(target)


def test_any_text_of_any_length_and_none(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model = helper.make_model(helper.make_graph([], "g", [], []), ir_version=8)
    onnx.save(model, path)
    assert onnx_header.read(path) == {}
    texts = {"long": "x" * 70_000, "ä": "ö\n\U0001f600", "empty": ""}
    helper.set_model_props(model, texts)
    model.model_version = -1  # a number of ten bytes
    onnx.save(model, path)
    assert onnx_header.read(path) == texts


def test_fields_of_fixed_length_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    entry = b"\x0a\x01k\x12\x01v"
    path.write_bytes(b"\xf9\x01" + b"12345678" + b"\xfd\x01" + b"1234" + bytes([0x72, len(entry)]) + entry)
    assert onnx_header.read(path) == {"k": "v"}


@pytest.mark.parametrize(
    "content",
    [b"\x80" * 100_000, b"\x72", b"\x72\x05\x0a", b"\xff", b"\x77\x00", b"\x72\x03\x0a\x01\xff", b"not a model"],
)
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"m\.onnx: not an ONNX file"):
        onnx_header.read(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        onnx_header.read(tmp_path / "m.onnx")
