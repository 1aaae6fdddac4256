"""Finds problems before a long training: runs a recipe's untrained network through all stages.

The check uses a copy, a few images, and its own random generators, so a training after it has the same bits as one
without it. Each stage of the check is a function that raises what is wrong.
"""

from __future__ import annotations

import copy
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, fx, nn

from crqat.core import targets as runtimes
from crqat.core.errors import UsageError
from crqat.core.progress import Progress
from crqat.export.config import ExportConfig
from crqat.export.qdq.lint import lint
from crqat.export.qdq.write import QDQModel, float_model
from crqat.export.to_onnx import Quantized
from crqat.export.verification import UNEXPLAINED
from crqat.export.verification.checks import verify
from crqat.export.verification.fusion import fusion
from crqat.export.write_models import refuse
from crqat.pipeline.recipe.recipe import Recipe, train_config
from crqat.train.config import TrainConfig, is_onnx_file
from crqat.train.data.batches import evaluation_batches
from crqat.train.graph.computed_weights import copied
from crqat.train.graph.explain import forward_of, passes_through, source_line
from crqat.train.placement.quantizer_spec import QuantizerSpec
from crqat.train.quantized_model import QuantizedModel, quantize_model
from crqat.train.training import stage as trainer
from crqat.train.training.first_step import check_forward, check_statistics, check_step, one_line_of
from crqat.train.untrained import awake, sane_bn

# Numbers of images for the ranges and BN's statistics, for the training step, and for the verification of codes.
CALIBRATION_IMAGES, IMAGES = 8, 2
_REPLACE = "replace that operation. Nothing was trained"
_STAGES = ("forward", "training step", "layout", "calibration", "export", "lint", "verification")


def before_training(config: Recipe, progress: Progress, start: trainer.Start) -> None:
    """Check the network before a training; if no epoch will be trained, check only the forward pass.

    Raises:
        UsageError: A problem that would stop the training.
    """
    training = train_config(config)
    trains = training.qat.epochs or (training.float_training.epochs and not start.trained)
    check_start(config, start, progress, _STAGES if trains else _STAGES[:1])


def check_recipe(config: Recipe, progress: Progress) -> list[str]:
    """Build a recipe's untrained network and run it on two of the recipe's images, from training to verified files.

    Returns:
        One line of text for each finding, such as the number of quantizers and whether the codes are equal.

    Raises:
        UsageError: A problem that would stop the run; nothing was trained.
        ToolError: Something that the recipe needs is missing.
    """
    lines: list[str] = []
    trainer.check(train_config(config), progress, lambda start: lines.extend(check_start(config, start, progress)))
    return lines


def check_start(
    config: Recipe, start: trainer.Start, progress: Progress, stages: tuple[str, ...] = _STAGES
) -> list[str]:
    """Run a copy of a training's initial network through the checks in `stages`; return a line for each finding."""
    began = time.monotonic()
    with _untouched():
        found = _Check(config, start, progress, len(stages)).run(stages)
    progress("check", len(stages), len(stages), f"{'; '.join(found)} ({time.monotonic() - began:.1f} s)")
    return found


