"""Plans the training runs of a study, and reads and writes its results."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from itertools import zip_longest
from pathlib import Path
from typing import Any

from crqat.core.errors import ToolError, UsageError
from crqat.core.results.study import StudyResults, StudyRow
from crqat.core.run_directory import sha256_file
from crqat.core.typed_json import read, text
from crqat.pipeline.recipe import recipe
from crqat.pipeline.study import report
from crqat.pipeline.study.methods import BEST, FLOAT_SHARE, TRAININGS, needed, settings

# The settings that formed the rows' keys when the first rows were published. A setting that was added later is part of
# a key only if it differs from its default, which leaves a training as it was before: rows stay valid when keys are
# added.
_FIRST = {
    "consistency": "ema_decay ramp_up teacher temperature weight",
    "data": (
        "channels convert crop crop_padding download flip image_column interpolation label_column "
        "labeled mean root size source std strong unlabeled unlabeled_ratio unlabeled_root validation"
    ),
    "float": "batch_size consistency epochs fine_tune lr precision strong weight_decay",
    "model": "accuracy name nncf weights weights_key",
    "qat": (
        "batch_size bn_images damping epochs freeze_bn_at freeze_ranges_at lr precision progressive_bits "
        "scale_lr sync_bn weight_decay"
    ),
    "quantization": (
        "activation_method activations calibration calibration_images first_layer float_layers "
        "last_layer overrides weight_method weights"
    ),
}
# Trainings from whose float network others start.
STARTS = {training.start for training in TRAININGS.values()}
_SECTIONS = ("data", "model", "float", "quantization", "qat", "consistency", "ptq")


@dataclass(frozen=True)
class Job:
    """One training run with one seed, number of labels and bit width.

    Attributes:
        training: Name of the training, a key of `TRAININGS`.
        seed: Seed of the recipe.
        labels: Number of labeled images; None for all.
        bits: Bit width of weights and activations; None for the bit widths of the recipe.
        equal: What all training runs of a comparison have equally much of: "steps", or (approximately) "time".
        overrides: Changes to the recipe, as `--set` writes them. The path of the float weights of `start` is not among
            them; it is added when the run starts.
        key: Hash of everything that the result depends on.
        name: Name of the run's directory.
        start: Name of the run whose float network it starts from; None if it trains its own.
        lineage: Names of the runs whose float weights it descends from, beginning with the training "float". If others
            start from this run, its own name is the last.
    """

    training: str
    seed: int
    labels: int | None
    bits: int | None
    equal: str
    overrides: tuple[str, ...]
    key: str
    name: str
    start: str | None
    lineage: tuple[str, ...]


@dataclass
class Study:
    """A study: the recipe, its options and the results so far.

    Attributes:
        path: Path of the recipe.
        overrides: Changes to the recipe for every training, as `--set` writes them.
        out: The Markdown file; JSON and picture lie next to it.
        runs: Directory of the runs.
        rows: Results so far, one for each method, seed, number of labels and bit width.
    """

    path: Path
    overrides: tuple[str, ...]
    out: Path
    runs: Path
    rows: list[StudyRow] = field(default_factory=list)

    def plan(
        self, methods: tuple[str, ...], seeds: Sequence[int], labels: Sequence[int | None],
        bits: Sequence[int | None], equal: str,
    ) -> list[Job]:  # fmt: skip
        """Return all training runs, each after the one that it starts from.

        Raises:
            UsageError: The recipe is invalid with the settings of a training; a method is unknown; or `equal` is "time"
                and the results of equal steps, whose times it needs, are missing.
        """
        jobs: list[Job] = []
        names = needed(methods)
        for count in labels:
            for width in bits:
                cell = [f"data.labeled={'null' if count is None else count}"]
                cell += [] if width is None else [f"quantization.weights={width}", f"quantization.activations={width}"]
                for seed in seeds:
                    own: dict[str, Job] = {}
                    for name in names:
                        own[name] = self._job(name, seed, count, width, equal, tuple(cell), own)
                    jobs += own.values()
        return jobs

    def _job(
        self, name: str, seed: int, labels: int | None, bits: int | None, equal: str, cell: tuple[str, ...],
        others: dict[str, Job],
    ) -> Job:  # fmt: skip
        base = recipe.load(self.path, [*self.overrides, *cell])
        factor = self._factor(name, labels, bits) if equal == "time" else 1.0
        given = [*self.overrides, *cell, f"seed={seed}", *settings(name, base, factor)]
        if labels is None and base.data.unlabeled is None and "data.unlabeled=null" not in given:
            given.append(f"data.unlabeled={base.data.source}")  # the labeled images themselves
        start = TRAININGS[name].start
        behind = None if start is None else others[start]
        # The place of the weights does not matter, only their content.
        checked = [*given, *([] if behind is None else ["model.weights=start.safetensors"])]
        resolved = recipe.resolved(recipe.load(self.path, checked))
        found = {key: hashed(key, resolved[key]) for key in _SECTIONS}
        wanted = {"seed": resolved["seed"], **{key: value for key, value in found.items() if value != {}}}
        text = json.dumps([wanted, None if behind is None else behind.key], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        run = f"{name.replace('+', '-')}-{key[:8]}"
        lineage = (*(() if behind is None else behind.lineage), *((run,) if name in STARTS else ()))
        return Job(
            name, seed, labels, bits, equal, tuple(given), key, run, None if behind is None else behind.name, lineage
        )  # fmt: skip

    def _factor(self, name: str, labels: int | None, bits: int | None) -> float:
        """Return the factor on the number of steps with which a training run takes as long as plain QAT."""
        training = TRAININGS[name]
        if training.start is None:
            return 1.0

        def seconds(of: str) -> float:
            cell = of, labels, bits, "steps"
            found = [row.seconds for row in self.rows if (row.training, row.labels, row.bits, row.equal) == cell]
            if not found:
                msg = f"--equal time: needs the times of {of}; run the same study with --equal steps first"
                raise UsageError(msg)
            return sum(found) / len(found)

        own = seconds(name) + (seconds(training.start) if training.start != "float" else 0.0)
        share = FLOAT_SHARE if training.steps < 1 else 1.0
        return share * seconds("qat") / own

    def done(self, job: Job) -> bool:
        """Return whether the study has a result of this training run that descends from the weights it keeps."""
        return any(row.key == job.key and not self.replaced(job, row) for row in self.rows)

    def replaced(self, job: Job, row: StudyRow) -> list[Path]:
        """Return the files in the lineage of a training run that have other weights than its result descends from."""
        pairs = zip_longest(job.lineage, self.lineage(job), row.lineage, fillvalue="")
        return [self.weights(name) for name, present, before in pairs if present not in ("", before)]

    def weights(self, name: str) -> Path:
        """Return the path of the float weights that the run `name` left for others to start from.

        They lie next to the results, in a folder of the same name, so that a study that resumes on another machine
        compares all methods from one float network.
        """
        return self.out.with_suffix("") / f"{name}.safetensors"

    def lineage(self, job: Job) -> list[str]:
        """Return the `StudyRow.lineage` of a training run; it has "" for weights that the study does not keep yet."""
        files = [self.weights(name) for name in job.lineage]
        return [sha256_file(file)[:16] if file.is_file() else "" for file in files]

    def add(self, job: Job, result: dict[str, Any]) -> None:
        """Add the results of a training run to `rows`; they replace those of the same method, seed, labels, bits."""
        training, networks = TRAININGS[job.training], result["networks"]
        for method, network in training.methods.items():
            if network == BEST:
                network = max(("student", "teacher"), key=lambda name: float(networks[name]["validation"]))
            row = StudyRow(
                labels=job.labels,
                bits=job.bits,
                seed=job.seed,
                equal=job.equal,
                method=method,
                training=job.training,
                network=network,
                start=training.start,
                views=training.views,
                unlabeled=training.unlabeled,
                seconds=result["seconds"],
                n=result["n"],
                key=job.key,
                lineage=self.lineage(job),
                **networks[network],
            )
            self.rows = [*(old for old in self.rows if old.place != row.place), row]


def hashed(section: str, values: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return those values of a recipe's section from which the key of a training run is hashed.

    Keys that recipes got after the first published studies are left out while they have their default, so that the
    results of those studies stay valid.

    Args:
        section: Name of the section.
        values: Values of the section; None, for a null section, is returned as None.
    """
    if values is None:
        return None
    first, usual = _FIRST.get(section, "").split(), recipe.completed(section, {})
    kept = {key: value for key, value in values.items() if key in first or value != usual.get(key)}
    if section == "float":
        kept["consistency"] = hashed("consistency", values["consistency"])
    return kept


