"""What each stage of a run depends on: its recipe's keys, the stage before it, files and versions."""

from __future__ import annotations

import contextlib
import platform
from importlib import machinery, metadata
from pathlib import Path
from typing import Any

from artifacts import store
from artifacts.config import user_path
from artifacts.errors import UsageError
from artifacts.folders import walk
from crqat_train.config import FILE_SOURCES, source_kind
from pipeline import recipe

STAGES = ("train", "export", "benchmark")
PARENTS = {"train": None, "export": "train", "benchmark": "export", "sensitivity": "train"}
# The keys of a recipe that a stage's result depends on; the stage before it brings in its own.
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
    ),
    "export": ("name", "export"),
    "benchmark": ("benchmark",),
    "sensitivity": ("name",),
}
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
    """Of a stage's name: benchmark@DEVICE is a benchmark."""
    return stage.partition("@")[0]


def current(config: recipe.Recipe, runs: Path, stage: str) -> store.Manifest:
    """The manifest of a stage that is intact and follows from this recipe and from the current stages before it.

    Raises:
        UsageError: It is not; the message names the stage to run.
    """
    run = runs / config.name
    manifest, values = store.verify_stage(run / stage), recipe.resolved(config)
    made = {key: recipe.completed(key, manifest.config.get(key)) for key in KEYS[kind(stage)]}
    changed = [key for key, value in made.items() if value != values[key]]
    if changed:
        msg = (
            f"{run / stage}: made with another `{changed[0]}` than this recipe's; "
            f"run `crqat {store.command(stage)}` first, with the same recipe and --set"
        )
        raise UsageError(msg)
    check_parent(run, manifest)
    parent = PARENTS[kind(stage)]
    if parent is not None:
        current(config, runs, parent)
    return manifest


def check_parent(run: Path, manifest: store.Manifest) -> None:
    """Check that a stage was made from the current version of the stage before it.

    Raises:
        UsageError: It was made from an older one.
    """
    if kind(manifest.stage) not in PARENTS:
        msg = f"{run}: holds a stage {manifest.stage}, which is none of crqat's; was it copied from elsewhere?"
        raise UsageError(msg)
    parent = PARENTS[kind(manifest.stage)]
    if parent is None:
        return
    store.read_manifest(run / parent)
    if manifest.parent != store.manifest_hash(run / parent):
        again = store.command(manifest.stage)
        msg = f"{run / manifest.stage}: stale, made from an older {parent}; run `crqat {again}` again"
        raise UsageError(msg)


def input_files(config: recipe.Recipe) -> dict[str, str]:
    """SHA-256 of the files that a recipe names: weights and the user's own modules, found without importing them.

    Of stored images it is the hash of names, sizes and times; CIFAR's files are checked where they are read.

    Raises:
        UsageError: The weights are not there.
    """
    hashes = {}
    if config.model.weights not in (None, "pretrained"):
        path = user_path(config.model.weights, "model.weights")
        if not path.is_file():
            msg = f"{path}: no such weights file (model.weights, relative to {Path.cwd()})"
            raise UsageError(msg)
        hashes[config.model.weights] = store.sha256_file(path)
    if config.model.nncf is not None:
        folder = user_path(config.model.nncf, "model.nncf")
        files = [path for path in sorted(folder.glob("*")) if path.suffix in (".safetensors", ".json")]
        if not files:
            msg = f"{config.model.nncf}: no such folder, or nothing in it (model.nncf); make it by `crqat nncf import`"
            raise UsageError(msg)
        hashes |= {str(path): store.sha256_file(path) for path in files}
    stored = {source_kind(name) for name in (config.data.source, config.data.unlabeled)} & set(FILE_SOURCES)
    fetched = config.data.download and stored == {"huggingface"}  # not there yet when the stage begins
    if stored and config.data.root is not None and not fetched:
        hashes["data.root"] = folder_state(user_path(config.data.root, "data.root"))
    for name in (config.data.source, config.data.unlabeled, config.model.name):
        module, colon, _ = (name or "").partition(":")
        path_found = module_file(module) if colon else None
        if path_found is not None:
            hashes[module] = store.sha256_file(path_found)
    return hashes


def folder_state(root: Path) -> str:
    """SHA-256 of every file's relative path, size and time of change below a folder: cheap, and no content is read."""
    lines = []
    for parent, names, _, _ in walk(root):
        for name in names:
            path = parent / name
            with contextlib.suppress(OSError):  # who reads the images says what is wrong with it
                status = path.stat()
                lines.append(f"{path.relative_to(root)}\0{status.st_size}\0{status.st_mtime_ns}")
    return store.hash_json(sorted(lines))


def module_file(module: str) -> Path | None:
    """The file of a module, found without importing it; None if there is none."""
    search, spec = None, None
    # Each part by itself: by its full name a folder without __init__.py is only found below an imported one.
    for part in module.split("."):
        spec = machinery.PathFinder.find_spec(part, search)
        if spec is None:
            return None
        search = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    return Path(spec.origin) if spec and spec.origin and Path(spec.origin).is_file() else None


def environment(config: recipe.Recipe) -> dict[str, Any]:
    """What a result may depend on beside the recipe."""
    versions = {}
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "versions": {**versions, "python": platform.python_version()},
        "git_revision": store.git_revision(Path.cwd()),
        "platform": platform.platform(),
        "machine": platform.node(),
        "seed": config.seed,
    }


def parent_hash(stage: str, config: recipe.Recipe, runs: Path) -> str | None:
    """Hash of the manifest of the stage before; None of the first."""
    parent = PARENTS[kind(stage)]
    return None if parent is None else store.manifest_hash(runs / config.name / parent)


def key_of(stage: str, config: recipe.Recipe, runs: Path, inputs: dict[str, str]) -> str:
    """Hash of everything that a stage's result depends on."""
    values = recipe.resolved(config)
    return store.hash_json(
        {
            "config": {name: values[name] for name in KEYS[kind(stage)]},
            "parent": parent_hash(stage, config, runs),
            "version": metadata.version("crqat-edge"),
            "inputs": inputs,
        }
    )
