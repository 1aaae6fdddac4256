"""Measures the time from a float network and its images to INT8 files, for crqat by step and for other exporters.

Each exporter starts from the same random weights, whose BN statistics fit the images; exporters that start from ONNX
share one float file. Every run is a separate process, and rounds are interleaved. A step's time starts when torch, ONNX
and the network are loaded; an exporter's own imports are counted. The row "crqat quantize" is the whole command up to
the exported files, from image files; it also predicts ten test images with the float network, because they have no
labels. Writes bench-out/ptq.json with one row for each network and exporter: median wall seconds, CPU seconds of all
threads and peak memory, and every round's steps.

    python -m bench.calibration_time [--rounds 3] [--models resnet50,mobilenet_v2,vgg11_bn] [--images 100]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from bench import exporter_peers
from crqat.core.progress import quiet
from crqat.core.typed_json import to_json
from crqat.runtime_eval.measure.worker import peak_memory
from crqat.train.models import build as models

OUT = Path("bench-out/ptq.json")
OURS, WHOLE = "ours", "crqat quantize"
NNCF = "NNCF, PERFORMANCE"
PEERS = ("ONNX Runtime, U8S8", NNCF, "Model-Optimizer, fp32")
FROM_TORCH = (OURS, NNCF)
NETWORKS = "resnet50,mobilenet_v2,vgg11_bn"
TARGETS = ("onnxruntime", "tensorrt")
# Time limit of one exporter in one round.
TIME_LIMIT_SECONDS = 900.0
BATCH = 10
BN_IMAGES = 32
VERIFIED_IMAGES = 2
# Test images of the whole command; the float network labels them.
TEST_IMAGES = 10
# Excluded from the compared seconds, because no other exporter verifies.
VERIFICATION = "verification"
COLUMNS = ("network", "way", "wall s", "CPU s", "x fastest peer, wall", "x fastest peer, CPU", "peak GB",
           "steps, wall s (CPU s)")  # fmt: skip
Steps = dict[str, dict[str, float | None]]


class Stopwatch:
    """Wall and CPU seconds of each step, and the process's peak memory at its end.

    Attributes:
        steps: Measurements of each step by name, in order: "wall_s", "cpu_s" (all threads), "peak_bytes".
    """

    def __init__(self) -> None:
        self.steps: Steps = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure a step, which runs within the context."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        seconds = time.perf_counter() - wall, time.process_time() - cpu
        self.steps[name] = {"wall_s": seconds[0], "cpu_s": seconds[1], "peak_bytes": peak_memory()}

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Measure a part of another step, which may run several times; `without` subtracts it from that step."""
        before = self.steps.get(name, {"wall_s": 0.0, "cpu_s": 0.0})
        with self.step(name):
            yield
        for kind in ("wall_s", "cpu_s"):
            self.steps[name][kind] = (self.steps[name][kind] or 0.0) + (before[kind] or 0.0)

    def without(self, step: str, part: str) -> None:
        """Subtract the seconds of a part from those of the step in which it ran."""
        for kind in ("wall_s", "cpu_s"):
            self.steps[step][kind] = (self.steps[step][kind] or 0.0) - (self.steps[part][kind] or 0.0)


def prepare(model: str, images: int, size: int, folder: Path) -> None:
    """Write the inputs of all exporters: weights.safetensors, images.npy and float.onnx."""
    from bench.vs_onnxruntime import IMAGENET, METADATA
    from crqat.export.qdq.write import float_model
    from crqat.export.to_onnx import Quantized
    from crqat.train.config import QuantizationConfig
    from crqat.train.data import sources
    from crqat.train.quantized_model import quantize_model

    digits = sources.load("digits", None, False).train_images[:images]
    pixels = nn.functional.interpolate(digits.float().expand(-1, 3, -1, -1), size, mode="bilinear").byte()
    values = torch.from_numpy(IMAGENET(pixels.numpy()))
    torch.manual_seed(0)
    network = models.build(model, 1000, 3)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        network.train()(values[:BN_IMAGES])
    network.eval()
    safetensors.torch.save_file(network.state_dict(), folder / "weights.safetensors")
    np.save(folder / "images.npy", values.numpy())
    for part, count in (("calibration", len(pixels)), ("test", TEST_IMAGES)):
        (folder / part).mkdir()
        for place, image in enumerate(pixels[:count]):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / part / f"{place:03d}.png")
    quantized = quantize_model(network, values[:2], QuantizationConfig(), TARGETS)
    onnx.save(float_model(Quantized(quantized, {}, values[:2].numpy()).graph, METADATA), folder / "float.onnx")
    if exporter_peers.not_installed(NNCF) is None:
        from nncf.torch.quantization.extensions import QuantizedFunctionsCPULoader

        QuantizedFunctionsCPULoader.load()  # compiled once on a machine, so not counted