def load(path: Path, overrides: tuple[str, ...], out: Path, runs: Path) -> Study:
    """Return a study with the results that the JSON next to `out` already holds.

    Raises:
        UsageError: The JSON was not written by a study; or `out` has no suffix, so the folder of the float networks
            would have the same name.
        ToolError: The JSON cannot be read.
    """
    if not out.suffix:
        msg = f"--out: {out} has no suffix; name a Markdown file, such as {out}.md"
        raise UsageError(msg)
    study, file = Study(path, overrides, out, runs), out.with_suffix(".json")
    if file.is_file():
        study.rows = read(StudyResults, file, "name another --out").rows
    return study


def write(study: Study) -> None:
    """Write the results of a study as a Markdown page, a picture and JSON.

    Raises:
        ToolError: A file cannot be written.
    """
    results = StudyResults(
        recipe=recipe.resolved(recipe.load(study.path, study.overrides)),
        machine=f"{platform.machine()}, {os.cpu_count()} CPUs",
        versions={name: metadata.version(name) for name in ("torch", "nncf")},
        rows=study.rows,
    )
    file = study.out.with_suffix(".json")
    try:
        study.out.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".json.partial")
        partial.write_text(text(results))
        partial.replace(file)
        study.out.write_text(report.markdown(study.rows, study.out.stem))
        report.picture(study.rows, study.out.with_suffix(".png"))
    except OSError as error:
        msg = f"{error.filename or study.out}: cannot be written: {error.strerror}"
        raise ToolError(msg) from error
