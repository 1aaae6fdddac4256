"""Runs one network through all stages in its own process; its arguments are NAME --report JSON.

The network is quantized, trained for one step, exported for both runtimes, verified in integer codes and built as an
engine. Its weights are untrained, so accuracy is not measured: the result shows which operations are quantized, which
of them a runtime computes in integers, and whether the integer codes are equal.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional

from crqat.core import failures
from crqat.core import targets as runtimes
from crqat.core.errors import CrqatError, InternalError, ToolError, UsageError
from crqat.core.progress import quiet
from crqat.core.results.verification import Fusion
from crqat.core.typed_json import to_json
from crqat.export.graph.macs import macs
from crqat.export.qdq.lint import left_in_float, lint
from crqat.export.qdq.write import QDQModel
from crqat.export.to_onnx import Quantized
from crqat.export.verification.checks import verify
from crqat.export.verification.fusion import fusion
from crqat.pipeline.commands.model_survey import Images
from crqat.runtime_eval.trt import engine
from crqat.runtime_eval.trt import versions as tensorrt_api
from crqat.train.config import DataConfig, OptimizerConfig, QuantizationConfig
from crqat.train.data import sources
from crqat.train.models import build as models
from crqat.train.placement.quantizer_spec import QuantizerSpec
from crqat.train.quantized_model import quantize_model
from crqat.train.quantizers.base import is_step
from crqat.train.training import loop
from crqat.train.training.optimizer import Fit
from crqat.train.untrained import awake, sane_bn

TARGETS = runtimes.names()
CLASSES = 10
# Numbers of images for BN's statistics and the ranges, for the training step, and for the verification of codes.
CALIBRATION_IMAGES, STEP_IMAGES = 8, 4
_LEARNING_RATE = 1e-3
_NO_ENGINE: dict[str, Any] = {"status": "not run: not asked for", "coverage": None, "uncovered": []}


def measure(name: str, images: Images, engines: bool = False) -> dict[str, Any]:
    """Quantize a network, train it for one step, export and verify it, and return what was measured.

    Args:
        name: Name as in `model.name` of a recipe.
        images: Images that the network runs on.
        engines: Whether to build the TensorRT engine too.

    Returns:
        What was measured, as a JSON object that `crqat.pipeline.commands.model_survey` shows as a table row.

    Raises:
        UsageError: The network cannot be built, mapped or exported; the message names the part and the reason.
        ToolError: The network's library or the engine's builder is missing.
    """
    clock = _Clock()
    torch.manual_seed(0)
    network = awake(models.build(name, CLASSES, images.channels))
    batch, labels = _load(images)
    network = sane_bn(network, batch)
    clock("build")
    model = quantize_model(network, batch[:2], QuantizationConfig(), TARGETS)
    clock("layout")
    model.calibrate([batch])
    clock("calibrate")
    step = _train_one_step(model, batch[:STEP_IMAGES], labels[:STEP_IMAGES])
    notes = model.finalize()
    clock("train")
    quantized = Quantized.of(model, batch)
    files = quantized.files()
    clock("export")
    proof = verify(model, quantized.grids, files, batch[: images.verified].numpy())
    fused = fusion(files[runtimes.executed()].model)
    clock("verify")
    amounts = macs(quantized.graph)
    report = _engine(files[next(filter(runtimes.builds_engine, TARGETS))], amounts) if engines else _NO_ENGINE
    clock("engine")
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "mapped": _mapped(model.specs),
        "step": step,
        "notes": notes,
        "claims": {target: dict(Counter(c.claim for c in file.claims().values())) for target, file in files.items()},
        "findings": {target: [str(finding) for finding in lint(file.model, target)] for target, file in files.items()},
        "verification": to_json(proof),
        "fusion": to_json(fused),
        "macs": _multiplications(fused, amounts),
        "engine": report,
        "seconds": clock.seconds,
    }


class _Clock:
    """Stopwatch: each call with a name stores the seconds since the previous call under that name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def __call__(self, part: str) -> None:
        now = time.monotonic()
        self.seconds[part] = round(now - self._last, 1)
        self._last = now


