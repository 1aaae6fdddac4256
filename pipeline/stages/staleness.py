"""Tracks what each stage of a run depends on: keys of the recipe, the previous stage, files and versions."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from crqat.core import run_directory
from crqat.core.errors import UsageError
from crqat.core.field_bounds import user_path
from crqat.core.progress import Progress, quiet
from crqat.pipeline import console
from crqat.pipeline.recipe import recipe
from crqat.pipeline.stages import changes, disk, imports
from crqat.pipeline.stages.changes import DATA, FILE, VERSION
from crqat.train.config import FILE_SOURCES, is_onnx_file, source_kind
from crqat.train.models import untrusted_onnx

STAGES = ("train", "export", "benchmark")
PARENTS = {"train": None, "export": "train", "benchmark": "export", "sensitivity": "train", "perturbation": "train"}
# The recipe keys that a stage's result depends on; the previous stage covers its own keys.
KEYS = {
    "train": (
        "seed",
        "targets",
        "device",
        "compile",
        "data",
        "model",
        "float",
        "quantization",
        "qat",
        "consistency",
        "ptq",
    ),
    "export": ("name", "export"),
    "benchmark": ("benchmark",),
    "sensitivity": ("name",),
    "perturbation": ("name",),
}
# Keys of a section that only the gate reads.
_JUDGED = {"model": ("accuracy",)}
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
# Libraries that compute a stage's result; those that a recipe brings in are added.
_LIBRARIES = {
    "train": ("torch", "nncf"),
    "export": ("torch", "onnx", *_RUNTIMES),
    "benchmark": _RUNTIMES,
    "sensitivity": ("torch", "nncf"),
    "perturbation": ("torch", "nncf"),
}
_LIBRARIES_OF_SOURCE = {
    "digits": ("scikit-learn",),
    "cifar10": ("torchvision",),
    "cifar100": ("torchvision",),
    "imagefolder": ("pillow",),
    "imagelist": ("pillow",),
    "webdataset": ("pillow",),
    "huggingface": ("pillow", "datasets"),
}
_LIBRARIES_OF_MODEL = {
    "cifar/resnet18": ("torchvision",),
    "cifar/mobilenet_v2": ("torchvision",),
    "torchvision": ("torchvision",),
    "timm": ("timm",),
}
OLD = "made by an older crqat that did not record the versions and data it depends on; `crqat run` makes it again"
_DISTRIBUTIONS = (
    "crqat-edge",
    "torch",
    "torchvision",
    "nncf",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "numpy",
    "tensorrt",
    "tensorrt-rtx",
    "tensorrt-rtx-cu13",
)


def kind(stage: str) -> str:
    """Return the name of a stage without its device: "benchmark" for "benchmark@DEVICE"."""
    return stage.partition("@")[0]


def current(config: recipe.Recipe, runs: Path, stage: str) -> run_directory.Manifest:
    """Check that a stage is intact and was made from this recipe and the current previous stages; return its manifest.

    The stage must also have been made with the current data and files and, on the machine where it was made, with the
    current library versions. Data and files that are not on this machine are not compared. For a stage of an older
    crqat, which recorded none of these, a note is printed instead.

    Raises:
        UsageError: The stage is not current; the message names the stage to run.
    """
    run = runs / config.name
    manifest, values = run_directory.verify_stage(run / stage), recipe.resolved(config)
    made = {key: recipe.completed(key, manifest.config.get(key)) for key in KEYS[kind(stage)]}
    changed = [key for key, value in made.items() if _computed_from(key, value) != _computed_from(key, values[key])]
    if changed:
        msg = (
            f"{run / stage}: made with another `{changed[0]}` than this recipe's; "
            f"run `crqat {run_directory.command(stage)}` first, with the same recipe and --set"
        )
        raise UsageError(msg)
    check_parent(run, manifest)
    if manifest.inputs is None:
        console.say(f"{run / stage}: {OLD}")
    else:
        check_inputs(config, runs, manifest, run / stage)
    parent = PARENTS[kind(stage)]
    if parent is not None:
        current(config, runs, parent)
    return manifest


def check_inputs(config: recipe.Recipe, runs: Path, manifest: run_directory.Manifest, directory: Path) -> None:
    """Check that a stage was made with the current data, files and versions.

    Raises:
        UsageError: Data, a file or a version has changed; the message lists the differences.
    """
    again = run_directory.command(manifest.stage)
    here = inputs(manifest.stage, config, runs, missing_ok=True)
    there = {
        name: value
        for name, value in (manifest.inputs or {}).items()
        if name.startswith(VERSION) or (name.startswith((FILE, DATA)) and here.get(name, disk.ABSENT) != disk.ABSENT)
    }
    if manifest.environment.get("machine") != platform.node():
        # This machine's versions do not apply to results of another machine.
        here, there = (
            {name: value for name, value in side.items() if not name.startswith(VERSION)} for side in (here, there)
        )
    found = changes.of_inputs(there, {name: value for name, value in here.items() if value != disk.ABSENT})
    if found:
        msg = f"{directory}: stale, since {', '.join(found)}; run `crqat {again}` again"
        raise UsageError(msg)


def check_parent(run: Path, manifest: run_directory.Manifest) -> None:
    """Check that a stage was made from the current version of the previous stage.

    Raises:
        UsageError: The previous stage was made again since.
    """
    if kind(manifest.stage) not in PARENTS:
        msg = f"{run}: holds a stage {manifest.stage}, which crqat does not have; was it copied from elsewhere?"
        raise UsageError(msg)
    parent = PARENTS[kind(manifest.stage)]
    if parent is None:
        return
    run_directory.read_manifest(run / parent)
    if manifest.parent != run_directory.manifest_hash(run / parent):
        again = run_directory.command(manifest.stage)
        msg = f"{run / manifest.stage}: stale, made from an older {parent}; run `crqat {again}` again"
        raise UsageError(msg)


def inputs(
    stage: str, config: recipe.Recipe, runs: Path, progress: Progress = quiet, missing_ok: bool = False
) -> dict[str, str]:
    """Return what a stage's result depends on besides recipe and previous stage: versions, files and data, by name.

    Args:
        stage: Name of the stage.
        config: The recipe.
        runs: Directory of all runs, where hashes are stored.
        progress: Callback for the progress of reading data.
        missing_ok: Whether to leave out missing files instead of raising an error.

    Raises:
        UsageError: A file that the recipe names is missing.
        ToolError: A file cannot be read.
    """
    found = {f"{VERSION}{name}": version for name, version in versions(stage, config).items()}
    if stage != "train":
        return found
    for path, key, fix in recipe_files(config):
        if path.is_file():
            found[f"{FILE}{path}"] = run_directory.sha256_file(path)
        elif not missing_ok:
            msg = f"{path}: {key}; {fix}" if fix else f"{path}: {key}"
            raise UsageError(msg)
    for name, path in own_modules(config).files.items():
        found[f"{FILE}{name}"] = run_directory.sha256_file(path)
    root = data_root(config)
    if root is not None:
        found[f"{DATA}{root}"] = str(disk.disk_state(root, runs, progress))
    others = (
        [] if config.data.unlabeled_root is None else [user_path(config.data.unlabeled_root, "data.unlabeled_root")]
    )
    if config.data.image_list is not None:
        from crqat.train.data import imagelist

        others += imagelist.outside(user_path(config.data.image_list, "data.image_list"))
    for folder in others:
        found[f"{DATA}{folder}"] = str(disk.disk_state(folder, runs, progress))
    return found


def recipe_files(config: recipe.Recipe) -> list[tuple[Path, str, str]]:
    """Return (path, problem, fix) for each file that a recipe names; the words are for the error if it is missing."""
    files = []
    if is_onnx_file(config.model.name):
        path = user_path(config.model.name, "model.name")
        # Names of further files in the ONNX file are checked as those of an untrusted file.
        beside = untrusted_onnx.files_beside(path) if path.is_file() else []
        wrong = f"no such ONNX file (model.name, relative to {Path.cwd()})"
        files += [(file, wrong, "") for file in (path, *beside)]
    if config.model.weights not in (None, "pretrained"):
        path = user_path(config.model.weights, "model.weights")
        files.append((path, f"no such weights file (model.weights, relative to {Path.cwd()})", ""))
    if config.data.image_list is not None:
        path = user_path(config.data.image_list, "data.image_list")
        files.append((path, "no such file (data.image_list)", "write it by `crqat quantize`"))
    if config.model.nncf is not None:
        folder = user_path(config.model.nncf, "model.nncf")
        found = [path for path in sorted(folder.glob("*")) if path.suffix in (".safetensors", ".json")] or [folder]
        wrong = "no such folder, or nothing in it (model.nncf)"
        files += [(path, wrong, "make it by `crqat nncf import`") for path in found]
    return files


def own_modules(config: recipe.Recipe) -> imports.Imports:
    """Return the user's own modules that define the functions named in a recipe, and all modules that they import.

    The modules are found by reading their source files; none is imported.
    """
    files: dict[str, Path] = {}
    packages: frozenset[str] = frozenset()
    methods = config.quantization.weight_method, config.quantization.activation_method
    network = "" if is_onnx_file(config.model.name) else config.model.name
    for name in (config.data.source, config.data.unlabeled, network, *methods):
        module, colon, _ = (name or "").partition(":")
        if colon and source_kind(name) != "huggingface":
            found = imports.imports_of(module)
            files |= found.files
            packages |= found.packages
    return imports.Imports(files, packages)


def data_root(config: recipe.Recipe) -> Path | None:
    """Return `data.root` if the files in it must be hashed: image files, or files that a user's data function reads.

    Otherwise None is returned. CIFAR's files need no hash: they are compared with published hashes when they are read.
    """
    kinds = {source_kind(name) for name in (config.data.source, config.data.unlabeled)}
    hashed = bool(kinds & set(FILE_SOURCES)) or any(name is not None and ":" in name for name in kinds)
    return user_path(config.data.root, "data.root") if hashed and config.data.root is not None else None


def data_after(config: recipe.Recipe, runs: Path, before: dict[str, str], state: disk.DiskState) -> dict[str, str]:
    """Return the inputs of a training after its data was read, which may have created or completed the data's files.

    Args:
        config: The recipe.
        runs: The directory of all runs.
        before: Inputs of the stage before the data was read.
        state: Files of the data folder before the data was read.
    """
    root = data_root(config)
    if root is None:
        return before
    now = disk.disk_state(root, runs)
    by_function = any(":" in (source_kind(name) or "") for name in (config.data.source, config.data.unlabeled))
    if now != state and (not state.files or (by_function and now.holds(state))):
        return {**before, f"{DATA}{root}": str(now)}
    return before


def versions(stage: str, config: recipe.Recipe) -> dict[str, str]:
    """Return the version of each library that computes a stage's result; empty for a stage that ran on a board."""
    if "@" in stage:
        return {}
    names = list(_LIBRARIES[stage])
    found: dict[str, str] = {}
    if stage == "train":
        for source in (config.data.source, config.data.unlabeled):
            names += _LIBRARIES_OF_SOURCE.get(source_kind(source) or "", ())
        names += _LIBRARIES_OF_MODEL.get(config.model.name, ())
        if not is_onnx_file(config.model.name):  # a user's folder may be called timm
            names += _LIBRARIES_OF_MODEL.get(config.model.name.partition("/")[0], ())
        found |= imports.versions(own_modules(config).packages)
    if stage == "benchmark" and (config.benchmark.openvino or "openvino" in config.benchmark.require):
        names.append("openvino")
    if stage in ("export", "benchmark"):
        from crqat.runtime_eval.trt import versions as tensorrt_api

        builder = tensorrt_api.choose()
        if builder is not None:
            found[builder] = tensorrt_api.installed(builder) or ""
    return dict(sorted((found | _installed(names)).items()))


