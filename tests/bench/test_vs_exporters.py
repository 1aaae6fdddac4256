"""All ways on a network of three layers: what is known to go wrong with each shows up in its row."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from bench import exporter_peers, onnxruntime_process, vs_exporters, wrong_codes
from bench.vs_onnxruntime import IMAGENET, Case
from crqat.runtime_eval.machine import host
from crqat.runtime_eval.trt import versions as tensorrt_api
from tests.export.conftest import sane_bn
from tests.needs import needs

NNCF = importlib.util.find_spec("torchao") is not None
RTX = tensorrt_api.installed(tensorrt_api.RTX) is not None
FLAGS = host.describe().flags or {}
VNNI = any(FLAGS.get(name) for name in ("avx512_vnni", "avx_vnni"))
WAYS = ("NNCF, PERFORMANCE", "NNCF, MIXED", "ONNX Runtime, U8S8", "ONNX Runtime, S8S8, float bias")
Rows = dict[str, dict[str, Any]]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.layers(images)  # NNCF cannot hook a Sequential itself
        return result


@pytest.fixture(scope="module")
def case() -> Case:
    torch.manual_seed(0)
    network = Small()
    images = np.random.default_rng(0).integers(0, 256, (24, 3, 12, 12), dtype=np.uint8)
    sane_bn(network, torch.from_numpy(IMAGENET(images)))
    labels = np.arange(24, dtype=np.int64) % 10
    return Case("small", network.eval(), images, "random", (images, labels))


@pytest.fixture(scope="module")
def rows(case: Case) -> Iterator[Rows]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "bench.onnxruntime_process.shutil.which", lambda name: None
        )  # an emulated CPU takes too long for a test
        patch.setattr(exporter_peers, "WAYS", {name: exporter_peers.WAYS[name] for name in WAYS})
        yield {row["way"]: row for row in vs_exporters.measure(case, rounds=1, seconds=0.05)}


@pytest.mark.slow
def test_every_way_has_a_row_with_all_that_was_measured(rows: Rows) -> None:
    assert list(rows) == [vs_exporters.FLOAT, *WAYS, *vs_exporters.OURS]
    written = [name for name in rows if NNCF or not name.startswith("NNCF")]
    for name in written:
        row = rows[name]
        assert (row["status"], row["onnxruntime"]) == ("written", "loads")
        assert row["size_bytes"] > 0
        assert row["latency"]["latency_ratio"] > 0
        assert row["latency"]["rounds"] == 1
        assert row["accuracy"]["n"] == 24
        assert len(vs_exporters.cells(row)) == len(vs_exporters.COLUMNS)
    for name in written[1:]:
        assert rows[name]["versus_float"]["drop_interval_points"]
        assert rows[name]["codes_without_vnni"]["status"] == "not run: no qemu-x86_64"
    json.dumps(list(rows.values()))


@pytest.mark.slow
def test_codes_are_counted_where_they_can_be_compared(rows: Rows) -> None:
    ours = rows["ours, onnxruntime.onnx"]["codes"]
    assert (ours["status"], ours["wrong"], ours["images"]) == ("counted", 0, vs_exporters.CODE_IMAGES)
    assert ours["codes"] > 2 * 16 * 12 * 12
    # On a CPU without VNNI, ONNX Runtime fuses this file differently once its codes are outputs.
    peer = rows["ONNX Runtime, S8S8, float bias"]["codes"]["status"]
    assert peer == "counted" or (peer.startswith("not comparable: with its codes shown") and not VNNI)
    assert rows["ours, tensorrt.onnx"]["codes"]["status"] == "not comparable: computes in float16"


@pytest.mark.slow
@needs("tensorrt_rtx")
def test_tensorrt_takes_its_own_file_and_refuses_zero_points(rows: Rows) -> None:
    ours = rows["ours, tensorrt.onnx"]["tensorrt"]
    assert (ours["status"], ours["int8_by_macs"]) == ("built", 1.0)
    assert not [remark for remark in ours["remarks"] if remark["severity"] == "error"]
    for name in ("ours, onnxruntime.onnx", "ONNX Runtime, U8S8"):
        assert rows[name]["tensorrt"]["status"].startswith("failed: parse")
        assert rows[name]["tensorrt"]["int8_by_macs"] is None


@pytest.mark.slow
@needs("tensorrt_rtx", "torchao")
def test_nncf_clips_in_tensorrt_or_is_refused(rows: Rows) -> None:
    symmetric = rows["NNCF, PERFORMANCE"]
    assert symmetric["tensorrt"]["status"] == "built"
    kinds = {remark["kind"]: remark["severity"] for remark in symmetric["tensorrt"]["remarks"]}
    assert kinds["uint8_read_as_int8"] == "error"
    assert symmetric["accuracy_as_tensorrt_reads_it"]["n"] == 24
    assert "uint8_read_as_int8" in " ".join(vs_exporters.cells(symmetric))
    mixed = rows["NNCF, MIXED"]
    assert mixed["tensorrt"]["status"].startswith("failed: parse")
    assert "zero point" in mixed["tensorrt"]["status"]
    assert mixed["accuracy_as_tensorrt_reads_it"] is None


def test_a_way_that_cannot_be_gone_says_why(tmp_path: Path, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    source = exporter_peers.Source(case.network, IMAGENET(case.images), tmp_path / "there is no such file.onnx")
    reason = exporter_peers.write("ONNX Runtime, U8S8", source, tmp_path / "out.onnx", {})
    assert reason is not None
    assert reason.startswith("failed: ")
    assert "\n" not in reason
    missing = exporter_peers.Way(lambda source, out: None, ("json", "a_peer_that_is_not_there"))
    monkeypatch.setitem(exporter_peers.WAYS, "missing", missing)
    reason = exporter_peers.write("missing", source, tmp_path / "out.onnx", {})
    assert reason == "not run: not installed (a_peer_that_is_not_there)"
    row = {**vs_exporters._row(case, "missing"), "status": reason}
    assert vs_exporters.cells(row)[:2] == ["missing", reason]


def quantized_twice() -> onnx.ModelProto:
    """The input's codes, and those of ReLU of them at half the scale, which are twice as many, clipped at 255."""
    return onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 19]>
        agraph (float[batch, 4] input) => (float[batch, 4] logits)
        <float fine = {0.5}, float coarse = {1.0}, uint8 zero = {0}>
        {
            point = Constant <value = uint8 {0}> ()
            first = QuantizeLinear(input, coarse, point)
            real = DequantizeLinear(first, coarse, point)
            relu = Relu(real)
            second = QuantizeLinear(relu, fine, zero)
            logits = DequantizeLinear(second, fine, zero)
        }
    """)


def test_a_wrong_code_is_counted_once_and_a_tie_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(quantized_twice(), path)
    images = np.array([[0.2, 2.5, 3.4, 200.0]], np.float32)
    right = wrong_codes.differing_codes(path, images, tmp_path)
    assert (right["status"], right["codes"], right["wrong"]) == ("counted", 8, 0)

    def shown(first: list[int], second: list[int]) -> dict[str, Any]:
        codes = [np.array([values], np.uint8) for values in (first, second)]
        monkeypatch.setattr(wrong_codes, "shown_codes", lambda *arguments: codes)
        return wrong_codes.differing_codes(path, images, tmp_path)

    assert shown([0, 2, 3, 200], [0, 4, 6, 255])["wrong"] == 0
    assert shown([0, 3, 3, 200], [0, 6, 6, 255])["wrong"] == 0  # 2.5 is a tie, and what follows follows from it
    off = shown([0, 2, 7, 200], [1, 4, 14, 255])  # 3.4 is not 7, 0 is not 1, and 14 is right after 7
    assert (off["wrong"], off["largest"]) == (2, 4)


def test_a_file_that_shows_other_codes_than_it_ships_is_not_comparable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(quantized_twice(), path)
    images = np.zeros((1, 4), np.float32)
    monkeypatch.setattr(
        onnxruntime_process, "outputs", lambda model, names, *_: [np.zeros(1) if len(names) > 1 else np.ones(1)]
    )
    assert wrong_codes.differing_codes(path, images, tmp_path)["status"].startswith("not comparable: with its codes")


def test_a_file_that_onnx_runtime_does_not_run_is_not_comparable(tmp_path: Path) -> None:
    path, model = tmp_path / "model.onnx", quantized_twice()
    model.graph.node[-1].op_type = "NoSuchOperation"
    onnx.save(model, path)
    status = wrong_codes.differing_codes(path, np.zeros((1, 4), np.float32), tmp_path)["status"]
    assert status.startswith("not comparable: ") and "NoSuchOperation" in status


def test_uint8_codes_become_int8_of_the_same_scale() -> None:
    model = vs_exporters.uint8_as_int8(wrong_codes.with_constants_folded(quantized_twice()))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"input": np.array([[3.0, 63.0, 64.0, 100.0]], np.float32)})
    assert logits.tolist() == [[3.0, 63.0, 63.5, 63.5]]  # clipped at 127 halves
