"""The `benchmark` stage on a board: runs it over ssh, writes an archive to run by hand, or stores results from one."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crqat.core import run_directory
from crqat.core.errors import UsageError
from crqat.core.progress import Progress
from crqat.core.results.benchmark import BenchmarkPayload, Results
from crqat.core.typed_json import read
from crqat.pipeline.recipe import recipe
from crqat.pipeline.stages import staleness
from crqat.pipeline.stages.run import run_stage, write_results

if TYPE_CHECKING:
    from crqat.runtime_eval.board.ssh import Board


def benchmark_on(
    board: Board, config: recipe.Recipe, runs: Path, force: bool, progress: Progress, clean: bool = False
) -> Path:
    """Run the `benchmark` stage on a board unless it is up to date, and return its directory.

    Args:
        board: Board to measure on.
        config: The recipe.
        runs: The directory of all runs.
        force: Whether to measure again even if this machine or the board has valid results.
        progress: Callback for the progress that the board reports.
        clean: Whether to remove the copied files from the board after the results arrived.
    """
    from crqat.runtime_eval.board import bundle as bundles
    from crqat.runtime_eval.board import ssh

    staleness.current(config, runs, "export")
    # The recipe's current benchmark settings, which may have changed since the export.
    contents = bundles.describe(runs / config.name / "export", asdict(config.benchmark), metadata.version("crqat-edge"))

    def fill(out: Path) -> BenchmarkPayload:
        results = ssh.measure(board, *contents, force, progress)
        payload = write_results(out, runs / config.name, stage_of(board), results, config)
        return replace(payload, on=board.address, bundle=contents[0].sha256)

    inputs = {"machine": board.address, "python": board.python}
    directory = run_stage(stage_of(board), config, runs, force, inputs, fill)
    if clean:
        ssh.clean(board, contents[0], progress)
    return directory


def carried(config: recipe.Recipe, runs: Path, file: Path) -> str:
    """Store a results file that the user copied from a board as a stage of the run, and return the stage's name.

    Args:
        config: The recipe.
        runs: The directory of all runs.
        file: File that `python3 -m runtime_eval .` wrote on the board. The name of the stage is "benchmark@" followed
            by the name of the file without its suffix.

    Raises:
        UsageError: The file is not a results file, or was measured with another export or other settings than those of
            the recipe.
    """
    staleness.current(config, runs, "export")
    results = read(Results, file, "bring it from the board again")
    stage = f"benchmark@{re.sub(r'[^A-Za-z0-9_.-]', '_', file.stem)}"
    if results.parent != staleness.parent_hash(stage, config, runs):
        export = runs / config.name / "export"
        msg = f"{file}: parent: the results are of another export than {export}; make the bundle again and measure it"
        raise UsageError(msg)
    asked, measured = json.loads(json.dumps(asdict(config.benchmark))), asdict(results.config)
    different = [key for key in asked if measured[key] != asked[key]]
    if different:
        key = different[0]
        msg = (
            f"{file}: config.{key}: measured with {measured.get(key)}, but the recipe says {asked[key]}; "
            f"set benchmark.{key}, or make the bundle again and measure it"
        )
        raise UsageError(msg)

    def fill(out: Path) -> BenchmarkPayload:
        payload = write_results(out, runs / config.name, stage, results, config)
        return replace(payload, on=file.stem, bundle=results.bundle)

    run_stage(stage, config, runs, False, {"--results": run_directory.sha256_file(file)}, fill)
    return stage


def stage_of(board: Board | None) -> str:
    """Return the name of the benchmark stage: "benchmark@NAME" for a board, "benchmark" for this machine (None)."""
    return "benchmark" if board is None else f"benchmark@{board.name}"


def bundle(run: Path, out: Path | None) -> tuple[Path, str, dict[str, Any]]:
    """Write an archive with which a board can measure a finished export.

    Args:
        run: Directory of the run.
        out: Path of the archive; None writes NAME-bundle.tar.gz in the current directory.

    Returns:
        The path of the archive, the SHA-256 of the bundle, and the settings of the benchmark.

    Raises:
        UsageError: The export is missing, damaged or stale.
        ToolError: The archive cannot be written.
    """
    from crqat.runtime_eval.board import bundle as bundles

    manifest = run_directory.read_manifest(run / "export")
    staleness.check_parent(run, manifest)
    how = manifest.config.get("benchmark", {})
    made, paths = bundles.describe(run / "export", how, metadata.version("crqat-edge"))
    archive = out or Path(f"{made.run}-bundle.tar.gz")
    bundles.write(made, paths, archive)
    return archive, made.sha256, made.benchmark
