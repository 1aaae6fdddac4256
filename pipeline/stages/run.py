"""Runs each stage of a run and writes its directory, unless the stage is up to date."""

from __future__ import annotations

import contextlib
import platform
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from crqat.core import run_directory
from crqat.core.errors import CrqatError, ToolError, UsageError
from crqat.core.progress import Progress
from crqat.core.results.analysis import LayerAccuracy, Perturbation, PerturbationPayload, SensitivityPayload
from crqat.core.results.benchmark import BenchmarkPayload, Results, read_results
from crqat.core.results.engine import Engines
from crqat.core.results.export import ExportPayload
from crqat.core.results.training import TrainingPayload
from crqat.core.results.verdict import Judgement
from crqat.core.typed_json import read, text, to_json
from crqat.pipeline import console
from crqat.pipeline.recipe import recipe
from crqat.pipeline.stages import disk, lock, staleness, tracking

if TYPE_CHECKING:
    from crqat.core.results.verdict import Verdict
    from crqat.pipeline.gate.rules import GateConfig, KnownAccuracy
    from crqat.train.training.stage import Start

_Payload = TrainingPayload | ExportPayload | BenchmarkPayload | SensitivityPayload | PerturbationPayload
STATES = ".states"
RESULTS, JUNIT, REPORT, ENGINES = "results.json", "junit.xml", "report.html", "engine.json"
VERDICT = "verdict.json"
# Tolerance below the published accuracy of weights: another JPEG decoder or library version costs less than this.
PUBLISHED_POINTS = 5.0


def train(
    config: recipe.Recipe,
    runs: Path,
    force: bool,
    progress: Progress,
    restart: bool = False,
    save_every: float = 300.0,
    begin: Callable[[], None] | None = None,
    unchecked: bool = False,
) -> Path:
    """Run the `train` stage unless it is up to date, and return its directory.

    Args:
        config: The recipe.
        runs: The directory of all runs.
        force: Whether to run the stage even if it is up to date.
        progress: Callback for the progress over epochs.
        restart: Whether to ignore the saved state of an interrupted training of the same recipe.
        save_every: Seconds between two saved states of the training.
        begin: Callback before the training; not called if there is nothing to train.
        unchecked: Whether to skip the check that runs the untrained network through all stages; see
            `pipeline.stages.precheck`.
    """
    tracker = tracking.of_recipe(config, runs)
    inputs = staleness.inputs("train", config, runs, progress)
    root = staleness.data_root(config)
    data = disk.DiskState({}) if root is None else disk.disk_state(root, runs)
    # The directory is named by the key of everything that the result depends on, so another recipe never resumes it.
    states = runs / config.name / STATES / staleness.key_of("train", config, runs, inputs)[:16]
    if restart:
        shutil.rmtree(states, ignore_errors=True)

    def fill(out: Path) -> TrainingPayload:
        from crqat.train.training.stage import train as run_training

        def check(start: Start) -> None:
            from crqat.pipeline.stages import precheck

            precheck.before_training(config, progress, start)

        if begin is not None:
            begin()
        track = None
        if tracker is not None:
            tracker.forget("float", "qat", "train")
            track = tracker.epochs
        asked = recipe.train_config(config)
        return run_training(asked, out, progress, states, save_every, None if unchecked else check, track)

    def after() -> dict[str, str]:
        return staleness.data_after(config, runs, inputs, data)

    directory = run_stage("train", config, runs, force, inputs, fill, after)
    if tracker is not None:
        tracker.trained(directory)
    shutil.rmtree(states, ignore_errors=True)
    with contextlib.suppress(OSError):
        states.parent.rmdir()  # stays if it holds another recipe's states
    return directory