def _load(images: Images) -> tuple[Tensor, Tensor]:
    """Return normalized images of shape [CALIBRATION_IMAGES, C, size, size], and labels."""
    if images.cifar10 is None:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(CALIBRATION_IMAGES, images.channels, images.size, images.size, generator=generator)
        return noise, torch.arange(CALIBRATION_IMAGES) % CLASSES
    config = DataConfig("cifar10", channels=1 if images.channels == 1 else 3)
    dataset = sources.load("cifar10", str(images.cifar10), False, config=config)
    small = torch.from_numpy(dataset.preprocessing(dataset.train_images[:CALIBRATION_IMAGES].numpy()))
    size = (images.size, images.size)
    enlarged = functional.interpolate(small, size, mode="bilinear", align_corners=False)
    return enlarged, dataset.train_labels[:CALIBRATION_IMAGES]


def _train_one_step(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Run one step of quantization-aware training; report the loss and which parameters got no gradient."""
    device = torch.device("cpu")
    fit = Fit(model, OptimizerConfig(epochs=1, lr=_LEARNING_RATE), 1, "qat", device, quiet)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.train()
    loss = functional.cross_entropy(model(images), labels)
    loop.update(fit, loss)
    model.eval()
    parameters = dict(model.named_parameters())
    unreached = [name for name, parameter in parameters.items() if parameter.grad is None]
    steps = [name for name in parameters if is_step(name)]
    return {
        "loss": float(loss.detach()),
        "finite": bool(torch.isfinite(loss.detach())) and all(bool(p.isfinite().all()) for p in parameters.values()),
        "parameters": len(parameters),
        "changed": sum(not torch.equal(before[name], parameter) for name, parameter in parameters.items()),
        "unreached": unreached,
        "scales": len(steps),
    }


def _mapped(specs: list[QuantizerSpec]) -> dict[str, Any]:
    return {
        "quantizers": len(specs),
        "hooks": sum(len(spec.hooks) for spec in specs),
        "weights": sum(spec.kind == "weight" for spec in specs),
        "seven_bits": sum(bool(spec.reason) for spec in specs),
    }


def _multiplications(fused: Fusion, amounts: dict[str, int]) -> dict[str, Any]:
    """Return the multiply-accumulates for one image, and those that ONNX Runtime computes in float, by layer name."""
    in_float = {entry.node: amounts[entry.node] for entry in fused.in_float if entry.node in amounts}
    return {"all": sum(amounts.values()), "float": in_float}


def _engine(file: QDQModel, amounts: dict[str, int]) -> dict[str, Any]:
    if tensorrt_api.choose() is None:
        return {"status": f"not run: {tensorrt_api.RTX} is not installed", "coverage": None, "uncovered": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tensorrt.onnx"
        onnx.save(file.model, path)
        report = engine.build(path, engine.EngineOptions(batch=(1, 1, 1)), amounts)
    asked, written = left_in_float(file.model), to_json(report)
    uncovered = []
    for entry in [] if report.coverage is None else report.coverage.uncovered or []:
        quantized = f"{entry.reason}, though both operands are quantized"
        why = f"no quantizer on {asked[entry.node]}" if entry.node in asked else quantized
        uncovered.append({**to_json(entry), "why": why})
    shown = {key: written[key] for key in ("status", "coverage", "counts", "builder", "remarks")}
    return {**shown, "uncovered": uncovered}


def main(arguments: list[str] | None = None) -> int:
    """Measure one network and write the result as JSON; return 0 even if the network is refused: that is a result."""
    parser = argparse.ArgumentParser(prog="python -m crqat.pipeline.commands.model_survey_worker")
    parser.add_argument("name")
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--verified", type=int, required=True)
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--engines", action="store_true")
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    try:
        images = Images(given.size, given.verified, given.cifar10, given.channels)
        row = {"status": "measured", **measure(given.name, images, given.engines)}
    except (Exception, SystemExit) as error:
        told = error if isinstance(error, CrqatError) else failures.explain(error, given.name)
        kinds = {UsageError: "refused", ToolError: "not run", InternalError: "failed"}
        row = {"status": f"{kinds[type(told)]}: {told}"}
    given.report.write_text(json.dumps(row, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
