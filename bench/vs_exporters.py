"""Compares quantized ONNX files of several exporters in TensorRT and ONNX Runtime.

The same float networks are exported by NNCF, Model-Optimizer, ONNX Runtime (`bench.exporter_peers`) and crqat,
calibrated on the same images and not trained. Each file is then built by TensorRT for RTX, which needs no GPU, and run
by ONNX Runtime on this CPU. Writes bench-out/export.json with one row for each network and file.

    python -m bench.vs_exporters [--rounds 9] [--models resnet20,resnet18] [--cifar10 DIR --weights FILE]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from bench import exporter_peers
from bench.onnxruntime_process import WITHOUT_VNNI
from bench.vs_onnxruntime import IMAGENET, METADATA, Case, calibrated, cases, interleaved, predicted
from bench.wrong_codes import differing_codes, with_constants_folded
from crqat.core.errors import CrqatError, ToolError
from crqat.core.typed_json import to_json
from crqat.export.graph.macs import file_macs
from crqat.export.qdq.write import float_model
from crqat.pipeline.console import show_table
from crqat.runtime_eval.config import BenchmarkConfig
from crqat.runtime_eval.machine import host
from crqat.runtime_eval.measure import accuracy, latency
from crqat.runtime_eval.measure.worker_client import Worker
from crqat.runtime_eval.trt.engine import EngineOptions, build

OUT = Path("bench-out/export.json")
FLOAT = "float"
# Files of one network, calibrated once for both targets, in the precision that `crqat export` writes.
OURS = {"ours, onnxruntime.onnx": ("onnxruntime", "float32"), "ours, tensorrt.onnx": ("tensorrt", "float16")}
PACKAGES = (
    "torch", "torchvision", "onnx", "onnxruntime", "nncf", "torchao", "nvidia-modelopt", "onnx-graphsurgeon",
    "tensorrt-rtx-cu13",
)  # fmt: skip
CODE_IMAGES = 2
EMULATED_IMAGES = 1  # an emulated CPU is about fifteen times slower
SECONDS = 0.5  # measuring time of each file in each round
SHOWN = 150  # characters of an error in the table; the JSON has all of them
CONFIG = BenchmarkConfig(threads=1)
COLUMNS = ("way", "bytes", "TensorRT", "INT8 by MACs", "warnings", "ONNX Runtime", "ms", "x float", "wrong codes",
           "without VNNI", "top-1 %", "drop, points", "top-1 % as TensorRT reads it")  # fmt: skip


def measure(case: Case, rounds: int, seconds: float = SECONDS) -> list[dict[str, Any]]:
    """Return the results of one network: one row for each file, first that of the float file.

    Args:
        case: The network and its images.
        rounds: Number of latency rounds.
        seconds: Measuring time of each file in each round.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = {name: _row(case, name) for name in (FLOAT, *exporter_peers.WAYS, *OURS)}
        evaluate(case, _write_files(case, folder, rows), rows, folder, rounds, seconds)
        return list(rows.values())


def evaluate(
    case: Case, paths: Mapping[str, Path], rows: dict[str, dict[str, Any]], folder: Path, rounds: int, seconds: float
) -> None:
    """Measure the exported files and add the results to their rows.

    Args:
        case: The network and its images.
        paths: Exported files, by the names of their rows.
        rows: Rows by name, to which the results are added.
        folder: Folder for scratch files.
        rounds: Number of latency rounds.
        seconds: Measuring time of each file in each round.
    """
    for name, path in paths.items():
        rows[name]["size_bytes"] = path.stat().st_size
        if name != FLOAT:
            rows[name]["tensorrt"] = tensorrt(path)
        print(f"{case.name}, {name}: built", file=sys.stderr)
    images = folder / "images.npy"
    np.save(images, case.images[:1])
    for name, path in paths.items():
        rows[name]["onnxruntime"] = _loads(path, images)
    loaded = {name: path for name, path in paths.items() if rows[name]["onnxruntime"] == "loads"}
    times = interleaved(loaded, images, CONFIG, rounds, seconds)
    for name in loaded:
        compared = latency.compare(times[FLOAT], times[name])
        rows[name]["latency"] = {**to_json(compared), "ms": 1e3 * float(np.median([np.median(r) for r in times[name]])),
                                 "rounds": rounds}  # fmt: skip
    if case.test is not None:
        _accuracies(case, loaded, rows, folder)
    few = IMAGENET(case.images[:CODE_IMAGES])
    for name in loaded:
        if name != FLOAT:
            rows[name]["codes"] = differing_codes(loaded[name], few, folder)
            rows[name]["codes_without_vnni"] = differing_codes(
                loaded[name], few[:EMULATED_IMAGES], folder, WITHOUT_VNNI
            )
        print(f"{case.name}, {name}: codes counted", file=sys.stderr)


