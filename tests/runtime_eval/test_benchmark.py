from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from crqat.core import strict_json
from crqat.core.errors import ToolError, UsageError
from crqat.core.progress import Progress, quiet
from crqat.core.results.benchmark import FloatLayers, NoLatency, Results
from crqat.core.results.device import Jetson
from crqat.core.results.engine import EngineReport
from crqat.core.results.export import ExportedModel
from crqat.core.run_directory import manifest_hash
from crqat.core.typed_json import from_json, text, to_json
from crqat.pipeline.gate.rules import GateConfig, judge
from crqat.runtime_eval.benchmark import _is_timed, _Model, _not_run
from crqat.runtime_eval.benchmark import benchmark as typed_benchmark
from crqat.runtime_eval.machine import host, jetson
from crqat.runtime_eval.measure.worker_client import Worker
from crqat.runtime_eval.runners.onnxruntime import float16_is_rounded
from crqat.runtime_eval.trt import engine, plan_file
from crqat.runtime_eval.trt import versions as tensorrt_api
from tests.needs import needs
from tests.runtime_eval.conftest import (
    FUSION,
    PREPROCESSING,
    QUICK,
    VERIFICATION,
    Digits,
    WriteExport,
    metadata,
    onnx_bytes,
)
from tests.runtime_eval.runners.fake_cuda import PLAN, FakeTensorRT

# A test knows which of the parts that may be None are there.
benchmark: Callable[..., Any] = typed_benchmark


@pytest.fixture(autouse=True)
def no_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    """No TensorRT, as on most machines; the test that wants a builder asks for it."""
    monkeypatch.setattr(tensorrt_api, "choose", lambda: None)


def in_process(path: Path, digits: Digits) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The logits of a file, all images at once, in this process; another runtime's file without ORT's bias rounding."""
    disabled = ["WeightBiasQuantization"] if path.name == "tensorrt.onnx" else []
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"], disabled_optimizers=disabled)
    logits: np.ndarray[Any, np.dtype[np.float32]] = session.run(["logits"], {"input": PREPROCESSING(digits.images)})[0]
    return logits


def worker_of(file: str) -> int | None:
    """The process id of this process's worker for a model file."""
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            arguments = (status.parent / "cmdline").read_text().split("\0")
            parent = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("PPid:"))
        except OSError:  # it has just ended
            continue
        if (
            "crqat.runtime_eval.measure.worker" in arguments
            and int(parent) == os.getpid()
            and Path(arguments[3]).name == file
        ):
            return int(status.parent.name)
    return None


def send_once(number: signal.Signals, file: str, when: str) -> Progress:
    """A progress that sends a signal to the worker of a file at its first step of the task `when`."""
    sent: list[int] = []

    def progress(task: str, done: int, total: int, note: str = "") -> None:
        pid = worker_of(file) if task == when and not sent else None
        if pid is not None:
            os.kill(pid, number)
            sent.append(pid)

    return progress


