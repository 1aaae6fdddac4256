"""Compares speed and correctness of float files, crqat's files, and files of ONNX Runtime's static quantization.

Writes bench-out/infer.json with the rows: model, float_ms, int8_ms, peer_ms, time_ratio_to_peer, interval, wrong_codes,
peer_wrong_codes, accuracy, peer_accuracy. A code is wrong if the integer simulator gives another one. U8S8 kernels are
exact on CPUs with VNNI and saturate without: if qemu-x86_64 is installed, codes are also counted on an emulated CPU
without VNNI.

    python -m bench.vs_onnxruntime [--rounds 10] [--cifar10 data/cifar10 --weights resnet20-12fca82f.th]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import nn

from bench import onnxruntime_process
from bench.wrong_codes import shown_codes
from crqat.core.compare_codes import compare_codes
from crqat.core.preprocessing import Preprocessing
from crqat.core.targets import Residual
from crqat.core.typed_json import to_json
from crqat.export.qdq.write import float_model
from crqat.export.simulator.run import simulate
from crqat.export.simulator.values import NotSimulated
from crqat.export.to_onnx import Quantized, quantize_network
from crqat.pipeline.console import show_table
from crqat.runtime_eval.config import BenchmarkConfig
from crqat.runtime_eval.machine import host
from crqat.runtime_eval.measure.latency import compare
from crqat.runtime_eval.measure.worker_client import Worker
from crqat.train.data import sources
from crqat.train.models import build as models

IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
METADATA = {"crqat.preprocessing": json.dumps({"mean": IMAGENET.mean, "std": IMAGENET.std})}
TARGETS = ("onnxruntime",)
OUT = Path("bench-out/infer.json")


@dataclass
class Case:
    """A float network with its images for calibration and measurement.

    Attributes:
        name: Name in the table.
        network: Float network in eval mode.
        images: Calibration images, uint8 [N, C, H, W]; the first ones are also used for timing and codes.
        weights: Source of its weights.
        test: Test images and labels; None for random weights, whose accuracy is meaningless.
    """

    name: str
    network: nn.Module
    images: npt.NDArray[np.uint8]
    weights: str
    test: tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]] | None = None


def cases(cifar10: Path | None, weights: Path | None) -> Iterator[Case]:
    """Yield CIFAR ResNet-20 if trained weights are given, then three ImageNet networks at 224 px."""
    dataset = sources.load("cifar10", str(cifar10), False) if cifar10 else sources.load("digits", None, False)
    small = dataset.train_images[:64]
    large = nn.functional.interpolate(small[:16].float().expand(-1, 3, -1, -1), 224).byte().numpy()
    if cifar10 and weights:
        network = models.build("cifar/resnet20", 10, 3)
        models.load_weights(network, weights)
        test = dataset.test_images[:].numpy(), dataset.test_labels.numpy()
        yield Case("cifar/resnet20", network.eval(), dataset.train_images[:512].numpy(), weights.name, test)
    for name in ("resnet18", "resnet50", "mobilenet_v2"):
        torch.manual_seed(0)
        network = models.build(f"torchvision/{name}", 1000, 3)
        # Random weights: timing and codes do not depend on them, provided that BN statistics fit the activations.
        with torch.no_grad():
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 1.0
            network.train()(torch.from_numpy(IMAGENET(large)))
        yield Case(f"torchvision/{name}", network.eval(), large, "random, BN statistics of 16 images")


def calibrated(case: Case, targets: tuple[str, ...], residual: Residual | None = None) -> Quantized:
    """Return the network of a case, quantized by calibration on its images."""
    batches = torch.split(torch.from_numpy(IMAGENET(case.images)), 64)
    return quantize_network(case.network, batches, targets, residual=residual)


def export(case: Case, folder: Path) -> dict[str, Path]:
    """Write float.onnx, ours.onnx (by crqat) and peer.onnx (by `quantize_static`); return their paths by stem."""
    quantized, images = calibrated(case, TARGETS), IMAGENET(case.images)
    paths = {name: folder / f"{name}.onnx" for name in ("float", "ours", "peer")}
    onnx.save(float_model(quantized.graph, METADATA), paths["float"])
    onnx.save(quantized.file("onnxruntime", metadata=METADATA).model, paths["ours"])

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter([{"input": images[start : start + 64]} for start in range(0, len(images), 64)])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    quantize_static(
        str(paths["float"]), str(paths["peer"]), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    peer = onnx.load(paths["peer"])
    helper.set_model_props(peer, METADATA)
    onnx.save(peer, paths["peer"])
    return paths


def wrong_codes(path: Path, images: npt.NDArray[np.float32], folder: Path, cpu: str | None) -> int | None:
    """Count the activation codes that ONNX Runtime and the simulator compute differently; None if not comparable.

    Args:
        path: A QDQ file.
        images: Normalized images.
        folder: For scratch files.
        cpu: CPU model of qemu; None for this machine's CPU.
    """
    if onnxruntime_process.missing(cpu) is not None:
        return None
    model = onnx.load(path)
    try:
        simulation = simulate(model, images)
    except NotSimulated as reason:
        print(f"{path.name}: {reason}", file=sys.stderr)
        return None
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    zeros = {n.output[0]: constants[n.input[2]] for n in quantizers if n.output[0] in simulation.codes}
    ran = shown_codes(path, zeros, images, folder, cpu)
    expected = [simulation.codes[name] + int(zero) for name, zero in zeros.items()]
    return compare_codes(dict(zip(zeros, zip(expected, ran, strict=True), strict=True))).wrong


def interleaved(
    paths: Mapping[str, Path], images: Path, config: BenchmarkConfig, rounds: int, seconds: float = 1.0
) -> dict[str, list[list[float]]]:
    """Return the seconds of every inference of each file, in one list for each round.

    In a round, each file runs in a new process; the order of the files rotates.

    Args:
        paths: ONNX files by name.
        images: .npy file, uint8; the first image is used.
        config: Threads and limits.
        rounds: Number of rounds.
        seconds: Measuring time of each file in each round, after a third of it for warm-up.
    """
    times: dict[str, list[list[float]]] = {name: [] for name in paths}
    names = list(paths)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            with Worker(paths[name], images, config) as worker:
                times[name].append(worker.latency(0.3 * seconds, seconds)[0])
    return times


def predicted(path: Path, images: Path, config: BenchmarkConfig) -> npt.NDArray[np.int64]:
    """Return the most probable classes of each image in an .npy file, best first, int64 [N, at most 5]."""
    with tempfile.TemporaryDirectory() as folder, Worker(path, images, config) as worker:
        top = Path(folder) / "top.npy"
        worker.accuracy(100, top, lambda done, total: None)
        result: npt.NDArray[np.int64] = np.load(top)
        return result


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Return the row of one network: times, wrong codes and, for trained weights, accuracies."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        paths = export(case, folder)
        images = folder / "images.npy"
        np.save(images, case.images[:1])
        config = BenchmarkConfig(threads=1)
        times = interleaved(paths, images, config, rounds)
        ratio = compare(times["peer"], times["ours"])
        few = IMAGENET(case.images[:2])
        row: dict[str, Any] = {
            "model": case.name,
            "weights": case.weights,
            **{f"{key}_ms": 1e3 * float(np.median([np.median(r) for r in times[name]]))
               for key, name in (("float", "float"), ("int8", "ours"), ("peer", "peer"))},
            "time_ratio_to_float": compare(times["float"], times["ours"]).latency_ratio,
            "time_ratio_to_peer": ratio.latency_ratio,
            "interval": ratio.latency_ratio_interval,
            "coverage": ratio.latency_ratio_coverage,
            "rounds": rounds,
            "wrong_codes": wrong_codes(paths["ours"], few, folder, None),
            "peer_wrong_codes": wrong_codes(paths["peer"], few, folder, None),
            "wrong_codes_without_vnni": wrong_codes(paths["ours"], few, folder, onnxruntime_process.WITHOUT_VNNI),
            "peer_wrong_codes_without_vnni": wrong_codes(paths["peer"], few, folder, onnxruntime_process.WITHOUT_VNNI),
            "accuracy": None,
            "peer_accuracy": None,
        }  # fmt: skip
        if case.test is not None:
            np.save(images, case.test[0])
            for key, name in (("float_accuracy", "float"), ("accuracy", "ours"), ("peer_accuracy", "peer")):
                row[key] = float((predicted(paths[name], images, config)[:, 0] == case.test[1]).mean())
        return row


def main() -> None:
    """Measure all cases, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--cifar10", type=Path, help="folder with cifar-10-batches-py")
    parser.add_argument("--weights", type=Path, help="ResNet-20's float weights")
    arguments = parser.parse_args()
    rows = []
    for case in cases(arguments.cifar10, arguments.weights):
        rows.append(measure(case, arguments.rounds))
        print(f"{case.name}: {rows[-1]['time_ratio_to_peer']:.3f} of the peer's time", file=sys.stderr)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps({"device": to_json(host.describe()), "rows": rows}, indent=1))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    show_table("infer", columns, [[_text(row.get(key)) for key in columns] for row in rows])
    print(f"written: {OUT}")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return ", ".join(f"{v:.3f}" for v in value) if isinstance(value, list) else "-" if value is None else str(value)


if __name__ == "__main__":
    main()
