"""The `check` command: identifies a run directory or a file and checks whether it is intact."""

from __future__ import annotations

from pathlib import Path

from crqat.core import run_directory
from crqat.core.errors import UsageError
from crqat.core.grid import grids_hash, load_grids
from crqat.core.progress import Progress, quiet
from crqat.pipeline.console import printable


def check(path: Path, overrides: tuple[str, ...] = (), syntax: bool = False, progress: Progress = quiet) -> list[str]:
    """Check that a run directory or a file is intact, and return lines of text that describe its contents.

    Args:
        path: Run directory or file.
        overrides: "key.path=value" texts that replace values of a recipe, as in --set.
        syntax: Whether to check only the keys and values of a recipe, not its data and network.
        progress: Callback for the progress of the checks.

    Raises:
        UsageError: The directory or file is damaged, or of a kind that crqat does not know.
    """
    if path.is_dir():
        lines = _check_directory(path)
    elif not path.exists():
        msg = f"{path}: no such file or directory"
        raise UsageError(msg)
    elif path.suffix in (".yaml", ".yml"):
        lines = _check_recipe(path, overrides, syntax, progress)
    elif path.suffix == ".onnx":
        lines = [*_check_onnx(path), *_check_hash(path)]
    elif path.name.endswith("grids.json"):
        grids = load_grids(path)
        lines = [f"{path}: {len(grids)} Grids, hash {grids_hash(grids)}", *_check_hash(path)]
    elif path.name == "results.json":
        lines = [*_check_results(path), *_check_hash(path)]
    else:
        msg = f"{path}: not a run directory, a recipe (.yaml), an .onnx file, grids.json or results.json"
        raise UsageError(msg)
    return [printable(line) for line in lines]


def _check_directory(path: Path) -> list[str]:
    from crqat.pipeline.recipe import recipe
    from crqat.pipeline.stages import staleness

    if (path / run_directory.MANIFEST).is_file():
        manifest = run_directory.verify_stage(path)
        return [_describe(path, manifest)]
    found = [stage for stage in staleness.STAGES if (path / stage).exists()]
    found += sorted(device.name for device in path.glob("benchmark@*"))
    if not found:
        msg = f"{path}: not a run directory: it has none of {', '.join(staleness.STAGES)}"
        raise UsageError(msg)
    lines = []
    for stage in found:
        manifest = run_directory.verify_stage(path / stage)
        if manifest.stage != stage:
            msg = f"{path / stage}: its manifest is of the stage {manifest.stage}; was the directory renamed or copied?"
            raise UsageError(msg)
        staleness.check_parent(path, manifest)
        lines.append(_describe(path / stage, manifest))
        if manifest.inputs is None:
            lines.append(f"{path / stage}: {staleness.OLD}")
        else:
            config = recipe.from_resolved(manifest.config)
            staleness.check_inputs(config, path.parent, manifest, path / stage)
    return lines


def _describe(directory: Path, manifest: run_directory.Manifest) -> str:
    """Return one line that describes a stage whose files were verified."""
    environment = manifest.environment
    versions = environment.get("versions")
    version = versions.get("crqat-edge", "unknown") if isinstance(versions, dict) else "unknown"
    return (
        f"{directory}: stage {manifest.stage}, {len(manifest.files)} files intact, "
        f"made by crqat {version} at revision {environment.get('git_revision', 'unknown')}"
    )


def _check_hash(path: Path) -> list[str]:
    """Compare a file's SHA-256 with the manifest next to it; return no line if no manifest lists the file."""
    if not (path.parent / run_directory.MANIFEST).is_file():
        return []
    manifest = run_directory.read_manifest(path.parent)
    if path.name not in manifest.files:
        return []
    if run_directory.sha256_file(path) != manifest.files[path.name]:
        msg = f"{path}: altered or damaged: its SHA-256 is not that in the manifest; run the stage again with --force"
        raise UsageError(msg)
    return [f"{path}: matches the manifest next to it"]


def _check_recipe(path: Path, overrides: tuple[str, ...], syntax: bool, progress: Progress) -> list[str]:
    from crqat.pipeline.recipe import recipe

    config = recipe.load(path, overrides)
    lines = [f"{path}: recipe {config.name} is valid, for {', '.join(config.targets)}"]
    if not syntax:
        from crqat.pipeline.stages import precheck

        lines += [f"{path}: untrained: {line}" for line in precheck.check_recipe(config, progress)]
    return lines


def _check_results(path: Path) -> list[str]:
    from crqat.core.results.benchmark import read_results

    results = read_results(path)
    models = [f"{path}: {file}: {model.target}, {model.status}" for file, model in results.models.items()]
    return [f"{path}: results of run {results.run}, {len(models)} models", *models]


def _check_onnx(path: Path) -> list[str]:
    from crqat.train.models import untrusted_onnx

    model = untrusted_onnx.read(path)
    untrusted_onnx.check(path, model)
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), "unknown")
    operators = [node.op_type for node in model.graph.node]
    lines = [
        f"{path}: ONNX opset {opset}, {len(operators)} nodes, "
        f"{operators.count('QuantizeLinear')} QuantizeLinear, {operators.count('DequantizeLinear')} DequantizeLinear"
    ]
    return lines + [f"{path}: {entry.key}: {_short(entry.value)}" for entry in model.metadata_props]


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:197]}..."