def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def test_results(write_export: WriteExport, digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CUDA_DEVICES", ())
    export = write_export()
    steps: list[tuple[str, int, int]] = []
    turns: list[str] = []

    def progress(task: str, done: int, total: int, note: str = "") -> None:
        steps.append((task, done, total))
        turns.extend([note] if note else [])

    results = benchmark(export, QUICK, progress)

    assert from_json(Results, strict_json.parse(text(results))) == results
    assert (results.run, results.parent, results.schema_version) == ("digits", manifest_hash(export), 1)
    assert (results.dataset.n, results.dataset.classes) == (797, 10)
    assert results.config.latency_rounds == 6
    assert results.device.load_average.start is not None and results.crqat_version is not None
    assert list(results.models) == ["float.onnx", "onnxruntime.onnx", "tensorrt.onnx"]
    assert ("latency", 6, 6) in steps
    # In turns, and each model comes first as often as the other.
    assert turns == ["float.onnx", "onnxruntime.onnx", "onnxruntime.onnx", "float.onnx"] * 3
    assert [step[1:] for step in steps if step[0] == "accuracy of float.onnx"][-2:] == [(700, 797), (797, 797)]

    float_right = in_process(export / "float.onnx", digits).argmax(axis=1) == digits.labels
    # The float network without ONNX: the file, the preprocessing and the order of the images are right.
    assert (float_right == (digits.logits().argmax(axis=1) == digits.labels)).all()
    for file, model in results.models.items():
        logits = in_process(export / file, digits)
        right = logits.argmax(axis=1) == digits.labels
        rank = (logits > logits[np.arange(797), digits.labels][:, None]).sum(axis=1)
        assert model.status == "measured"
        assert (model.classes() == logits.argmax(axis=1)).all()
        assert (model.node_times is None) == (file == "tensorrt.onnx")
        assert (model.runtime, model.provider) == ("onnxruntime", "CPUExecutionProvider")
        assert model.size_bytes == (export / file).stat().st_size
        assert model.accuracy.n == 797
        assert model.accuracy.top1 == right.sum() / 797
        assert model.accuracy.top5 == (rank < 5).sum() / 797
        assert right.sum() > 600
        if file != "float.onnx":
            table = [int((float_right & right).sum()), int((float_right & ~right).sum())]
            assert [getattr(model.versus_float, key) for key in ("both_right", "only_float_right")] == table
            assert table[1] > 0

    base, fast, tensorrt = (results.models[file] for file in ("float.onnx", "onnxruntime.onnx", "tensorrt.onnx"))
    assert base.versus_float is None
    assert base.latency.status == "measured"
    assert (fast.latency.rounds, fast.latency.batch, fast.latency.threads) == (6, 1, 1)
    low, high = fast.versus_float.latency_ratio_interval
    assert 0 < low <= fast.versus_float.latency_ratio <= high
    assert fast.versus_float.latency_ratio_coverage == 0.96875
    assert fast.versus_float.size_ratio == fast.size_bytes / base.size_bytes
    assert (to_json(fast.verification), to_json(fast.fusion)) == (VERIFICATION, FUSION)
    # The worker imports numpy and ONNX Runtime; this process has torch, sklearn and more.
    assert 10e6 < fast.peak_memory_bytes < 500e6
    assert to_json(tensorrt.latency) == {"status": "not run: no CUDA device"}
    assert tensorrt.versus_float.latency_ratio is None
    assert tensorrt.peak_memory_bytes is None
    assert tensorrt.fusion is None
    assert to_json(tensorrt.engine) == {
        "status": "not run: tensorrt_rtx is not installed; pip install crqat-edge[tensorrt-cpu]"
    }
    assert (base.engine, fast.engine, results.engines) == (None, None, {})


@needs("tensorrt_rtx")
def test_the_engine_of_the_file_for_tensorrt(write_export: WriteExport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_api, "choose", lambda: "tensorrt_rtx")
    models = [
        {"file": "float.onnx", "target": "float"},
        {"file": "tensorrt.onnx", "target": "tensorrt", "macs": {"node_of_y0": 2048, "node_of_logits": 320},
         "float_layers": {"macs": {}, "share": 0.0}},
    ]  # fmt: skip
    steps: list[tuple[str, int, str]] = []
    results = benchmark(
        write_export(payload={"models": models}),
        QUICK,
        lambda task, done, total, note="": steps.append((task, done, note)),
    )
    assert from_json(Results, strict_json.parse(text(results))) == results
    summary, report = results.models["tensorrt.onnx"].engine, results.engines["tensorrt.onnx"]
    assert summary.status == "built"
    # The weights are per tensor and the network is two Gemms.
    assert (summary.coverage.by_macs, summary.coverage.macs, summary.batch) == (1.0, 2368, (1, 1, 100))
    assert [layer.type for layer in report.layers if layer.kind == "matmul"] == ["gemm", "gemm"]
    assert results.models["float.onnx"].engine is None
    assert results.models["tensorrt.onnx"].float_layers == FloatLayers({}, 0.0)
    assert steps[:2] == [("engine of tensorrt.onnx", 0, ""), ("engine of tensorrt.onnx", 1, "built")]


def test_a_builder_that_does_not_start_costs_the_engine_alone(
    write_export: WriteExport, monkeypatch: pytest.MonkeyPatch
) -> None:
    def does_not_start(*arguments: Any) -> None:
        msg = "tensorrt does not start"
        raise ToolError(msg)

    monkeypatch.setattr(tensorrt_api, "choose", lambda: "tensorrt")
    monkeypatch.setattr(engine, "build", does_not_start)
    model = benchmark(write_export(), QUICK, quiet).models["tensorrt.onnx"]
    assert to_json(model.engine) == {"status": "not run: tensorrt does not start"}
    assert model.status == "measured"


def test_tensorrt_latency_is_never_taken_from_another_runtime(
    write_export: WriteExport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "CUDA_DEVICES", ("/dev/null",))
    latency = benchmark(write_export(), QUICK, quiet).models["tensorrt.onnx"].latency
    assert latency == NoLatency("not run: no engine was built from this file")


ROOT = Path(__file__).parents[2]
# Puts the fake device into the model's process, which starts with it.
SITE = """
import sys
from tests.runtime_eval.runners.fake_cuda import FakeCuda, FakeTensorRT
from crqat.runtime_eval.machine import host
from crqat.runtime_eval.runners import tensorrt
sys.modules["tensorrt"] = FakeTensorRT("tensorrt")
host.CUDA_DEVICES = ("/dev/null",)
tensorrt.Cuda = FakeCuda
"""


def write_plan(path: Path, precision: str, target: str) -> Path:
    preprocess = {"crqat.preprocessing": json.dumps({"mean": [0.5] * 3, "std": [0.5] * 3})}
    plan_file.save(
        path,
        PLAN,
        builder="tensorrt",
        version=FakeTensorRT.__version__,
        compute_capability="8.7",
        precision=precision,
        metadata={**preprocess, "crqat.target": target},
    )
    return path


def build_plan(model: Path, options: Any, macs: Any, path: Path | None) -> EngineReport:
    """Stands for TensorRT's builder, which needs a GPU."""
    target = model.stem
    if path is not None and target != "onnxruntime":
        write_plan(path, "int8" if target == "tensorrt" else "float32", target)
    found = engine.Found()
    engine.describe_plan(found, [], macs)
    return engine.report_of(model, options, "tensorrt", found)


def test_engines_are_measured_in_tensorrt_the_builds_in_turns(
    write_export: WriteExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), str(ROOT / "src"), str(ROOT)]))
    images = np.random.default_rng(0).integers(0, 256, (50, 3, 2, 2)).astype(np.uint8)
    labels = images.sum(axis=(2, 3), dtype=np.int64).argmax(axis=1)
    labels[:5] = (labels[:5] + 1) % 3  # which the fake engine gets wrong
    no_onnx = dict.fromkeys(("float.onnx", "onnxruntime.onnx", "tensorrt.onnx"), b"not a model")
    export = write_export({**no_onnx, "images.npy": images, "labels.npy": labels})
    monkeypatch.setattr(tensorrt_api, "choose", lambda: "tensorrt")
    monkeypatch.setattr(engine, "build", build_plan)
    turns: list[Path] = []
    latency = Worker.latency

    def spy(worker: Worker, warm_up_seconds: float, seconds: float) -> tuple[list[float], list[float]]:
        arguments: Any = worker._process.args
        turns.append(Path(arguments[3]))
        return latency(worker, warm_up_seconds, seconds)

    monkeypatch.setattr(Worker, "latency", spy)
    results = benchmark(export, QUICK, quiet)

    assert from_json(Results, strict_json.parse(text(results))) == results
    of_tensorrt = [path.name for path in turns if path.name.startswith("tensorrt")]
    assert of_tensorrt == ["tensorrt.0.plan", "tensorrt.1.plan", "tensorrt.2.plan"] * 2
    model = results.models["tensorrt.onnx"]
    assert [model.status, model.runtime, model.runtime_version, model.provider] == [
        "measured",
        "tensorrt",
        "10.3.0",
        "compute capability 8.7",
    ]
    assert model.accuracy.top1 == model.accuracy_batch_1.top1 == 0.9
    assert model.latency.compute_p50_ms == pytest.approx(3.0)
    assert model.latency.p50_ms < 3.0  # of the fake's real time
    assert [len(build.round_p50_ms) for build in model.builds] == [2, 2, 2]
    assert model.engine.status == "built"
    assert model.versus_float.latency_ratio > 0
    assert results.models["onnxruntime.onnx"].status.startswith("failed: onnxruntime.onnx in onnxruntime: ")