def _installed(names: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def why_again(
    config: recipe.Recipe, runs: Path, manifest: run_directory.Manifest, key: str, now: dict[str, str]
) -> list[str]:
    """Return in plain words why an existing stage must be run again; empty if it is up to date.

    Args:
        config: The recipe.
        runs: The directory of all runs.
        manifest: Manifest of the existing stage.
        key: Hash of everything that the stage would depend on now; see `key_of`.
        now: Versions and hashes that the stage would depend on now; see `inputs`.
    """
    if manifest.key == key:
        return []
    reasons = []
    values = recipe.resolved(config)
    for name in KEYS[kind(manifest.stage)]:
        old = _computed_from(name, recipe.completed(name, manifest.config.get(name)))
        reasons += changes.of_recipe(name, old, _computed_from(name, values[name]))
    if manifest.parent != parent_hash(manifest.stage, config, runs):
        reasons.append(f"{PARENTS[kind(manifest.stage)]} was made again")
    recorded = manifest.environment.get("versions")
    old, new = (recorded if isinstance(recorded, dict) else {}).get("crqat-edge"), metadata.version("crqat-edge")
    if old != new:
        reasons.append(f"crqat-edge {old} -> {new}")
    if manifest.inputs is None:
        return [*reasons, f"it was {OLD.partition(';')[0]}"]
    return [*reasons, *changes.of_inputs(manifest.inputs, now)] or ["its key has changed"]


def _computed_from(key: str, value: Any) -> Any:
    """Return a section of a recipe without the keys that only the gate reads."""
    left_out = _JUDGED.get(key, ())
    return {name: entry for name, entry in value.items() if name not in left_out} if isinstance(value, dict) else value


def environment(config: recipe.Recipe) -> dict[str, Any]:
    """Return the environment for a manifest: library versions, git revision, platform, machine name and seed."""
    return {
        "versions": {**_installed(_DISTRIBUTIONS), "python": platform.python_version()},
        "git_revision": run_directory.git_revision(Path.cwd()),
        "platform": platform.platform(),
        "machine": platform.node(),
        "seed": config.seed,
    }


def parent_hash(stage: str, config: recipe.Recipe, runs: Path) -> str | None:
    """Return the hash of the previous stage's manifest; None for the first stage."""
    parent = PARENTS[kind(stage)]
    return None if parent is None else run_directory.manifest_hash(runs / config.name / parent)


def key_of(stage: str, config: recipe.Recipe, runs: Path, inputs: dict[str, str]) -> str:
    """Return one hash of all that a stage's result depends on: crqat's version, recipe, previous stage, `inputs`."""
    values = recipe.resolved(config)
    return run_directory.hash_json(
        {
            "config": {name: _computed_from(name, values[name]) for name in KEYS[kind(stage)]},
            "parent": parent_hash(stage, config, runs),
            "version": metadata.version("crqat-edge"),
            "inputs": inputs,
        }
    )