@contextmanager
def _untouched() -> Iterator[None]:
    """Context manager that restores the random generators of torch (on all devices), NumPy and Python."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - a user's own modules may draw from it
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


class _Check:
    """One check of a recipe: a few images with labels, and the progress over its stages."""

    def __init__(self, config: Recipe, start: trainer.Start, progress: Progress, total: int) -> None:
        self.config, self.training, self.start = config, train_config(config), start
        self._progress, self._done, self._total = progress, 0, total
        chosen = start.split.train[:CALIBRATION_IMAGES]
        images = start.dataset.train_images[chosen].to(start.device)
        self.images = next(evaluation_batches(images, start.dataset.preprocessing, CALIBRATION_IMAGES))
        self.labels = start.dataset.train_labels[chosen].to(start.device)

    def run(self, stages: tuple[str, ...]) -> list[str]:
        network = self._copy(self.start.network)
        if self.training.model.weights is None and not self.training.model.has_weights:
            network = awake(network)
        self._at("forward")
        check_forward(network, self.images[:IMAGES], len(self.start.dataset.class_names))
        if stages == _STAGES[:1]:
            return [f"{IMAGES} images through the float network"]
        self._at("training step")
        if not self.start.trained:
            if self.training.float_training.epochs:
                self._step(self._copy(network), "float")
            drawn = self.training.model.weights is None and not is_onnx_file(self.training.model.name)
            if drawn and len(self.images) > 1:
                network = sane_bn(network, self.images)
        self._at("layout")
        with self._telling("layout"):
            model = layout(network, self.images[:IMAGES], self.training)
        self._at("calibration")
        with self._telling("calibration"):
            calibrate_on_few(model.to(self.start.device), self.images, self.training)
        if self.training.qat.epochs:
            self._step(copy.deepcopy(model), "qat")
        if count := min(self.training.qat.bn_images, self.training.qat.batch_size, IMAGES):
            check_statistics(copy.deepcopy(model), self.images[:count], "qat.bn_images and qat.batch_size")
        self._at("export")
        quantized, files = export(model, self.images, self.training, self.config.export)
        self._at("lint")
        refuse_findings(files, self.config.export)
        self._at("verification")
        proof = prove(quantized, files, self.images[:IMAGES].cpu())
        return [f"{len(model.specs)} quantizers, {', '.join(f'{name}.onnx' for name in files)}", *proof]

    def _at(self, stage: str) -> None:
        self._progress("check", self._done, self._total, stage)
        self._done += 1

    def _copy(self, network: nn.Module) -> nn.Module:
        try:
            return copy.deepcopy(network, copied(network))
        except Exception as error:
            if passes_through(error):
                raise
            msg = (
                f"model.name: {type(network).__name__} cannot be copied{one_line_of(error)}; teacher and export "
                "need copies: keep computed tensors out of attributes (torch.nn.utils.prune.remove ends a pruning)"
            )
            raise UsageError(msg) from error

    def _step(self, network: nn.Module, key: str) -> None:
        section = self.training.float_training if key == "float" else self.training.qat
        together = key == "qat" and self.training.qat.sync_bn
        processes = 1 if together else self.start.processes
        count = min(IMAGES, section.batch_size // processes)
        check_step(network, self.images[:count], self.labels[:count], section, key, processes)

    @contextmanager
    def _telling(self, stage: str) -> Iterator[None]:
        """Context manager that reports unexpected errors with the stage in which they occurred."""
        try:
            yield
        except Exception as error:
            if passes_through(error):
                raise
            network = self.start.network
            msg = (
                f"model.name: {type(network).__name__}{forward_of(network)}: a trial with an untrained copy fails in "
                f"the {stage}{one_line_of(error)}; {_REPLACE}"
            )
            raise UsageError(msg) from error


def layout(network: nn.Module, images: Tensor, training: TrainConfig) -> QuantizedModel:
    """Return a copy of a network with uncalibrated quantizers; see `crqat.train.quantized_model.quantize_model`."""
    return quantize_model(network, images, training.quantization, training.targets)


def calibrate_on_few(model: QuantizedModel, images: Tensor, training: TrainConfig) -> None:
    """Initialize the quantizers' ranges from a few images, and check the quantized network's outputs on them.

    Raises:
        UsageError: A quantized tensor or a logit is not finite.
    """
    model.calibrate([images], training.quantization.calibration)
    broken: list[str] = []

    def look_at(spec: QuantizerSpec) -> Callable[..., None]:
        def look(_: nn.Module, inputs: tuple[Tensor], __: Tensor) -> None:
            if not torch.isfinite(inputs[0]).all():
                broken.append(spec.operation)

        return look

    handles = [model.quantizer(spec).register_forward_hook(look_at(spec)) for spec in model.specs]
    with torch.no_grad():
        finite = bool(torch.isfinite(model(images)).all())
    for handle in handles:
        handle.remove()
    if not finite or broken:
        place = f"first before {broken[0]}" if broken else "in its logits"
        msg = (
            f"model.name: with quantizers the network gives values that are not finite, {place}; do not divide by what "
            "may be rounded to 0, nor take its logarithm"
        )
        raise UsageError(msg)


def export(
    model: QuantizedModel, images: Tensor, training: TrainConfig, config: ExportConfig
) -> tuple[Quantized, dict[str, QDQModel]]:
    """Make the ONNX file of each target in memory, as the `export` stage does, and check that the float file loads.

    Returns:
        The quantized network that is exported, and the ONNX file for each target, by the target's name.

    Raises:
        UsageError: A file cannot be made; the message names the operation and the fix.
    """
    model.eval().cpu().to(memory_format=torch.contiguous_format)
    model.finalize(trained=False)
    quantized = Quantized.of(model, images.cpu())
    _load(float_model(quantized.graph, {}))
    files: dict[str, QDQModel] = {}
    for target in config.targets or training.targets:
        runtime = runtimes.get(target)
        precision = runtime.float_type(config.tensorrt_precision)
        weights = config.weights if runtime.float_weights else "int8"
        try:
            files[target] = _file(quantized, target, precision, weights)
        except Exception as error:
            if passes_through(error):
                raise
            fix = _REPLACE
            if precision != "float32":
                with suppress(Exception):
                    _file(quantized, target, "float32", weights)
                    fix = "set export.tensorrt_precision: float32, or replace that operation. Nothing was trained"
            msg = f"model.name: {target}.onnx of the untrained network: {_operation(quantized, error)}; {fix}"
            raise UsageError(msg) from error
    return quantized, files


def _file(quantized: Quantized, target: str, precision: str, weights: str) -> QDQModel:
    file = quantized.file(target, precision, weights=weights)
    if precision != "float32":  # that precision has its own float file
        float_model(quantized.graph, {}, precision)
    return file


def _load(model: onnx.ModelProto) -> None:
    onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def _operation(quantized: Quantized, error: BaseException) -> str:
    """Describe the operation that caused an export error, with its layer and line if known, and the error."""
    text = one_line_of(error).strip()
    node = _node(quantized.graph.nodes, error)
    if node is None:
        return f"it fails {text}"
    scope = node.output[0].strip("/").rpartition("/")[0] if node.output[0].startswith("/") else ""
    named = node.name if not re.search(rf"^{node.op_type}_\d+$|__", node.name) else ""
    layer = (named or scope).replace("/", ".")  # a module's layer; empty for operations of the forward itself
    calls = [call for call in quantized.model.graph.nodes if call.op.startswith("call")]
    found = [call for call in calls if str(call.target) == layer]
    found += [call for call in calls if layer and any(str(s.target) == f"{layer}.weight" for s in _stored(call))]
    alike = [call for call in calls if _name(call) and _name(call) in node.op_type.lower()]
    if not layer and len(alike) == 1:
        found = alike
    place = f" in {layer}" if layer else ""
    return f"its {node.op_type}{place}{source_line(found[0].stack_trace) if found else ''} fails {text}"


def _name(call: fx.Node) -> str:
    """Return the name of a called function or method; "" for a module."""
    return "" if call.op == "call_module" else str(getattr(call.target, "__name__", call.target)).strip("_")


def _stored(call: fx.Node) -> list[fx.Node]:
    """Return the nodes whose results a call reads, such as stored weights, directly or through a quantizer."""
    return [*call.all_input_nodes, *(s for source in call.all_input_nodes for s in source.all_input_nodes)]


def _node(nodes: Sequence[onnx.NodeProto], error: BaseException) -> onnx.NodeProto | None:
    """Return the node that an error's text names, or that was being processed when it was raised."""
    names = set(re.findall(r"[Nn](?:ode n)?ame: ([^\s)]+)", str(error)))
    found = next((node for node in nodes if node.name in names), None)
    traceback = error.__traceback__
    while traceback is not None and not names:
        at_work = traceback.tb_frame.f_locals.get("node")
        if isinstance(at_work, onnx.NodeProto):
            found = at_work
        traceback = traceback.tb_next
    return found