def run(model: str, way: str, folder: Path) -> Steps:
    """Run an exporter in this process, and return the time and memory of its steps.

    Args:
        model: Name of the network, as for `prepare`.
        way: `OURS`, `WHOLE` or one of `PEERS`.
        folder: Folder that `prepare` filled; the exporter's files are written here.
    """
    if way == WHOLE:
        return _whole_command(model, folder)
    network = nn.Module()
    if way in FROM_TORCH:
        network = models.build(model, 1000, 3)
        network.load_state_dict(safetensors.torch.load_file(folder / "weights.safetensors"))
    watch, images = Stopwatch(), np.load(folder / "images.npy")
    if way == OURS:
        _ours(network.eval(), torch.from_numpy(images), folder, watch)
        return watch.steps
    source = exporter_peers.Source(network.eval(), images, folder / "float.onnx", BATCH)
    write = partial(exporter_peers.nncf_way, preset="performance", extension=True)
    with watch.step("all"):
        (write if way == NNCF else exporter_peers.WAYS[way].write)(source, folder / f"{way}.onnx")
    return watch.steps


def _ours(network: nn.Module, images: torch.Tensor, folder: Path, watch: Stopwatch) -> None:
    """Time the steps of `quantize_network`, and the writing of both targets' files."""
    with watch.step("layout"):
        from crqat.train.config import QuantizationConfig
        from crqat.train.quantized_model import quantize_model

        config = QuantizationConfig()
        model = quantize_model(network, images[:2], config, TARGETS)
    with watch.step("calibration"):
        model.calibrate(torch.split(images, BATCH), config.calibration)
        model.finalize()
    with watch.step("export"):
        from crqat.export.to_onnx import Quantized

        quantized = Quantized.of(model.eval(), images[:VERIFIED_IMAGES])
        files = quantized.files()
        for target, file in files.items():
            onnx.save(file.model, folder / f"ours.{target}.onnx")
    with watch.step(VERIFICATION):
        from crqat.export.verification.checks import verify

        found = verify(model, quantized.grids, files, quantized.images)
    wrong = {target: verification.status for target, verification in found.items() if verification.status != "passed"}
    if wrong:
        print(f"not verified: {wrong}", file=sys.stderr)


def _whole_command(model: str, folder: Path) -> Steps:
    """Time the stages of `crqat quantize` up to the exported files, with the verification as a step of its own."""
    watch = Stopwatch()
    with watch.step("recipe"):
        from crqat.pipeline.commands import quantize, quantize_request
        from crqat.pipeline.recipe import recipe
        from crqat.pipeline.stages import run as stages

        with Image.open(folder / "calibration" / "000.png") as first:
            side = first.width
        given = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "size": side, "crop": side}
        weights, runs = str(folder / "weights.safetensors"), Path(tempfile.mkdtemp(dir=folder))
        request = quantize_request.Request(
            model, folder / "calibration", folder / "test", weights, False, 1000, (8, 8), False, None, 0, given,
            runs / "quantized",
        )  # fmt: skip
        config = recipe.load(quantize.write_recipe(request, quiet), ())
    with watch.step("train"):  # reads the images and calibrates
        stages.train(config, runs, False, quiet)
    from crqat.export import write_models

    def apart(function: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*arguments: Any) -> Any:
            with watch.within(VERIFICATION):
                return function(*arguments)

        return measured

    for name in ("verify", "fusion", "expected_codes"):
        setattr(write_models, name, apart(getattr(write_models, name)))
    with watch.step("export"):
        stages.export(config, runs, False, quiet)
    watch.without("export", VERIFICATION)
    return watch.steps


