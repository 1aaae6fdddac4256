"""`crqat.benchmark` and `crqat.gate` on files of `crqat.export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import crqat
from crqat.core.results.benchmark import read_results
from crqat.core.typed_json import text

PREPROCESSING = crqat.Preprocessing((0.3,), (0.4,))
QUICK: dict[str, Any] = {"latency_rounds": 6, "latency_seconds": 0.06, "warm_up_seconds": 0.0}
N = 300


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    return torch.from_numpy((data.images * 15).astype(np.uint8)[:, None]), torch.from_numpy(data.target)


@pytest.fixture(scope="module")
def files(digits: tuple[torch.Tensor, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> crqat.Export:
    """A small network that reads digits, quantized after training."""
    images, labels = torch.from_numpy(PREPROCESSING(digits[0][N:].numpy())), digits[1][N:]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model = crqat.quantize(net, calibration=[images[:256]])
    out = tmp_path_factory.mktemp("export") / "digits"
    return crqat.export(model, out, images=digits[0][N : N + 8], preprocessing=PREPROCESSING)


@pytest.fixture(scope="module")
def measured(files: crqat.Export, digits: tuple[torch.Tensor, torch.Tensor]) -> crqat.Benchmark:
    return crqat.benchmark(files, digits[0][:N], digits[1][:N], accuracy_batch=64, **QUICK)


def test_the_results_are_those_of_the_files(
    measured: crqat.Benchmark, files: crqat.Export, digits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    assert set(measured.files) == {"float.onnx", "float16.onnx", "onnxruntime.onnx", "tensorrt.onnx"}
    session = onnxruntime.InferenceSession(str(files.files["onnxruntime"]))
    (logits,) = session.run(["logits"], {"input": PREPROCESSING(digits[0][:N].numpy())})
    int8, baseline = measured.files["onnxruntime.onnx"], measured.files["float.onnx"]
    assert (int8.target, int8.status) == ("onnxruntime", "measured")
    assert int8.accuracy is not None and baseline.accuracy is not None and int8.accuracy.n == N
    assert int8.accuracy.top1 == pytest.approx((logits.argmax(1) == digits[1][:N].numpy()).mean())
    assert int8.accuracy.top1 > 0.8 and int8.timed is not None and int8.timed.p50_ms > 0
    assert int8.versus_float is not None and int8.versus_float.latency_ratio is not None
    assert int8.versus_float.drop_points == pytest.approx(100 * (baseline.accuracy.top1 - int8.accuracy.top1))
    assert int8.size_bytes == files.files["onnxruntime"].stat().st_size
    assert baseline.versus_float is None


def test_the_results_are_those_of_a_run(measured: crqat.Benchmark, tmp_path: Path) -> None:
    """results.json of a run has the same shape, so that `crqat gate` and `crqat report` read both."""
    path = tmp_path / "results.json"
    path.write_text(text(measured.results))
    assert read_results(path).models == measured.results.models
    for results in (path, str(path), read_results(path)):
        assert crqat.gate(results, min_int8_coverage=None) == crqat.gate(measured, min_int8_coverage=None)


def test_print_shows_a_table_that_one_can_read(measured: crqat.Benchmark) -> None:
    title, header, *rows = str(measured).splitlines()
    assert title.startswith(f"digits: test images: {N}; threads: 1; ")
    assert rows[2].split()[:2] == ["onnxruntime.onnx", "onnxruntime"]
    column = header.index("top-1 %")
    accuracy = measured.files["onnxruntime.onnx"].accuracy
    assert accuracy is not None and rows[2][column:].split()[0] == f"{100 * accuracy.top1:.2f}"
    assert any(line.startswith("tensorrt.onnx: latency not run: ") for line in rows)


def test_a_directory_will_do_and_arrays(files: crqat.Export, digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    again = crqat.benchmark(str(files.directory), digits[0][:40].numpy(), digits[1][:40].numpy(), threads=1, **QUICK)
    accuracy = again.files["float.onnx"].accuracy
    assert accuracy is not None and accuracy.n == 40
    assert sorted(path.name for path in files.directory.iterdir()) == [
        "float.onnx", "float16.onnx", "manifest.json", "onnxruntime.codes.npz", "onnxruntime.onnx", "tensorrt.onnx",
    ]  # fmt: skip


def test_the_gate_judges(measured: crqat.Benchmark) -> None:
    loose = crqat.gate(measured, max_accuracy_drop=50, min_accuracy=0.5, min_int8_coverage=None)
    assert (loose.exit_code, loose.passed) == (0, True), str(loose)
    assert {verdict.rule for verdict in loose.verdicts} >= {"verification", "codes_on_this_cpu", "accuracy_drop"}
    assert loose.lines[-1] == "gate: PASS" and str(loose) == "\n".join(loose.lines)
    strict = crqat.gate(measured, min_accuracy=1.0, max_accuracy_drop=50)
    assert (strict.exit_code, strict.passed, strict.lines[-1]) == (1, False, "gate: FAIL")


def test_what_does_not_fit_is_named(
    files: crqat.Export, measured: crqat.Benchmark, digits: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    images, labels = digits[0][:8], digits[1][:8]
    for arguments, message in (
        ((files, images.float(), labels), r"^images: float32 of shape \[8, 1, 8, 8\]; expected bytes"),
        (
            (files, images.expand(8, 3, 8, 8), labels),
            r"^preprocessing: 1 means and 1 stds; the images of shape \[3, 8, 8\]",
        ),
        ((files, images, labels[:7]), r"^labels: int64 of shape \[7\]; expected one integer for each of 8 images$"),
        ((files, images, labels.float()), r"^labels: float32 of shape \[8\]; expected one integer"),
        ((files, images, labels + 5), r"has 10 classes, but the test labels go from 5 to 1\d"),
        ((tmp_path, images, labels), r"manifest\.json: missing"),
        ((tmp_path / "nowhere", images, labels), r"nowhere: no such"),
    ):
        with pytest.raises(crqat.UsageError, match=message):
            crqat.benchmark(*arguments, **QUICK)
    with pytest.raises(crqat.UsageError, match=r"^latency_rounds: Input should be greater than or equal to 6, not 3$"):
        crqat.benchmark(files, images, labels, latency_rounds=3)
    with pytest.raises(
        crqat.UsageError, match=r"^max_accuracy_drop: Input should be less than or equal to 100, not 101$"
    ):
        crqat.gate(measured, max_accuracy_drop=101)


def test_a_file_that_was_changed_is_refused(files: crqat.Export, digits: Any, tmp_path: Path) -> None:
    import shutil

    copied = shutil.copytree(files.directory, tmp_path / "copied")
    (copied / "tensorrt.onnx").write_bytes(b"something else")
    with pytest.raises(crqat.UsageError, match=r"tensorrt\.onnx: altered or damaged"):
        crqat.benchmark(copied, digits[0][:8], digits[1][:8], **QUICK)


def test_a_runs_export_is_measured_on_other_images_and_stays_as_it_is(
    files: crqat.Export, digits: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    """A stage's directory has images of its own, and says the preprocessing elsewhere."""
    from crqat.core.run_directory import Manifest, read_manifest, verify_stage, write_stage

    payload = read_manifest(files.directory).payload
    training: dict[str, Any] = {
        "best": "student",
        "candidates": {"student": {"validation_accuracy": 0.9}},
        "class_names": ["0"],
    }
    training |= {"float": {"validation_accuracy": 0.9}, "input_shape": [1, 8, 8], "validation_images": 9}
    training |= {"compiled": "no", "device": "cpu", "seconds": 1.0, "quantizers": 5}
    payload["training"] = {**training, "preprocessing": payload.pop("preprocessing")}
    manifest = Manifest("export", "key", None, {}, {}, {**payload, "images": "images.npy", "labels": "labels.npy"})
    with write_stage(tmp_path, manifest) as out:
        for path in [*files.directory.glob("*.onnx"), *files.directory.glob("*.npz")]:
            (out / path.name).write_bytes(path.read_bytes())
        np.save(out / "images.npy", digits[0][:3].numpy())
        np.save(out / "labels.npy", digits[1][:3].numpy())
    measured = crqat.benchmark(tmp_path / "export", digits[0][:20], digits[1][:20], **QUICK)
    assert measured.results.dataset is not None and measured.results.dataset.n == 20
    assert len(np.load(tmp_path / "export" / "images.npy")) == 3
    verify_stage(tmp_path / "export")