def _row(case: Case, name: str) -> dict[str, Any]:
    keys = ("size_bytes", "tensorrt", "onnxruntime", "latency", "codes", "codes_without_vnni", "accuracy",
            "versus_float", "accuracy_as_tensorrt_reads_it")  # fmt: skip
    return {"model": case.name, "weights": case.weights, "way": name, "status": "written", **dict.fromkeys(keys)}


def _write_files(case: Case, folder: Path, rows: dict[str, dict[str, Any]]) -> dict[str, Path]:
    """Write each exporter's file; the row of one that failed has the reason in its status."""
    paths = {name: folder / f"{number}.onnx" for number, name in enumerate(rows)}
    quantized = calibrated(case, tuple(target for target, _ in OURS.values()))
    onnx.save(float_model(quantized.graph, METADATA), paths[FLOAT])
    for name, (target, precision) in OURS.items():
        onnx.save(quantized.file(target, precision, METADATA).model, paths[name])
    source = exporter_peers.Source(case.network, IMAGENET(case.images), paths[FLOAT])
    for name in exporter_peers.WAYS:
        reason = exporter_peers.write(name, source, paths[name], METADATA)
        if reason is not None:
            rows[name]["status"] = reason
            del paths[name]
        print(f"{case.name}, {name}: {reason or 'written'}", file=sys.stderr)
    return paths


def tensorrt(path: Path) -> dict[str, Any]:
    """Build the engine of a file with TensorRT for RTX in a separate process, for batch 1 and its default GPUs.

    Returns:
        {"status": "built" | "failed: ..." | "not run: ...", "int8_by_macs": share of 1, "uncovered": nodes, "remarks",
        "engine_bytes"}.
    """
    try:
        report = build(path, EngineOptions("tensorrt_rtx", batch=(1, 1, 1)), file_macs(onnx.load(path)))
    except ToolError as error:
        return {"status": f"not run: {error}", "int8_by_macs": None, "remarks": []}
    covered = report.coverage
    return {
        "status": report.status,
        "int8_by_macs": None if covered is None else covered.by_macs,
        "uncovered": [] if covered is None else [entry.node for entry in covered.uncovered or []],
        "remarks": to_json(report.messages),
        "engine_bytes": report.size_bytes,
    }


def _loads(path: Path, images: Path) -> str:
    try:
        with Worker(path, images, CONFIG):
            return "loads"
    except CrqatError as error:
        return f"failed: {error}"


def _accuracies(case: Case, paths: Mapping[str, Path], rows: dict[str, dict[str, Any]], folder: Path) -> None:
    """Measure accuracy on the test images, compared with the float file image by image."""
    assert case.test is not None  # noqa: S101 (the caller asked; this tells mypy)
    labels = case.test[1]
    images = folder / "test.npy"
    np.save(images, case.test[0])
    of_float = predicted(paths[FLOAT], images, CONFIG)
    for name, path in paths.items():
        top = of_float if name == FLOAT else predicted(path, images, CONFIG)
        rows[name]["accuracy"] = to_json(accuracy.summarize(top, labels))
        if name == FLOAT:
            continue
        size_ratio = path.stat().st_size / paths[FLOAT].stat().st_size
        rows[name]["versus_float"] = to_json(accuracy.compare(of_float, top, labels, size_ratio))
        built = rows[name]["tensorrt"]
        if built["status"] == "built" and any(r["kind"] == "uint8_read_as_int8" for r in built["remarks"]):
            read = folder / "read.onnx"
            onnx.save(uint8_as_int8(with_constants_folded(onnx.load(path))), read)
            clipped = predicted(read, images, CONFIG)
            rows[name]["accuracy_as_tensorrt_reads_it"] = to_json(accuracy.summarize(clipped, labels))
        print(f"{case.name}, {name}: {100 * rows[name]['accuracy']['top1']:.2f} %", file=sys.stderr)


