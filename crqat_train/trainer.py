"""The `train` stage: a float network, loaded or trained; its quantized copy, calibrated and trained; the better one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from artifacts.errors import UsageError
from artifacts.grid import save_grids
from artifacts.progress import Progress
from crqat_train import data, distributed, models, nncf_checkpoint, nncf_start, ranks
from crqat_train.batches import Batches, Feed, Generators, evaluation_batches, subset
from crqat_train.checkpoint import write_tensors
from crqat_train.config import OptimizerConfig, TrainConfig
from crqat_train.consistency import ConsistencyTraining, consistency_weight
from crqat_train.evaluation import BATCH, accuracy
from crqat_train.fit import Fit, finite
from crqat_train.low_bits import LowBitTraining
from crqat_train.machine import choose_device, compiler, deterministic
from crqat_train.quantized_model import QuantizedModel, quantize_model
from crqat_train.resume import SAVE_EVERY, Keeper, Training

Forward = Callable[[Tensor], Tensor]


def train(
    config: TrainConfig,
    out: Path | None,
    progress: Progress,
    states: Path | None = None,
    save_every: float = SAVE_EVERY,
) -> dict[str, Any]:
    """Run the stage and fill `out` with checkpoints, Grids, the layout and the history.

    Args:
        config: Resolved recipe.
        out: Empty directory; None writes nothing, as on ranks above 0.
        progress: Told of epochs.
        states: Where an interrupted training's states are, and are saved; None saves none. They must be of this recipe.
        save_every: Seconds between two states; each epoch's end is saved, too.

    Returns:
        The manifest's payload: accuracies on the validation split, which candidate is better, and what ran where.

    Raises:
        UsageError: The recipe does not fit its data or weights, or training diverged.
        ToolError: The device asked for is not there, or a state cannot be saved.
        Interrupted: By SIGINT or SIGTERM; the state is saved.
    """
    device = choose_device(config.device)
    ranks.check(config, distributed.world())
    if config.qat.sync_bn:
        distributed.check_sync_bn(device)
    with deterministic(config.seed):
        with distributed.first_rank_first():
            dataset = data.of_recipe(config.data, progress)
        split = data.split(len(dataset.train_labels), config.data.validation, config.seed)
        ranks.check_images(len(split.train), "data.validation: training images", distributed.world())
        keeper = Keeper(states, save_every, device, progress)
        run = _Run(config, dataset, split, device, progress, keeper)
        float_model = run.float_model()
        if out is not None:
            write_tensors(out / "float.safetensors", _state(float_model))
        float_accuracy = run.validate(float_model)
        progress("float network", 1, 1, f"validation {float_accuracy:.2%}")
        student = run.quantize(float_model)
        specs = student.specs
        teacher = run.train_quantized(student, float_model)
        candidates: dict[str, QuantizedModel] = {"student": student}
        if teacher is not None:
            candidates["teacher"] = teacher
        notes: list[str] = []
        accuracies = {}
        for name, candidate in candidates.items():
            run.estimate_bn(candidate)
            candidate.to(memory_format=torch.contiguous_format)
            notes += [f"{name}: {note}" for note in candidate.finalize()]
            accuracies[name] = run.validate(candidate)
            grids = candidate.grids()
            if out is not None:
                write_tensors(out / f"{name}.safetensors", _state(candidate))
                save_grids(out / f"{name}.grids.json", grids)
            progress(f"quantized {name}", 1, 1, f"validation {accuracies[name]:.2%}")
    best = max(accuracies, key=lambda name: accuracies[name])
    if out is not None:
        (out / "layout.json").write_text(json.dumps([asdict(spec) for spec in specs], indent=1))
        (out / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in run.history))
    return {
        "device": str(device),
        "processes": distributed.world(),
        "compiled": run.compiled,
        "float": {"validation_accuracy": float_accuracy},
        "candidates": {name: {"validation_accuracy": accuracy} for name, accuracy in accuracies.items()},
        "best": best,
        "validation_images": len(split.validation),
        "preprocessing": asdict(dataset.preprocessing),
        "class_names": list(dataset.class_names),
        "input_shape": list(dataset.train_images.shape[1:]),
        "quantizers": len(specs),
        "notes": [*dataset.notes, *run.notes, *notes]
        + [f"{spec.operation}: {spec.bits} bits: {spec.reason}" for spec in specs if spec.reason],
        "seconds": round(keeper.seconds, 1),
    }


class _Run:
    """What the parts of one training share: data on the device, the split, the generator and the progress."""

    def __init__(
        self,
        config: TrainConfig,
        dataset: data.Dataset,
        split: data.Split,
        device: torch.device,
        progress: Progress,
        keeper: Keeper,
    ) -> None:
        self.config, self.dataset, self.split, self.device, self.progress = config, dataset, split, device, progress
        self.keeper = keeper
        nncf = config.model.nncf
        self.nncf = None if nncf is None else nncf_checkpoint.read(Path(nncf))
        self.generators = Generators.of(config.seed, device)
        self.history: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.compiler = "" if config.compile == "never" else compiler(device)
        self.compiled = self.compiler or (
            "no: the recipe says never" if config.compile == "never" else "no: no compiler"
        )
        self.validation_images = subset(dataset.train_images, split.validation).to(device)
        self.validation_labels = dataset.train_labels[split.validation].to(device)

    def float_model(self) -> nn.Module:
        """The float network, loaded from `model.weights` or trained by the recipe's `float` section; in eval mode."""
        config = self.config
        channels = self.dataset.train_images.shape[1]
        classes, weights = len(self.dataset.class_names), config.model.weights
        if weights == "pretrained":
            with distributed.first_rank_first():
                model, new_classifier = models.pretrained(config.model.name, classes, channels)
            if new_classifier and config.float_training.epochs == 0:
                msg = (
                    f"model.weights: the published weights of {config.model.name} are not for {classes} classes; "
                    "add a `float` section to train the new classifier"
                )
                raise UsageError(msg)
        else:
            model = models.build(config.model.name, classes, channels)
        # Never slower than the other layout where it was measured, and a third faster for depthwise convolutions.
        model = model.to(self.device).to(memory_format=torch.channels_last)
        source = ""
        if self.nncf is not None:
            source = f"model.nncf: {config.model.nncf}"
            models.fill(model, self.nncf.weights, source)
        elif weights is not None and weights != "pretrained":
            source = f"model.weights: {weights}"
            models.load_weights(model, Path(weights))
        if source:
            if not finite(model):
                msg = f"{source} holds values that are infinite or no number"
                raise UsageError(msg)
            return model.eval()
        if self.keeper.finished("float", model):
            return model.eval()
        batches = self._batches(config.float_training, "float.batch_size", strong=False)
        fit = Fit(model, config.float_training, len(batches), "float", self.device, self.progress)
        forward = self._compile(model)

        def step(batch: tuple[Tensor, ...]) -> None:
            images, labels = batch
            with fit.autocast():
                loss = functional.cross_entropy(forward(images), labels)
            fit.step(loss)

        training = self._training(fit, {"images": self._feed(batches, 1)}, {"float": model})
        self._epochs(training, step, lambda: {"validation": self.validate(model)})
        return model.eval()

    def quantize(self, float_model: nn.Module) -> QuantizedModel:
        """Insert quantizers and start their ranges from training images."""
        config = self.config
        images = self.dataset.train_images[self.split.train[: config.quantization.calibration_images]].to(self.device)
        batches = list(evaluation_batches(images, self.dataset.preprocessing, BATCH))
        student = quantize_model(float_model, batches[0][:2], config.quantization, config.targets).to(self.device)
        student.calibrate(batches, config.quantization.calibration)
        self.progress("calibration", 1, 1, f"{len(student.specs)} quantizers from {len(images)} training images")
        if self.nncf is not None:
            edges = nncf_start.summary(nncf_start.take_ranges(student, self.nncf, config.targets))
            self.notes.append(f"{config.model.nncf}: edges: {edges}")
            self.progress("ranges", 1, 1, edges)
        return student

    def train_quantized(self, student: QuantizedModel, float_model: nn.Module) -> QuantizedModel | None:
        """CR-QAT: returns the EMA teacher, None where there is none."""
        config, consistency = self.config, self.config.consistency
        if config.qat.epochs == 0:
            return None
        batches = self._batches(config.qat, "qat.batch_size", strong=config.data.strong != "none")
        fit = Fit(student, config.qat, len(batches), "qat", self.device, self.progress)
        training = ConsistencyTraining(student, float_model, consistency, self._compile)
        feeds = {"images": self._feed(batches, training.views)}
        unlabeled = self._unlabeled()
        stream: Iterator[tuple[Tensor, ...]] | None = None
        if unlabeled is not None and training.views == 2:
            feeds["unlabeled"] = self._feed(unlabeled, 2)
            stream = feeds["unlabeled"].stream()

        def step(batch: tuple[Tensor, ...]) -> None:
            *images, labels = batch
            if stream is not None:
                images = [torch.cat(pair) for pair in zip(images, next(stream), strict=True)]
            low_bits.before_step()
            weight = consistency_weight(fit.steps_done, fit.steps, consistency)
            with fit.autocast():
                loss = low_bits.penalized(training.loss(images, labels, weight))
            fit.step(loss)
            training.after_step(fit.steps_done - 1)

        def measure() -> dict[str, float]:
            low_bits.go_on()  # where the state was saved behind the epoch's last step
            weight = consistency_weight(fit.steps_done, fit.steps, consistency)
            row = {"lambda": weight if training.views == 2 else 0.0, "validation": self.validate(student)}
            if training.teacher is not None:
                row["validation_teacher"] = self.validate(training.teacher)
            return row

        networks = {"float": float_model, "student": student}
        if training.teacher is not None:
            networks["teacher"] = training.teacher
        with distributed.synchronized_norms(student, config.qat.sync_bn):
            low_bits = LowBitTraining(student, training.teacher, config.qat, fit, self._compile)
            self._epochs(self._training(fit, feeds, networks), step, measure)
        student.eval()
        return training.teacher

    def _training(self, fit: Fit, feeds: dict[str, Feed], networks: dict[str, nn.Module]) -> Training:
        return Training(fit, feeds, networks, self.generators, self.history)

    def _epochs(
        self,
        training: Training,
        step: Callable[[tuple[Tensor, ...]], None],
        measure: Callable[[], dict[str, float]],
    ) -> None:
        """All epochs of a training, or those that an interrupted one has left: a row of history after each.

        Args:
            training: What is saved and taken up again.
            step: One optimizer step on a batch of the feed "images".
            measure: What an epoch's row says beside the loss.
        """
        fit = training.fit
        distributed.seed_rank(self.config.seed)
        with self.keeper.keep(training):
            for epoch in fit.epochs():
                fit.model.train()
                for batch in training.feeds["images"].epoch():
                    step(batch)
                    self.keeper.after_step()
                self.history.append(fit.end_of_epoch(epoch, **measure()))
                self.keeper.save()

    def estimate_bn(self, model: fx.GraphModule) -> None:
        """Replace BN's running statistics by those of `qat.bn_images` training images; the model ends in eval mode."""
        count, dataset = self.config.qat.bn_images, self.dataset
        if count:
            images = dataset.train_images[self.split.train[:count]].to(self.device)
            made = evaluation_batches(images, dataset.preprocessing, self.config.qat.batch_size)
            # Full batches alone: a small one would count as much as they do.
            full = [batch for batch in made if len(batch) == min(count, self.config.qat.batch_size)]
            torch.optim.swa_utils.update_bn(full, model)
            distributed.take_statistics(model)
        model.eval()

    def validate(self, model: nn.Module) -> float:
        """Accuracy on the validation split, in 0..1."""
        return accuracy(model, self.validation_images, self.validation_labels, self.dataset.preprocessing)

    def _feed(self, batches: Batches, views: int) -> Feed:
        return Feed(batches, self.generators, views)

    def _batches(self, section: OptimizerConfig, key: str, strong: bool) -> Batches:
        images = subset(self.dataset.train_images, self.split.train)
        labels = self.dataset.train_labels[self.split.train]
        config = self.config.data
        batches = Batches(
            images,
            labels,
            self.dataset.preprocessing,
            section.batch_size,
            config.crop_padding,
            config.flip,
            self.device,
            strong,
        )
        ranks.check_batch(batches.batch_size, f"{key}, of {len(images)} images", distributed.world())
        return batches

    def _unlabeled(self) -> Batches | None:
        config = self.config.data
        if config.unlabeled is None:
            return None
        with distributed.first_rank_first():
            source = data.load_unlabeled(config.unlabeled, config, self.dataset)
        # Of the labeled source itself only the training part: the validation images stay unseen.
        own = self.split.train if config.unlabeled == config.source else torch.arange(len(source.train_labels))
        batches = Batches(
            subset(source.train_images, own), source.train_labels[own], self.dataset.preprocessing,
            self.config.qat.batch_size, config.crop_padding, config.flip, self.device,
        )  # fmt: skip
        ranks.check_batch(batches.batch_size, f"qat.batch_size, of {len(own)} unlabeled images", distributed.world())
        return batches

    def _compile(self, model: nn.Module) -> Forward:
        return distributed.wrap(torch.compile(model) if self.compiler else model)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