def refuse_findings(files: Mapping[str, QDQModel], config: ExportConfig) -> None:
    """Check that each file obeys the rules of its target and stores the trained Grids without a forbidden loss.

    Raises:
        UsageError: A file breaks a rule, or changes a Grid in a way that `export.allow_lossy` does not allow.
    """
    for target, file in files.items():
        findings = [str(finding) for finding in lint(file.model, target)]
        try:
            refuse(file, target, config.allow_lossy, findings)
        except UsageError as error:
            msg = f"{str(error).partition('; crqat export')[0]}. Nothing was trained; --unchecked trains anyway"
            raise UsageError(msg) from error


def prove(quantized: Quantized, files: Mapping[str, QDQModel], images: Tensor) -> list[str]:
    """Compare the integer codes of the torch network, the integer simulator and ONNX Runtime on a few images.

    Returns:
        One line of text for each file that cannot be verified, and one that names operations that ONNX Runtime computes
        in float for an unknown reason. If there is neither, a single line says that all codes are equal.

    Raises:
        UsageError: The codes differ.
    """
    try:
        proof = verify(quantized.model, quantized.grids, files, images.numpy())
    except Exception as error:
        if passes_through(error):
            raise
        msg = f"model.name: verifying the untrained network's files: {_operation(quantized, error)}; {_REPLACE}"
        raise UsageError(msg) from error
    lines = []
    for target, entry in proof.items():
        status = entry.status
        if status.startswith("failed"):
            msg = (
                f"model.name: {target}.onnx of the untrained network does not compute what torch does ({status}), and "
                "the gate would fail. Nothing was trained; --unchecked trains anyway"
            )
            raise UsageError(msg)
        if status != "passed":
            lines.append(f"{target}.onnx: {status}; the gate will be inconclusive")
    executed = runtimes.executed()
    if executed in files:
        odd = [node for node in fusion(files[executed].model).in_float if node.reason == UNEXPLAINED]
        if odd:
            names = ", ".join(node.node for node in odd[:3])
            lines.append(
                f"{executed}.onnx: ONNX Runtime computes {names} in float instead of integers; where that rounds "
                "differently the gate will fail"
            )
    return lines or [f"codes equal on {len(images)} images"]