def measure(
    model: str, rounds: int, images: int, size: int, ways: Sequence[str] = (OURS, WHOLE, *PEERS)
) -> list[dict[str, Any]]:
    """Run all exporters on one network in turns, and return one row for each.

    Args:
        model: Name of the network, as in a recipe's `model.name`.
        rounds: Number of runs of each exporter; the order rotates.
        images: Number of calibration images.
        size: Side of the images in pixels.
        ways: Exporters to run: `OURS`, `WHOLE` and any of `PEERS`.
    """
    rows: dict[str, dict[str, Any]] = {}
    for way in ways:
        status = None if way in (OURS, WHOLE) else exporter_peers.not_installed(way)
        rows[way] = {"model": model, "way": way, "status": status or "written", "rounds": []}
    with tempfile.TemporaryDirectory() as scratch:
        _process("--prepare", model, scratch, str(images), str(size))
        for turn in range(rounds):
            first = turn % len(ways)
            for way in [*ways[first:], *ways[:first]]:
                row = rows[way]
                if row["status"] != "written":
                    continue
                try:
                    row["rounds"].append(json.loads(_process("--run", model, way, scratch)))
                except (subprocess.SubprocessError, ValueError) as error:
                    row["status"] = f"failed: {' '.join(str(error).split())[:300]}"
                    continue
                steps = row["rounds"][-1]
                print(f"{model}, {way}: {_seconds(steps, 'wall_s'):.1f} s", file=sys.stderr)
    return summarized(list(rows.values()))


def _process(*arguments: str) -> str:
    """Run a process of this file and return the last line of its standard output."""
    command = [sys.executable, "-m", "bench.calibration_time", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=TIME_LIMIT_SECONDS)
    return ["", *done.stdout.splitlines()][-1]


def _seconds(steps: Steps, kind: str) -> float:
    """Return the seconds of all steps that other exporters also have."""
    return float(sum(step[kind] or 0.0 for name, step in steps.items() if name != VERIFICATION))


def summarized(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each exporter's row the medians over rounds, and the ratios of its times to those of the fastest peer.

    The fastest peer is the fastest exporter other than crqat, chosen separately for wall and CPU time. Seconds and peak
    memory exclude verification.
    """
    for row in rows:
        for kind in ("wall_s", "cpu_s"):
            row[kind] = median([_seconds(steps, kind) for steps in row["rounds"]]) if row["rounds"] else None
        peaks: list[float] = [
            max(s["peak_bytes"] or 0 for n, s in steps.items() if n != VERIFICATION) for steps in row["rounds"]
        ]
        row["peak_bytes"] = median(peaks) if peaks and all(peaks) else None
        names = row["rounds"][0] if row["rounds"] else ()
        row["steps"] = {
            name: {kind: median([steps[name][kind] for steps in row["rounds"]]) for kind in ("wall_s", "cpu_s")}
            for name in names
        }
    for kind in ("wall_s", "cpu_s"):
        peers = (row[kind] for row in rows if row["way"] not in (OURS, WHOLE) and row[kind] is not None)
        fastest = min(peers, default=None)
        for row in rows:
            known = fastest and row[kind] is not None
            row[f"{kind}_to_fastest_peer"] = row[kind] / fastest if known else None
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of a table row, as text; the columns are those in `COLUMNS`."""
    if row["status"] != "written":
        return [row["model"], row["way"], row["status"], *[""] * (len(COLUMNS) - 3)]
    values = [row["wall_s"], row["cpu_s"], row["wall_s_to_fastest_peer"], row["cpu_s_to_fastest_peer"]]
    digits = (1, 1, 2, 2)
    numbers = ["-" if v is None else f"{v:.{d}f}" for v, d in zip(values, digits, strict=True)]
    peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f}"
    steps = ", ".join(f"{name} {s['wall_s']:.1f} ({s['cpu_s']:.1f})" for name, s in row["steps"].items())
    return [row["model"], row["way"], *numbers, peak, steps]


def main() -> None:
    """Measure all networks, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", default=NETWORKS, help="torchvision's names, separated by commas")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--size", type=int, default=224)
    # Options for the processes that this one starts.
    parser.add_argument("--prepare", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        model, folder, images, size = arguments.prepare
        prepare(model, int(images), int(size), Path(folder))
        return
    if arguments.run:
        model, way, folder = arguments.run
        print(json.dumps(run(model, way, Path(folder))))
        return
    from bench.vs_exporters import versions
    from crqat.pipeline.console import show_table
    from crqat.runtime_eval.machine import host

    rows: list[dict[str, Any]] = []
    for name in arguments.models.split(","):
        rows += measure(f"torchvision/{name}", arguments.rounds, arguments.images, arguments.size)
    asked = {"images": arguments.images, "size": arguments.size, "batch": BATCH, "rounds": arguments.rounds}
    described = {
        "device": to_json(host.describe()),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        **asked,
    }
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps({**described, "rows": rows}, indent=1))
    title = f"{arguments.images} images of {arguments.size} px, {torch.get_num_threads()} threads"
    show_table(f"{title}, {arguments.rounds} rounds", COLUMNS, [cells(row) for row in rows])
    print(f"written: {OUT}")


if __name__ == "__main__":
    main()
