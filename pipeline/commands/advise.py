"""The `advise` command: searches step by step for the cheapest INT8 network that passes the gate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import yaml

from crqat.core import run_directory
from crqat.core.errors import UsageError
from crqat.core.grid import load_grids
from crqat.core.progress import Progress
from crqat.core.results.advice import Advice, Step
from crqat.core.results.training import TrainingPayload
from crqat.core.typed_json import text
from crqat.pipeline import console
from crqat.pipeline.commands.mixed_precision import changed
from crqat.pipeline.gate import rules
from crqat.pipeline.recipe import recipe
from crqat.pipeline.stages import run as stages
from crqat.train.config import DataConfig, ModelConfig, Override, QATConfig, QuantizationConfig

JSON, PICTURE, RECIPE = "advice.json", "advice.png", "recipe.yaml"
# Share of the training images that is held out if neither the recipe nor the user names judging images.
HELD_BACK = 0.2
# Share of a recipe's QAT that a short QAT runs.
_SHORT = 4
# One more bit for the weights, as a mean over all layers, or one layer in ten in float.
_WIDER_BITS, _FLOAT_SHARE = 1, 10
_IMAGES = 128

_Int = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Judges:
    """Labels of the judging images, and the float network's predictions on them."""

    labels: _Int
    float_answers: _Int