def export(config: recipe.Recipe, runs: Path, force: bool, progress: Progress, unsafe: bool = False) -> Path:
    """Run the `export` stage unless it is up to date, and return its directory.

    With `unsafe`, files that break their runtime's rules are written anyway, and the gate fails on them.
    """
    staleness.current(config, runs, "train")

    def fill(out: Path) -> ExportPayload:
        from crqat.export.stage import export as write_models

        training, revision = recipe.train_config(config), run_directory.git_revision(Path.cwd())
        directory = runs / config.name / "train"
        further = {"unsafe": True} if unsafe else {}
        return write_models(directory, training, config.export, out, progress, config.name, revision, **further)

    inputs = {**staleness.inputs("export", config, runs), **({"--unsafe": "yes"} if unsafe else {})}
    return run_stage("export", config, runs, force, inputs, fill)


def benchmark(config: recipe.Recipe, runs: Path, force: bool, progress: Progress) -> Path:
    """Run the `benchmark` stage unless it is up to date, and return its directory; a failed gate raises no error."""
    tracker = tracking.of_recipe(config, runs)  # reports a missing package before measuring
    staleness.current(config, runs, "export")

    def fill(out: Path) -> BenchmarkPayload:
        from crqat.runtime_eval.benchmark import benchmark as measure

        results = measure(runs / config.name / "export", config.benchmark, progress)
        return write_results(out, runs / config.name, "benchmark", results, config)

    # Another machine's figures do not apply to this one, and an engine is built as soon as a builder is installed.
    inputs = {"machine": platform.node(), **staleness.inputs("benchmark", config, runs)}
    directory = run_stage("benchmark", config, runs, force, inputs, fill)
    if tracker is not None and not tracker.has("benchmark"):  # the recipe has asked for a tracker since
        tracker.measured("benchmark", read_results(directory / RESULTS))
    return directory


def sensitivity(
    config: recipe.Recipe, runs: Path, force: bool, progress: Progress, average_bits: float, images: int
) -> Path:
    """Measure each layer's sensitivity to its bit width, propose bit widths, and return the stage's directory."""
    staleness.current(config, runs, "train")

    def fill(out: Path) -> SensitivityPayload:
        from crqat.pipeline.commands.mixed_precision import measure

        return measure(config, runs, out, progress, average_bits, images)

    asked = {"--average-bits": f"{average_bits:g}", "--images": str(images)}
    inputs = {**staleness.inputs("sensitivity", config, runs), **asked}
    return run_stage("sensitivity", config, runs, force, inputs, fill)


def perturbation(
    config: recipe.Recipe, runs: Path, force: bool, progress: Progress, draws: int, images: int | None
) -> Path:
    """Measure the robustness of the run's networks to noise, and return the directory with the results."""
    staleness.current(config, runs, "train")

    def fill(out: Path) -> PerturbationPayload:
        from crqat.pipeline.commands.perturbation import measure

        return measure(config, runs, out, progress, draws, images)

    asked = {"--draws": str(draws), "--images": "all" if images is None else str(images)}
    inputs = {**staleness.inputs("perturbation", config, runs), **asked}
    return run_stage("perturbation", config, runs, force, inputs, fill)


def judge(
    results: Results,
    limits: GateConfig,
    baseline: Results | None = None,
    known: KnownAccuracy | None = None,
) -> list[Verdict]:
    """Return the verdicts of all gate rules that apply, including `latency_regression`, which needs earlier results.

    Args:
        results: Results of a benchmark.
        limits: Limits of the recipe.
        baseline: Earlier results of the same files, for `gate.max_latency_regression`.
        known: Expected accuracy of the float model, if known.
    """
    from crqat.pipeline.gate import latency_regression as baselines
    from crqat.pipeline.gate import rules

    verdicts = rules.judge(results, limits, known)
    if limits.max_latency_regression is not None:
        verdicts += baselines.judge(results, baseline, limits.max_latency_regression)
    return verdicts


