"""Compares quantized inputs of residual Adds in TensorRT: both inputs, the skip branch only, or none.

Each network is calibrated, written as tensorrt.onnx with float16 next to INT8, and built. The engine plan shows the
number of layers of each kind, not their speed. Accuracy is that of the file in ONNX Runtime, if trained weights are
given. Writes bench-out/residual.json.

    python -m bench.residual_add [--cifar10 data/cifar10 --weights resnet20-12fca82f.th]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx

from bench.vs_onnxruntime import METADATA, Case, calibrated, cases
from crqat.core.targets import Residual
from crqat.core.typed_json import to_json
from crqat.export.graph.macs import macs
from crqat.pipeline.console import show_table
from crqat.runtime_eval.config import BenchmarkConfig
from crqat.runtime_eval.measure.worker_client import Worker
from crqat.runtime_eval.trt.engine import EngineOptions, build

OUT = Path("bench-out/residual.json")
COLUMNS = ("model", "quantized", "layers", "matmul", "int8_by_macs", "pointwise", "reformat", "copy", "size_bytes",
           "top1", "n")  # fmt: skip


def measure(case: Case, residual: Residual) -> dict[str, Any]:
    """Build and evaluate a network in which the inputs of residual Adds in `residual` are quantized; return its row."""
    quantized = calibrated(case, ("tensorrt",), residual)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tensorrt.onnx"
        onnx.save(quantized.file("tensorrt", "float16", METADATA).model, path)
        report = build(path, EngineOptions(batch=(1, 1, 1)), macs(quantized.graph))
        if report.coverage is None or report.counts is None:
            msg = f"{case.name}, {residual}: {report.status}"
            raise SystemExit(msg)
        top1, n = None, None
        if case.test is not None:
            images_path, top = Path(folder) / "images.npy", Path(folder) / "top.npy"
            np.save(images_path, case.test[0])
            with Worker(path, images_path, BenchmarkConfig()) as worker:
                worker.accuracy(100, top, lambda done, total: None)
            top1, n = float((np.load(top)[:, 0] == case.test[1]).mean()), len(case.test[1])
    return {
        "model": case.name,
        "quantized": residual,
        "int8_by_macs": report.coverage.by_macs,
        **{kind: getattr(report.counts, kind) for kind in ("layers", "matmul", "pointwise", "reformat", "copy")},
        "size_bytes": report.size_bytes,
        "top1": top1,
        "n": n,
        "builder": to_json(report.builder),
    }


def main() -> None:
    """Measure all networks, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cifar10", type=Path, help="folder with cifar-10-batches-py")
    parser.add_argument("--weights", type=Path, help="ResNet-20's float weights")
    arguments = parser.parse_args()
    rows = []
    for case in cases(arguments.cifar10, arguments.weights):
        for residual in get_args(Residual):
            rows.append(measure(case, residual))
            print(f"{case.name}, {residual}: built", file=sys.stderr)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps({"rows": rows}, indent=1))
    cells = [["-" if row[key] is None else f"{row[key]:.4g}" if isinstance(row[key], float) else str(row[key])
              for key in COLUMNS] for row in rows]  # fmt: skip
    show_table("residual Add in TensorRT for RTX", COLUMNS, cells)
    print(f"written: {OUT}")


if __name__ == "__main__":
    main()
