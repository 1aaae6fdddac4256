"""Runs the `train` stage: makes the float network, quantizes, calibrates and trains it, and selects the best candidate.

The candidates are the calibrated network, the trained student and its teacher.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crqat.core.field_bounds import user_path
from crqat.core.grid import save_grids
from crqat.core.progress import Progress
from crqat.core.results.training import Candidate, FloatNetwork, TrainingPayload
from crqat.train import distributed, shares
from crqat.train.checkpoint import write_tensors
from crqat.train.config import ConsistencyConfig, QATConfig, TrainConfig
from crqat.train.data import sources
from crqat.train.data.batches import Batches, Feed, Generators, evaluation_batches, subset
from crqat.train.data.dataset import Dataset
from crqat.train.data.split import Split, split_of
from crqat.train.device import choose_device, compiler, deterministic
from crqat.train.models import build as models
from crqat.train.models import published
from crqat.train.nncf import checkpoint as nncf_checkpoint
from crqat.train.nncf import start_from
from crqat.train.ptq import steps as ptq
from crqat.train.quantized_model import QuantizedModel, quantize_model
from crqat.train.quantizers import quantizer_maker
from crqat.train.training import float_network, loop
from crqat.train.training.callbacks import Callback, low_bit_callbacks
from crqat.train.training.consistency import ConsistencyTraining
from crqat.train.training.evaluate import accuracy, batch_size
from crqat.train.training.images import TrainingImages
from crqat.train.training.optimizer import Fit
from crqat.train.training.resume import SAVE_EVERY, Keeper, Training

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Start:
    """Network and data at the start of training.

    Attributes:
        network: Float network on the device, with the recipe's weights. It must not be changed.
        trained: Whether the network's weights come from a file and are not trained further.
        dataset: The data set of the recipe.
        split: Indices of the data set's training images by use: training, validation, unlabeled, or reserved for
            `crqat advise`.
        device: Device of the training.
        processes: Number of processes that train together.
    """

    network: nn.Module
    trained: bool
    dataset: Dataset
    split: Split
    device: torch.device
    processes: int


# Raises an error if the start is not valid. It must not use the random generators of the training.
Precheck = Callable[[Start], None]


def train(
    config: TrainConfig,
    out: Path | None,
    progress: Progress,
    states: Path | None = None,
    save_every: float = SAVE_EVERY,
    precheck: Precheck | None = None,
    track: loop.Track | None = None,
) -> TrainingPayload:
    """Run the stage and fill `out` with checkpoints, Grids, the specs of the quantizers, and the history.

    Args:
        config: Resolved recipe.
        out: Empty directory; None writes nothing, as on ranks above 0.
        progress: Reports epochs.
        states: Directory for the states of an interrupted training run of this recipe; None saves none.
        save_every: Seconds between two states; a state is also saved after each epoch.
        precheck: Called on rank 0 before training starts, unless it resumes from a state.
        track: Called with the history of epochs as it grows; None on ranks above 0.

    Returns:
        The manifest's payload: accuracies on the validation split, the best candidate, and the environment. The
        calibrated network is a candidate as well, so training never delivers a worse one.

    Raises:
        UsageError: The recipe does not fit its data or weights, or training diverged.
        ToolError: The device is not available, or a state cannot be saved.
        Interrupted: The process received SIGINT or SIGTERM; the state is saved.
    """
    with deterministic(config.seed):
        run, network, trained = _begin(config, progress, states, save_every, precheck)
        run.track = track
        dataset, split, device, keeper = run.dataset, run.split, run.device, run.keeper
        float_model = run.float_model(network, trained)
        if out is not None:
            write_tensors(out / "float.safetensors", _state(float_model))
        float_accuracy = run.validate(float_model)
        progress("float network", 1, 1, f"validation {float_accuracy:.2%}")
        student = run.quantize(float_model)
        candidates: dict[str, float] = {}
        notes: list[str] = []

        def finish(name: str, candidate: QuantizedModel) -> None:
            candidate.to(memory_format=torch.contiguous_format)
            made = candidate.finalize(trained=config.qat.epochs > 0 and name != "calibrated")
            notes.extend(f"{name}: {note}" for note in made)
            candidates[name] = run.validate(candidate)
            if out is not None:
                write_tensors(out / f"{name}.safetensors", _state(candidate))
                save_grids(out / f"{name}.grids.json", candidate.grids())
            progress(f"quantized {name}", 1, 1, f"validation {candidates[name]:.2%}")

        if config.qat.epochs:
            finish("calibrated", copy.deepcopy(student))
            run.begin_history(candidates["calibrated"])
        teacher = run.train_quantized(student, float_model)
        for name, candidate in {"student": student, "teacher": teacher}.items():
            if candidate is not None:
                run.estimate_bn(candidate)
                finish(name, candidate)
    # Of equally good candidates, take the first.
    best = max((n for n in ("student", "teacher", "calibrated") if n in candidates), key=candidates.__getitem__)
    if out is not None:
        (out / "layout.json").write_text(json.dumps([asdict(spec) for spec in student.specs], indent=1))
        (out / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in run.history))
    return TrainingPayload(
        device=str(device),
        processes=distributed.world(),
        compiled=run.compiled,
        float_network=FloatNetwork(float_accuracy, published.published_accuracy(config, len(dataset.class_names))),
        candidates={name: Candidate(accuracy) for name, accuracy in candidates.items()},
        best=best,
        validation_images=len(split.validation),
        preprocessing=dataset.preprocessing,
        class_names=list(dataset.class_names),
        input_shape=list(dataset.train_images.shape[1:]),
        quantizers=len(student.specs),
        preparation=run.preparation,
        notes=[*dataset.notes, *run.preparation, *run.notes, *notes]
        + [f"{spec.operation}: {spec.bits} bits: {spec.reason}" for spec in student.specs if spec.reason],
        warnings=[_worse(candidates, config.qat, len(split.validation))] if best == "calibrated" else [],
        seconds=round(keeper.seconds, 1),
    )


def check(config: TrainConfig, progress: Progress, precheck: Precheck) -> None:
    """Run all checks and preparations of the training without training.

    Raises:
        UsageError: See `train`.
        ToolError: See `train`.
    """
    with deterministic(config.seed):
        _begin(config, progress, None, SAVE_EVERY, precheck)


def _begin(
    config: TrainConfig, progress: Progress, states: Path | None, save_every: float, precheck: Precheck | None
) -> tuple[_Run, nn.Module, bool]:
    """Read the data, build the float network and check both.

    Returns:
        The training run, the float network, and whether its weights come from a file and are not trained further.
    """
    device = choose_device(config.device)
    shares.check(config, distributed.world())
    if config.qat.sync_bn:
        distributed.check_sync_bn(device)
    models.check_name(config.model.name)
    quantizer_maker(config.quantization)  # refuse an invalid method before anything is read or trained
    with distributed.first_rank_first():
        preparation = [f"images prepared {note}" for note in published.notes(config)]
        config = replace(config, data=published.data_section(config))
        dataset = sources.of_recipe(config.data, progress)
        missing = sources.normalization_note(config.data, dataset.preprocessing)
    preparation += [] if missing is None else [missing]
    for note in preparation:
        progress("normalization", 1, 1, note)
    split = split_of(dataset.train_labels, config.data, config.seed)
    shares.check_images(len(split.train), "data.validation: training images", distributed.world())
    keeper = Keeper(states, save_every, device, progress)
    run = _Run(config, dataset, split, device, progress, keeper)
    run.preparation = preparation
    _ = run.images.without_labels  # report errors in these images before anything is trained
    built = float_network.build(config, dataset, split, run.nncf, device, progress)
    run.notes += built.notes
    run.preparation += built.preparation
    network, trained = built.network, built.unchanged
    if not keeper.found:
        start = Start(network, trained, dataset, split, device, distributed.world())
        with distributed.first_rank_alone() as first:
            if first and precheck is not None:
                precheck(start)
    return run, network, trained


class _Run:
    """State shared by the parts of a training run: data on the device, split, random generator and progress."""

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        split: Split,
        device: torch.device,
        progress: Progress,
        keeper: Keeper,
    ) -> None:
        self.config, self.dataset, self.split, self.device, self.progress = config, dataset, split, device, progress
        self.keeper = keeper
        self.images = TrainingImages(config.data, dataset, split, device)
        nncf = config.model.nncf
        self.nncf = None if nncf is None else nncf_checkpoint.read(user_path(nncf, "model.nncf"))
        self.generators = Generators.of(config.seed, device)
        self.history: list[dict[str, Any]] = []
        self.track: loop.Track | None = None
        self.notes: list[str] = []
        self.preparation: list[str] = []
        self.compiler = "" if config.compile == "never" else compiler(device)
        self.compiled = self.compiler or (
            "no: the recipe says never" if config.compile == "never" else "no: no compiler"
        )
        self.validation_images = subset(dataset.train_images, split.validation).to(device)
        self.validation_labels = dataset.train_labels[split.validation].to(device)

    def float_model(self, model: nn.Module, trained: bool) -> nn.Module:
        """Return the float network in eval mode; the recipe's `float` section trains it unless its weights are kept."""
        config = self.config
        if trained or self.keeper.finished("float", model) or config.float_training.epochs == 0:
            return model.eval()
        section = config.float_training
        batches = self.images.labeled(section, "float.batch_size", strong=section.strong != "none")
        fit = Fit(model, section, len(batches), "float", self.device, self.progress)
        consistency = section.consistency or ConsistencyConfig(teacher="none")
        networks = ConsistencyTraining(model, model, consistency, self._compile)
        teacher = networks.teacher
        feeds = self._feeds(batches, networks, fit, model)
        saved = {"float": model} if teacher is None else {"float": model, "teacher": teacher}
        self._epochs(fit, feeds, saved, networks, [], lambda: self._measure(fit, networks, model))
        if teacher is not None and self.history[-1]["validation_teacher"] > self.history[-1]["validation"]:
            model.load_state_dict(teacher.state_dict())
            self.progress(
                "float network", 1, 1, "the average of the weights is used, its validation accuracy is higher"
            )
        return model.eval()

    def quantize(self, float_model: nn.Module) -> QuantizedModel:
        """Insert quantizers and calibrate their ranges on training images."""
        config = self.config
        images = self.dataset.train_images[self.split.train[: config.quantization.calibration_images]].to(self.device)
        batches = list(evaluation_batches(images, self.dataset.preprocessing, batch_size(images)))
        student = quantize_model(float_model, batches[0][:2], config.quantization, config.targets).to(self.device)
        for note in student.notes:
            self.progress("layout", 1, 1, f"warning: {note}")
            self.notes.append(note)
        made = ptq.apply(student, config.targets, batches, config.quantization.calibration, config.ptq, self.progress)
        self.progress(
            "calibration", 1, 1, f"{len(student.specs)} quantizers, ranges from {len(images)} training images"
        )
        self.notes.extend(made)
        if self.nncf is not None:
            edges = start_from.summary(start_from.take_ranges(student, self.nncf, config.targets))
            self.notes.append(f"{config.model.nncf}: edges: {edges}")
            self.progress("ranges", 1, 1, edges)
        return student

    def begin_history(self, calibrated: float) -> None:
        """Record the first row of the history: the accuracy of the calibrated network before training."""
        row = {"phase": "qat", "epoch": 0, "validation": calibrated}
        if self.config.consistency.teacher == "ema":
            row["validation_teacher"] = calibrated
        self.history.append(row)

    def train_quantized(self, student: QuantizedModel, float_model: nn.Module) -> QuantizedModel | None:
        """Train the quantized network by CR-QAT; return the EMA teacher, or None if there is none."""
        config, consistency = self.config, self.config.consistency
        if config.qat.epochs == 0:
            return None
        batches = self.images.labeled(config.qat, "qat.batch_size", strong=config.data.strong != "none")
        fit = Fit(student, config.qat, len(batches), "qat", self.device, self.progress)
        networks = ConsistencyTraining(student, float_model, consistency, self._compile)
        feeds = self._feeds(batches, networks, fit, float_model)
        saved: dict[str, nn.Module] = {"float": float_model, "student": student}
        if networks.teacher is not None:
            saved["teacher"] = networks.teacher
        with distributed.synchronized_norms(student, config.qat.sync_bn):
            callbacks = low_bit_callbacks(student, networks.teacher, config.qat, self._compile)
            self._epochs(fit, feeds, saved, networks, callbacks, lambda: self._measure(fit, networks, student))
        student.eval()
        return networks.teacher

    def _measure(self, fit: Fit, networks: ConsistencyTraining, student: nn.Module) -> dict[str, float]:
        """Return what the history records for an epoch in addition to the loss."""
        row = {"validation": self.validate(student)}
        if fit.name == "qat" or networks.config.teacher != "none":
            row = {"lambda": networks.weight(fit.steps_done, fit.steps), **row}
        if networks.teacher is not None:
            row["validation_teacher"] = self.validate(networks.teacher)
        return row

    def _feeds(
        self, batches: Batches, networks: ConsistencyTraining, fit: Fit, float_model: nn.Module
    ) -> dict[str, Feed]:
        """Return the batches of training images, and unlabeled ones if the consistency term uses them."""
        feeds = {"images": self._feed(batches, networks.views)}
        if networks.views == 2 or networks.pseudo_labels:
            labeler = float_model if networks.pseudo_labels else None
            unlabeled = self.images.unlabeled(fit.section, batches.strong, labeler)
            if unlabeled is not None:
                feeds["unlabeled"] = self._feed(unlabeled, networks.views)
        return feeds

    def _epochs(
        self,
        fit: Fit,
        feeds: dict[str, Feed],
        saved: dict[str, nn.Module],
        networks: ConsistencyTraining,
        callbacks: Sequence[Callback],
        measure: Callable[[], dict[str, float]],
    ) -> None:
        distributed.seed_rank(self.config.seed)
        training = Training(fit, feeds, saved, self.generators, self.history)
        loop.epochs(training, networks, callbacks, self.keeper, measure, self.track)

    def estimate_bn(self, model: QuantizedModel) -> None:
        """Re-estimate BN's running statistics from `qat.bn_images` training images; the model ends in eval mode."""
        count, dataset = self.config.qat.bn_images, self.dataset
        if count:
            images = dataset.train_images[self.split.train[:count]].to(self.device)
            made = evaluation_batches(images, dataset.preprocessing, self.config.qat.batch_size)
            # Full batches only: a small one would have the same influence.
            full = [batch for batch in made if len(batch) == min(count, self.config.qat.batch_size)]
            torch.optim.swa_utils.update_bn(full, model)
            distributed.take_statistics(model)
        model.eval()

    def validate(self, model: nn.Module) -> float:
        """Return the accuracy on the validation split, in 0..1."""
        return accuracy(model, self.validation_images, self.validation_labels, self.dataset.preprocessing)

    def _feed(self, batches: Batches, views: int) -> Feed:
        return Feed(batches, self.generators, views)

    def _compile(self, model: nn.Module) -> Forward:
        return distributed.wrap(torch.compile(model) if self.compiler else model)


def _worse(candidates: dict[str, float], qat: QATConfig, images: int) -> str:
    """Return a warning for the case that no trained network is as good as the calibrated one."""
    trained = ", ".join(f"{name} {accuracy:.2%}" for name, accuracy in candidates.items() if name != "calibrated")
    return (
        f"training made the network worse: {trained}, calibration alone {candidates['calibrated']:.2%} of {images} "
        f"validation images, so the calibrated network is the best; try a lower qat.lr (now {qat.lr:g}), "
        f"more qat.epochs (now {qat.epochs}), or qat.epochs: 0, which saves the time"
    )


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