def known_accuracy(claimed: float | None, limits: GateConfig, run: Path) -> KnownAccuracy | None:
    """Return the accuracy that the float model is expected to have; None if no source gives one.

    Args:
        claimed: Value of the recipe's `model.accuracy`; None uses what the publisher of the weights reports.
        limits: Limits of the gate; `max_accuracy_drop` is the tolerance of a claimed accuracy.
        run: Directory of the run.
    """
    from crqat.pipeline.gate.rules import KnownAccuracy

    if claimed is not None:
        points = PUBLISHED_POINTS if limits.max_accuracy_drop is None else limits.max_accuracy_drop
        return KnownAccuracy(claimed, "model.accuracy", points)
    manifest = run_directory.read_manifest(run / "train")
    published = run_directory.payload_of(TrainingPayload, run / "train", manifest).float_network.published_accuracy
    return None if published is None else KnownAccuracy(published, "the publisher of the weights", PUBLISHED_POINTS)


def gate(config: recipe.Recipe, runs: Path, stage: str = "benchmark", baseline: Path | None = None) -> list[Verdict]:
    """Judge a benchmark's results, which must be intact and made from the current recipe and stages.

    Args:
        config: The recipe.
        runs: The directory of all runs.
        stage: Name of the benchmark stage, as `crqat.pipeline.stages.boards.stage_of` returns it.
        baseline: Earlier results.json for the recipe's `gate.max_latency_regression`.
    """
    from crqat.pipeline.gate.junit import junit

    if baseline is not None and config.gate.max_latency_regression is None:
        msg = f"--baseline {baseline}: the recipe does not limit latency; set gate.max_latency_regression, such as 1.1"
        raise UsageError(msg)
    manifest = staleness.current(config, runs, stage)
    directory = runs / config.name / stage
    results = read_results(directory / RESULTS)
    known = known_accuracy(config.model.accuracy, config.gate, runs / config.name)
    verdicts = judge(results, config.gate, None if baseline is None else read_results(baseline), known)
    if junit(verdicts, config.name) != (directory / JUNIT).read_text("utf-8"):
        # The limits have changed since: the same measurements are judged again.
        with lock.hold(runs / config.name), run_directory.write_stage(runs / config.name, manifest) as out:
            shutil.copytree(directory, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(run_directory.MANIFEST))
            _write_verdict(out, runs / config.name, stage, results, verdicts)
    return verdicts


def report(run: Path, out: Path, layers: bool, progress: Progress) -> None:
    """Write the report of a finished run, judged by the gate's limits in the manifest of its benchmark stage.

    Args:
        run: Directory of the run.
        out: Path of the HTML file.
        layers: Whether to measure and add the accuracy with one layer at a time quantized.
        progress: Callback for the progress over layers.

    Raises:
        UsageError: A stage is missing or damaged.
        ToolError: The file cannot be written.
    """
    from crqat.pipeline.gate import rules
    from crqat.pipeline.report.html import render

    for stage in staleness.STAGES:
        manifest = run_directory.verify_stage(run / stage)
        staleness.check_parent(run, manifest)
    results = read_results(run / "benchmark" / RESULTS)
    rows: list[LayerAccuracy] = []
    if layers:
        from crqat.export.analysis.layer_accuracy import accuracy_of_each_layer

        training = recipe.train_config(recipe.from_resolved(run_directory.read_manifest(run / "train").config))
        exported = run_directory.read_manifest(run / "export")
        candidate = run_directory.payload_of(ExportPayload, run / "export", exported).candidate
        rows = accuracy_of_each_layer(run / "train", training, candidate, progress)
    limits = rules.GateConfig(**manifest.config["gate"])
    verdicts = judge(results, limits, known=known_accuracy(manifest.config["model"].get("accuracy"), limits, run))
    page = render(run, results, verdicts, rows, _others(run, "benchmark"), _perturbation(run))
    try:
        out.write_text(page, "utf-8")
    except OSError as error:
        msg = f"{out}: cannot be written: {error.strerror}"
        raise ToolError(msg) from error