def uint8_as_int8(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a file in which UINT8 codes with zero point 0 are INT8 codes with the same scale.

    TensorRT reports that it reads such UINT8 codes in this way.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    quantization = [n for n in changed.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    points = {name for node in quantization for name in node.input[2:]}
    for tensor in changed.graph.initializer:
        if tensor.name in points and tensor.data_type == TensorProto.UINT8:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.int8), tensor.name))
    return changed


def versions() -> dict[str, str | None]:
    """Return the versions of the compared packages by name; None for one that is not installed."""
    return {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of a table row, as text; the columns are those in `COLUMNS`."""
    if row["status"] != "written":
        return [row["way"], row["status"], *[""] * (len(COLUMNS) - 2)]
    built, time = row["tensorrt"] or {}, row["latency"]
    status = str(built.get("status", "-"))
    # If a file does not build, its status is enough.
    told = built.get("remarks", []) if status == "built" else []
    warned = [f"{remark['kind']} x{remark['count']}" for remark in told if remark["severity"] != "harmless"]
    share = built.get("int8_by_macs")
    return [
        row["way"],
        f"{row['size_bytes']:,}",
        status if len(status) <= SHOWN else f"{status[:SHOWN]}...",
        "-" if share is None else f"{100 * share:.1f} %",
        ", ".join(warned),
        row["onnxruntime"],
        f"{time['ms']:.3f}" if time else "-",
        _interval(time["latency_ratio"], time["latency_ratio_interval"], 3) if time else "-",
        _counted(row["codes"]),
        _counted(row["codes_without_vnni"]),
        f"{100 * row['accuracy']['top1']:.2f}" if row["accuracy"] else "-",
        _interval(row["versus_float"]["drop_points"], row["versus_float"]["drop_interval_points"], 2)
        if row["versus_float"] else "-",
        f"{100 * row['accuracy_as_tensorrt_reads_it']['top1']:.2f}" if row["accuracy_as_tensorrt_reads_it"] else "-",
    ]  # fmt: skip


def _interval(value: float, bounds: list[float], digits: int) -> str:
    return f"{value:.{digits}f} [{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"


def _counted(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "-"
    return f"{entry['wrong']:,} of {entry['codes']:,}" if entry["status"] == "counted" else str(entry["status"])


def main() -> None:
    """Measure all networks, print a table for each and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", help="parts of their names, separated by commas; default: all")
    parser.add_argument("--cifar10", type=Path, help="folder with cifar-10-batches-py")
    parser.add_argument("--weights", type=Path, help="ResNet-20's float weights")
    arguments = parser.parse_args()
    wanted = (arguments.models or "").split(",")
    rows: list[dict[str, Any]] = []
    OUT.parent.mkdir(exist_ok=True)
    for case in cases(arguments.cifar10, arguments.weights):
        if not any(part in case.name for part in wanted):
            continue
        load = host.load_average()
        of_case = measure(case, arguments.rounds)
        rows += [{**row, "load_average_before": load} for row in of_case]
        OUT.write_text(json.dumps({"device": to_json(host.describe()), "versions": versions(), "rows": rows}, indent=1))
        show_table(f"{case.name}, weights: {case.weights}", COLUMNS, [cells(row) for row in of_case])
    print(f"written: {OUT}")


if __name__ == "__main__":
    main()