def test_a_plan_where_there_is_no_cuda_device_is_a_failure_with_that_reason(
    write_export: WriteExport, monkeypatch: pytest.MonkeyPatch
) -> None:
    if host.cuda_device():
        pytest.skip("there is a CUDA device")
    monkeypatch.setattr(tensorrt_api, "choose", lambda: "tensorrt")
    monkeypatch.setattr(engine, "build", build_plan)
    results = benchmark(write_export(), QUICK, quiet)
    assert results.models["tensorrt.onnx"].status == "failed: tensorrt.0.plan in tensorrt: no CUDA device"
    assert results.models["onnxruntime.onnx"].status == "measured"


def test_a_jetson_that_throttles_makes_every_latency_unstable(
    write_export: WriteExport, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = iter(range(1000))
    board = Jetson("NVIDIA Jetson Orin NX", power_mode="MAXN_SUPER")
    quiet_state: dict[str, Any] = {
        "free_clocks": [],
        "temperatures_c": {},
        "over_trip": [],
        "cooling": {},
        "power_mw": {},
    }
    monkeypatch.setattr(jetson, "describe", lambda root: board)
    monkeypatch.setattr(
        jetson,
        "state",
        lambda root: jetson.State(
            **quiet_state,
            clocks_locked=True,
            total_power_mw=5000.0,
            throttle_events={"oc3": next(events)},
        ),
    )
    results = benchmark(write_export(), QUICK, quiet)
    # Looked at before, after each of the six rounds, and at the end.
    assert results.device.jetson.run.throttle_events == {"oc3": 7}
    assert results.device.jetson.power_mode == "MAXN_SUPER"
    for file in ("float.onnx", "onnxruntime.onnx"):
        assert "throttled: oc3 rose by 7" in results.models[file].latency.unstable


def test_on_a_provider_of_tensorrts_the_other_file_is_timed() -> None:
    config = replace(QUICK, provider="TensorrtExecutionProvider")
    models = [_Model(ExportedModel(f"{t}.onnx", t), Path(), 1) for t in ("float", "onnxruntime", "tensorrt")]
    assert [_is_timed(model, config) for model in models] == [True, False, True]
    assert [_is_timed(model, QUICK) for model in models] == [True, True, False]
    assert _not_run(models[1]) == "not run: the file is for another execution provider"


def zombies() -> list[int]:
    """Children of this process that ended and were not waited for; other tests' helpers may live on."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, *_ = path.read_text().rsplit(")", 1)[1].split()
            if state == "Z" and int(parent) == os.getpid():
                found.append(int(path.parent.name))
    return found


def check_one_failure(results: Any, file: str, *words: str) -> None:
    """`file` failed for the reason that the words tell, the other models are measured, and no worker is left."""
    failed = results.models[file]
    assert failed.status.startswith(f"failed: {file} in onnxruntime: ")
    for word in words:
        assert word in failed.status
    assert "\n" not in failed.status
    assert (failed.accuracy, failed.latency, failed.versus_float) == (None, None, None)
    for other in set(results.models) - {file}:
        assert results.models[other].status == "measured"
        assert results.models[other].accuracy.top1 > 0.7
        assert worker_of(other) is None
    assert worker_of(file) is None
    assert zombies() == []


@pytest.mark.parametrize("task", ["latency", "accuracy of onnxruntime.onnx"])
def test_an_aborted_worker_is_that_models_result(write_export: WriteExport, digits: Digits, task: str) -> None:
    # So many images, one at a time, that the signal arrives while they are counted.
    many = {"images.npy": np.tile(digits.images, (20, 1, 1, 1)), "labels.npy": np.tile(digits.labels, 20)}
    config = replace(QUICK, accuracy_batch=1)
    results = benchmark(write_export(many), config, send_once(signal.SIGABRT, "onnxruntime.onnx", task))
    check_one_failure(results, "onnxruntime.onnx", "ended by SIGABRT")


def test_without_the_float_model_the_others_have_nothing_to_be_compared_with(write_export: WriteExport) -> None:
    results = benchmark(write_export(), QUICK, send_once(signal.SIGKILL, "float.onnx", "latency"))
    check_one_failure(results, "float.onnx", "ended by SIGKILL")
    assert results.models["onnxruntime.onnx"].latency.status == "measured"
    assert results.models["onnxruntime.onnx"].versus_float is None


def test_a_hung_worker_is_killed_at_the_time_limit(write_export: WriteExport) -> None:
    export = write_export()
    start = time.monotonic()
    config = replace(QUICK, time_limit_seconds=2)
    results = benchmark(export, config, send_once(signal.SIGSTOP, "onnxruntime.onnx", "latency"))
    check_one_failure(results, "onnxruntime.onnx", "no answer for 2.01 s", "hung")
    assert time.monotonic() - start >= 2


def test_a_file_that_does_not_load(write_export: WriteExport, digits: Digits) -> None:
    broken = onnx_bytes(digits.layers, "onnxruntime", 3)[:-100]
    results = benchmark(write_export({"onnxruntime.onnx": broken}), QUICK, quiet)
    check_one_failure(results, "onnxruntime.onnx", "ONNX Runtime does not load")


def test_a_file_without_preprocessing(write_export: WriteExport, digits: Digits) -> None:
    bare = onnx_bytes(digits.layers, "onnxruntime", 3, without(metadata("onnxruntime"), "crqat.preprocessing"))
    results = benchmark(write_export({"onnxruntime.onnx": bare}), QUICK, quiet)
    check_one_failure(results, "onnxruntime.onnx", "crqat.preprocessing", "export it again")


def test_logits_that_are_not_finite_are_told_with_their_image(write_export: WriteExport, digits: Digits) -> None:
    # Only the corner pixel of one image in the third batch overflows the first layer.
    images = digits.images.copy()
    images[:, :, 0, 0] = 0
    images[223, :, 0, 0] = 255
    (first, bias), last = digits.layers
    first = first.copy()
    first[0, :] = np.float32(3e38)
    results = benchmark(
        write_export({"images.npy": images, "tensorrt.onnx": onnx_bytes([(first, bias), last], "tensorrt", None)}),
        QUICK,
        quiet,
    )
    check_one_failure(results, "tensorrt.onnx", "logits of test image 223 are not finite")


def test_a_provider_that_is_not_there_is_not_replaced(write_export: WriteExport) -> None:
    results = benchmark(write_export(), replace(QUICK, provider="CUDAExecutionProvider"), quiet)
    for model in results.models.values():
        assert "this onnxruntime has no CUDAExecutionProvider" in model.status
    assert results.dataset.classes is None


@pytest.mark.parametrize("file", ["images.npy", "onnxruntime.onnx"])
def test_an_altered_file_is_refused_by_name(write_export: WriteExport, file: str) -> None:
    export = write_export()
    content = bytearray((export / file).read_bytes())
    content[len(content) // 2] ^= 1
    (export / file).write_bytes(content)
    with pytest.raises(UsageError, match=f"{file}: altered or damaged"):
        benchmark(export, QUICK, quiet)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: {"payload": {"models": None}}, "payload: damaged: models is not a list"),
        (
            lambda d: {"payload": {"models": [{"file": "float.onnx"}]}},
            r"models\[0\].target is missing",
        ),
        (
            lambda d: {"payload": {"labels": "../labels.npy"}},
            "names ../labels.npy as a model or data, but has no SHA-256 of it",
        ),
        (lambda d: {"payload": {"models": [{"file": "float.onnx", "target": "tensorrt"}]}}, "0 float models"),
        (lambda d: {"files": {"images.npy": d.images.astype(np.float32)}}, "images.npy: float32 .* expected uint8"),
        (lambda d: {"files": {"images.npy": d.images[:0]}}, r"images.npy: uint8 \[0, 1, 8, 8\]"),
        (lambda d: {"files": {"labels.npy": d.labels[:-1]}}, r"labels.npy: int64 \[796\], expected int64 \[797\]"),
        (lambda d: {"files": {"labels.npy": b"nonsense"}}, "labels.npy: not a .npy array"),
        (lambda d: {"files": {"labels.npy": d.labels + 1}}, "has 10 classes, but the test labels go from 1 to 10"),
    ],
)
def test_an_export_that_makes_no_sense_is_refused(
    write_export: WriteExport, digits: Digits, change: Callable[[Digits], dict[str, Any]], message: str
) -> None:
    export = write_export(**change(digits))
    with pytest.raises(UsageError, match=message):
        benchmark(export, QUICK, quiet)


def test_float16_is_not_measured_where_it_is_truncated(
    write_export: WriteExport, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [
        {"file": "float.onnx", "target": "float"},
        {"file": "tensorrt.onnx", "target": "tensorrt", "precision": "float16", "verification": VERIFICATION},
    ]
    export = write_export(payload={"models": models})
    monkeypatch.setattr("crqat.runtime_eval.runners.onnxruntime.float16_is_rounded", lambda: False)
    measured = benchmark(export, QUICK, quiet).models
    assert measured["float.onnx"].status == "measured"
    model = measured["tensorrt.onnx"]
    assert model.status.startswith("not run: onnxruntime 1.")
    assert (model.accuracy, model.latency, model.versus_float) == (None, None, None)
    assert to_json(model.verification) == VERIFICATION
    monkeypatch.undo()
    assert float16_is_rounded()  # the one that the tests run with
    assert benchmark(export, QUICK, quiet).models["tensorrt.onnx"].status == "measured"


def test_openvino_that_is_not_installed_is_not_run(write_export: WriteExport, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "openvino" else find(name, *rest)
    )
    results = benchmark(write_export(), replace(QUICK, require=("openvino",)), quiet)
    models = results.models
    assert [file for file, model in models.items() if model.status == "not run: openvino is not installed"] == [
        "float.onnx@openvino",
        "onnxruntime.onnx@openvino",
    ]
    assert "not run: openvino is not installed, and benchmark.require names openvino" in [
        verdict.message for verdict in judge(results, GateConfig())
    ]