def write_results(out: Path, run: Path, stage: str, results: Results, config: recipe.Recipe) -> BenchmarkPayload:
    """Write the files of a `benchmark` stage into `out`, and return the summary for its manifest.

    The files hold the results, the gate's verdicts, the same verdicts as JUnit XML, and the HTML report.
    """
    if results.engines:
        (out / ENGINES).write_text(text(Engines(results.engines)))
    results = replace(results, engines={})
    (out / RESULTS).write_text(text(results))
    tracker = tracking.of_recipe(config, run.parent)
    if tracker is not None:
        tracker.measured(stage, results)
    known = known_accuracy(config.model.accuracy, config.gate, run)
    _write_verdict(out, run, stage, results, judge(results, config.gate, known=known))
    return BenchmarkPayload(results.device, sorted(results.models))


def _write_verdict(out: Path, run: Path, stage: str, results: Results, verdicts: list[Verdict]) -> None:
    """Write the files that depend on the verdicts into a benchmark's stage: JUnit XML, JSON and the report."""
    from crqat.pipeline.gate import rules
    from crqat.pipeline.gate.junit import junit
    from crqat.pipeline.report import html as report

    (out / JUNIT).write_text(junit(verdicts, run.name), "utf-8")
    (out / VERDICT).write_text(text(Judgement(rules.exit_code(verdicts), verdicts)), "utf-8")
    page = report.render(run, results, verdicts, others=_others(run, stage), perturbation=_perturbation(run))
    (out / REPORT).write_text(page, "utf-8")


def _perturbation(run: Path) -> Perturbation | None:
    """Return the accuracy under noise of the run's current training; None if it is missing, stale or damaged."""
    from crqat.pipeline.report.html import PERTURBATION

    directory = run / "perturbation"
    try:
        staleness.check_parent(run, run_directory.verify_stage(directory))
        return read(Perturbation, directory / PERTURBATION, "measure it again with --force")
    except CrqatError:
        return None


def _others(run: Path, own: str) -> list[Results]:
    """Return the results of the same export on other devices, without damaged ones and those of older exports."""
    found = []
    for path in sorted(run.glob("benchmark*")):
        if path.name == own:
            continue
        try:
            staleness.check_parent(run, run_directory.verify_stage(path))
            found.append(read_results(path / RESULTS))
        except CrqatError:
            continue
    return found


def run_stage(
    stage: str,
    config: recipe.Recipe,
    runs: Path,
    force: bool,
    inputs: dict[str, str],
    fill: Callable[[Path], _Payload],
    after: Callable[[], dict[str, str]] | None = None,
) -> Path:
    """Run a stage unless it is up to date, say why if it is run again, and return its directory.

    Args:
        stage: Name of the stage.
        config: The recipe.
        runs: The directory of all runs.
        force: Whether to run the stage even if it is up to date.
        inputs: What the result depends on besides the recipe and the previous stage: versions or hashes by name.
        fill: Function that writes the stage's files into a directory and returns the results for the manifest.
        after: Function that returns `inputs` anew; called after `fill`, if `fill` may create or complete the files of
            the data.
    """
    run, key = runs / config.name, staleness.key_of(stage, config, runs, inputs)
    directory = run / stage
    if directory.exists():
        reasons = ["--force was given"] if force else []
        with contextlib.suppress(*([CrqatError] if force else [])):  # --force replaces whatever exists
            made = run_directory.read_manifest(directory)
            if not force and made.key == key:
                run_directory.verify_stage(directory)
                console.say(f"{stage} is up to date")
                return directory
            reasons = staleness.why_again(config, runs, made, key, inputs) or reasons
        console.say(console.printable(f"{stage}: runs again, since {', '.join(reasons)}"))
    parent, environment = staleness.parent_hash(stage, config, runs), staleness.environment(config)
    manifest = run_directory.Manifest(stage, key, parent, recipe.resolved(config), environment, inputs=inputs)
    with run_directory.write_stage(run, manifest) as out:
        manifest.payload = to_json(fill(out))
        manifest.environment["device"] = manifest.payload.get("device", "cpu")
        if after is not None:
            manifest.inputs = after()
            manifest.key = staleness.key_of(stage, config, runs, manifest.inputs)
    return directory