@dataclass
class Ladder:
    """Search of `crqat advise` for one recipe: tries steps, from calibration to QAT, the cheapest first.

    Each step's network is judged on the judging images, which neither the step nor the float training has seen.

    Attributes:
        config: Recipe to advise on.
        runs: Directory of all runs. Each step writes a run there, named after the recipe and the step.
        judge: Folder of class folders with the judging images. None uses the images that the recipe's image list marks
            for judging, or holds out a part of the training images.
        progress: Callback for the progress of the steps.
        every: Whether to run all steps even after one has passed.
        trains: Whether to include the steps that train the network.
    """

    config: recipe.Recipe
    runs: Path
    judge: Path | None
    progress: Progress
    every: bool = False
    trains: bool = True

    def __post_init__(self) -> None:
        data = self.config.data
        if self.judge is None and data.judging is None and data.image_list is None:
            data = replace(data, judging=HELD_BACK)
        # Only the last steps may train, and each step does exactly what its name says.
        self._base = replace(
            self.config,
            data=data,
            ptq=replace(self.config.ptq, bias_correction=False, equalization=False, adaround=False),
            qat=replace(self.config.qat, epochs=0),
            consistency=replace(self.config.consistency, teacher="none"),
        )
        self._judges: _Judges | None = None
        self.found: list[Step] = []
        self.configs: dict[str, recipe.Recipe] = {}

    def climb(self) -> Advice:
        """Run one step after another until one passes the gate, and return the results of all steps.

        Raises:
            UsageError: The recipe cannot be trained, or the judging images do not fit it.
        """
        self._read()
        for name, config in self._steps():
            try:
                self._try(name, config)
            except UsageError as error:
                if not config.ptq.adaround or not str(error).startswith("ptq.adaround"):
                    raise
                self.progress(f"step {name}", 1, 1, f"left out: {error}")
                continue
            if self.found[-1].status == "pass" and not self.every:
                break
        passed = next((step for step in self.found if step.status == "pass"), None)
        best = passed or min(self.found, key=_rank)
        judges = self._judging()
        return Advice(
            images=len(judges.labels),
            source=self._source(),
            understated=self._understated(),
            float_top1=float((judges.float_answers == judges.labels).mean()),
            steps=self.found,
            chosen=best.name,
            passed=passed is not None,
        )

    def _steps(self) -> Iterator[tuple[str, recipe.Recipe]]:
        """Yield each step as a recipe; later steps build on the best step before them."""
        base = self._base
        for method in ("minmax", "percentile", "mse"):
            yield f"calibration-{method}", replace(base, quantization=replace(base.quantization, calibration=method))
        best = self._best()
        yield "bias-correction", replace(best, ptq=replace(best.ptq, bias_correction=True))
        best = self._best()
        yield "equalization", replace(best, ptq=replace(best.ptq, equalization=True))
        best = self._best()
        yield "adaptive-rounding", replace(best, ptq=replace(best.ptq, adaround=True, bias_correction=True))
        best = self._best()
        yield "wider-layers", replace(best, quantization=self._wider(best))
        if not self.trains:
            return
        best = self._best()
        if self.config.quantization.overrides != best.quantization.overrides:
            best = replace(best, quantization=replace(best.quantization, overrides=self.config.quantization.overrides))
        epochs = self.config.qat.epochs or QATConfig().epochs
        short = replace(self.config.qat, epochs=max(1, epochs // _SHORT))
        yield "short-qat", replace(best, qat=short)
        full = replace(best, qat=replace(self.config.qat, epochs=epochs))
        term = replace(self.config.consistency, teacher="ema")
        yield "qat-ema", replace(full, consistency=replace(term, weight=0.0))
        if self.config.data.unlabeled is not None or self.config.data.labeled is not None:
            yield "consistency", replace(full, consistency=replace(term, weight=term.weight or 1.0))

    def _best(self) -> recipe.Recipe:
        return self.configs[min(self.found, key=_rank).name]

    def _wider(self, best: recipe.Recipe) -> QuantizationConfig:
        """Return the settings of `best` with more bits for the weights of layers that need them.

        If the weights of `best` already have eight bits, the layers that are most sensitive to quantization stay float.
        """
        from crqat.export.analysis.bit_allocation import allocate
        from crqat.export.analysis.bit_width_cost import Divergences

        asked = best.quantization
        network = Divergences(self.runs / best.name / "train", recipe.train_config(best), _IMAGES)
        layers = network.one_layer_at_a_time(self.progress)
        if asked.weights < 8:
            bits = allocate(layers, min(8.0, asked.weights + _WIDER_BITS))
            overrides = {
                name: Override(weights=width, activations=max(width, asked.activations)) for name, width in bits.items()
            }
            return replace(asked, overrides=overrides)
        worst = sorted(layers, key=lambda layer: layer.divergence[8], reverse=True)
        kept = tuple(layer.layer for layer in worst[: max(1, len(worst) // _FLOAT_SHARE)])
        return replace(asked, float_layers={"all": kept, **asked.float_layers})

    def _try(self, name: str, config: recipe.Recipe) -> None:
        config = replace(config, name=f"{self.config.name[:70]}-advise-{name}")
        if self.found:  # the float network is that of the first step
            weights = str(self.runs / self.configs[self.found[0].name].name / "train" / "float.safetensors")
            config = replace(config, model=replace(config.model, weights=weights), float_training=None)
        self.configs[name] = config
        directory = stages.train(config, self.runs, False, self.progress, unchecked=bool(self.found))
        payload = run_directory.payload_of(TrainingPayload, directory, run_directory.read_manifest(directory))
        self.found.append(self._judged(name, config, directory, payload))
        step = self.found[-1]
        low, high = step.drop_interval_points
        said = f"drop {step.drop_points:.2f} [{low:.2f}, {high:.2f}] points, {step.status}"
        self.progress(f"step {name}", 1, 1, said)

    def _judged(self, name: str, config: recipe.Recipe, directory: Path, payload: TrainingPayload) -> Step:
        from crqat.export.qdq.lint import int8_share
        from crqat.export.to_onnx import Quantized
        from crqat.export.write_models import make_file
        from crqat.runtime_eval.measure.accuracy import compare, summarize
        from crqat.train.load_trained import rebuild
        from crqat.train.quantizers.calibration import weight_of

        judges = self._judging()
        network = rebuild(directory, recipe.train_config(config), payload, payload.best)
        found = self._answers(network)
        versus = compare(judges.float_answers[:, None], found[:, None], judges.labels, 1.0)
        accuracy = summarize(found[:, None], judges.labels)
        verdicts = rules.on_images(name, accuracy, versus, self.config.gate)
        kinds = {verdict.status for verdict in verdicts}
        weights = [(weight_of(network, spec).numel(), spec) for spec in network.specs if spec.kind == "weight"]
        asked = config.quantization.float_layers
        grids = load_grids(directory / f"{payload.best}.grids.json")
        shown = self._preprocessing(self._images[:2].numpy())
        file = make_file(Quantized(network, grids, shown), config.targets[0], config.export).model
        return Step(
            name=name,
            run=config.name,
            minutes=round(payload.seconds / 60, 2),
            top1=accuracy.top1,
            drop_points=versus.drop_points,
            drop_interval_points=versus.drop_interval_points,
            verdicts=verdicts,
            status="fail" if "fail" in kinds else "inconclusive" if "inconclusive" in kinds else "pass",
            float_layers=sorted({layer for layers in asked.values() for layer in layers}),
            mean_bits=round(sum(len_ * spec.bits for len_, spec in weights) / sum(len_ for len_, _ in weights), 3),
            size_bytes=file.ByteSize(),
            int8_share=int8_share(file),
        )

    def _judging(self) -> _Judges:
        """Return labels and float predictions of the judging images; the predictions are computed only once."""
        if self._judges is None:
            from crqat.train.checkpoint import read_tensors
            from crqat.train.models import build as models

            first = next(iter(self.configs.values()))
            network = models.build(first.model.name, self._classes, self._images.shape[1])
            network.load_state_dict(read_tensors(self.runs / first.name / "train" / "float.safetensors"))
            self._judges = _Judges(self._labels, self._answers(network.eval()))
        return self._judges

    def _read(self) -> None:
        """Read the judging images before anything is trained."""
        from crqat.train.data import sources
        from crqat.train.data.batches import subset
        from crqat.train.data.split import split_of
        from crqat.train.models import published

        config = self._base
        dataset = sources.of_recipe(published.data_section(recipe.train_config(config)), self.progress)
        self._preprocessing, self._classes = dataset.preprocessing, len(dataset.class_names)
        listed = sources.listed_for_judging(dataset, config.data, self.progress)
        if self.judge is None and listed is not None:
            self._images, labels = listed
        elif self.judge is None:
            held = split_of(dataset.train_labels, config.data, config.seed).judging
            self._images, labels = subset(dataset.train_images, held), dataset.train_labels[held]
        else:
            self._images, labels = sources.labeled_folder(self.judge, "--judge", dataset, config.data, self.progress)
        self._labels: _Int = labels.numpy()
        n, limit = len(labels), self.config.gate.max_accuracy_drop
        key = "data.judging" if self.judge is None else "--judge"
        if len(set(labels.tolist())) < 2:
            msg = f"{key}: all {n} judging images are of the same class; add images of other classes"
            raise UsageError(msg)
        from crqat.runtime_eval.measure.accuracy import tango

        least = 100 * tango(0, 0, n)[1]
        if limit is not None and least > limit:
            msg = (
                f"{key}: {n} images cannot show that a drop is within {limit:g} points: even with no difference its "
                f"upper bound is {least:.2f}; add images, or raise gate.max_accuracy_drop"
            )
            raise UsageError(msg)

    def _answers(self, network: Any) -> _Int:
        from crqat.train.training.evaluate import answers

        found: _Int = answers(network, self._images, self._preprocessing).numpy()
        return found

    def _source(self) -> str:
        if self.judge is not None:
            return str(self.judge)
        return "marked in the image list" if self._base.data.judging is None else "held out from the training images"

    def _understated(self) -> str:
        """Return why the measured accuracy drop may be too small; an empty text if there is no reason."""
        if self._base.data.judging is None or self.config.model.weights is None:
            return ""
        return (
            "the float network was trained elsewhere and may have seen these images: the drop may be understated; name "
            "a folder of images that it has not seen with --judge"
        )


def _rank(step: Step) -> tuple[int, float]:
    """Return a sort key for steps: the verdict first, then the accuracy drop."""
    return ("pass", "inconclusive", "fail").index(step.status), step.drop_points


def _gate(step: Step) -> str:
    """Return a step's verdict and the names of the rules that caused it, as text for the table."""
    rules_ = [verdict.rule.replace("_", " ") for verdict in step.verdicts if verdict.status == step.status != "pass"]
    return ": ".join([step.status, ", ".join(rules_)]) if rules_ else step.status


def write(ladder: Ladder, advice: Advice, out: Path) -> None:
    """Write the results of all steps as JSON and as a picture, and the recipe of the chosen step, into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / JSON).write_text(text(advice))
    _draw(out / PICTURE, advice, ladder.config.gate.max_accuracy_drop)
    config = ladder.configs[advice.chosen]
    usual = recipe.Recipe(config.name, DataConfig(config.data.source), ModelConfig(config.model.name))
    values = changed(recipe.resolved(config), recipe.resolved(usual))
    head = f"# Chosen by crqat advise for {ladder.config.name}: {advice.chosen}.\n"
    (out / RECIPE).write_text(head + yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=120))


def chosen(advice: Advice) -> Step:
    """Return the chosen step: the first that passes, or the best one if none passes."""
    return next(step for step in advice.steps if step.name == advice.chosen)


def show(advice: Advice, out: Path) -> None:
    """Print the table of the steps, the chosen step, and the names of the written files in `out` on stdout."""
    rows = []
    for step in advice.steps:
        low, high = step.drop_interval_points
        cells = [f"{100 * step.top1:.2f}", f"{step.drop_points:.2f} [{low:.2f}, {high:.2f}]", f"{step.minutes:.2f}"]
        layers = str(len(step.float_layers)) if step.float_layers else "-"
        share = "-" if step.int8_share is None else f"{100 * step.int8_share:.1f}"
        size = f"{step.size_bytes / 1e6:.2f}"
        rows.append([step.name, *cells, f"{step.mean_bits:g}", size, share, layers, _gate(step)])
    columns = [
        "step",
        "top-1 %",
        "drop, points",
        "minutes",
        "weight bits",
        "size, MB",
        "INT8 MACs %",
        "float layers",
        "gate",
    ]
    title = f"{advice.images} judging images ({advice.source}); float {100 * advice.float_top1:.2f} %"
    console.show_table(title, columns, rows)
    if advice.understated:
        click.echo(f"warning: {advice.understated}")
    if advice.passed:
        click.echo(f"advice: {advice.chosen}, the cheapest step that passes")
    else:
        best = chosen(advice)
        needed = max((verdict.images_needed or 0 for verdict in best.verdicts), default=0)
        more = f"; about {needed} judging images would decide" if needed else ""
        click.echo(f"advice: no step passes; the best is {best.name} ({best.status}){more}")
    click.echo(f"written: {', '.join(str(out / name) for name in (JSON, PICTURE, RECIPE))}")


def _draw(path: Path, advice: Advice, limit: float | None) -> None:
    """Draw each step's accuracy drop with its interval, and the largest drop that the gate allows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [f"{step.name} ({step.minutes:.1f} min, {step.size_bytes / 1e6:.2f} MB)" for step in advice.steps]
    figure = Figure(figsize=(7.2, 1.4 + 0.36 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, step in enumerate(advice.steps):
        low, high = step.drop_interval_points
        colour = {"pass": "tab:green", "fail": "tab:red"}.get(step.status, "tab:orange")
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot([step.drop_points], [place], "o", color=colour)
    axes.axvline(0.0, color="gray", linewidth=0.8)
    if limit is not None:
        axes.axvline(limit, color="black", linestyle="--", label=f"limit: {limit:g} points")
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1))
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(f"accuracy drop in points, {advice.images} judging images")
    figure.savefig(path, dpi=120)
