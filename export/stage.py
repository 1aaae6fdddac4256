"""The `export` stage: writes the ONNX files of a finished training, their verification, and images to measure with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from crqat.core.errors import UsageError
from crqat.core.grid import grids_hash, load_grids
from crqat.core.progress import Progress
from crqat.core.results.export import ExportPayload
from crqat.core.results.training import TrainingPayload
from crqat.core.run_directory import payload_of, verify_stage
from crqat.core.typed_json import to_json
from crqat.export.analysis.layers import layer_summaries
from crqat.export.analysis.sqnr import quantizer_noise
from crqat.export.config import ExportConfig
from crqat.export.to_onnx import Quantized
from crqat.export.write_models import METADATA_SCHEMA, write_models
from crqat.train.config import TrainConfig
from crqat.train.data import sources
from crqat.train.data.batches import Images
from crqat.train.data.split import split_of
from crqat.train.load_trained import rebuild
from crqat.train.models.published import data_section

_CHUNK = 256


def export(
    train_dir: Path,
    train: TrainConfig,
    config: ExportConfig,
    out: Path,
    progress: Progress,
    run: str,
    git_revision: str,
    unsafe: bool = False,
) -> ExportPayload:
    """Run the `export` stage: write, verify and describe the ONNX files of a finished training in `out`.

    Args:
        train_dir: A finished train stage; its hashes are verified first.
        train: The training configuration in the run's recipe.
        config: Which files to write.
        out: Empty directory.
        progress: Reports files and checks.
        run: The run's name.
        git_revision: Revision of the code, for the files' metadata.
        unsafe: Write files even if they break a rule, and record the broken rules as "findings" of their entries.

    Returns:
        The manifest's payload.

    Raises:
        UsageError: A target cannot represent an edge's Grid and `export.allow_lossy` is not set, or a file breaks a
            rule and `unsafe` is not set.
    """
    trained = payload_of(TrainingPayload, train_dir, verify_stage(train_dir))
    candidate = trained.best if config.candidate == "best" else config.candidate
    if candidate not in trained.candidates:
        msg = f"export.candidate: the training has no {candidate}, only {', '.join(trained.candidates)}"
        if candidate == "teacher":
            msg += "; set consistency.teacher: ema, or candidate: best"
        raise UsageError(msg)
    model = rebuild(train_dir, train, trained, candidate)
    grids = load_grids(train_dir / f"{candidate}.grids.json")
    preprocessing = trained.preprocessing
    metadata = {
        "crqat.schema_version": METADATA_SCHEMA,
        "crqat.run": run,
        "crqat.preprocessing": json.dumps(to_json(preprocessing), sort_keys=True),
        "crqat.class_names": json.dumps(trained.class_names),
        "crqat.grids_sha256": grids_hash(grids),
        "crqat.git_revision": git_revision,
    }
    dataset = sources.of_recipe(data_section(train), progress, in_memory=False)
    chosen = split_of(dataset.train_labels, train.data, train.seed).validation[: config.verify_images]
    quantized = Quantized(model, grids, preprocessing(dataset.train_images[chosen].numpy()))
    config = replace(config, targets=config.targets or train.targets)
    entries = write_models(quantized, out, config, metadata, progress, unsafe)
    _write_images(out / "images.npy", dataset.test_images)
    np.save(out / "labels.npy", dataset.test_labels.numpy())
    steps = len(config.targets or ()) + 2
    progress("export", steps, steps, f"{len(dataset.test_labels)} test images")
    noise = quantizer_noise(model, quantized.images)
    return ExportPayload(
        run=run,
        images="images.npy",
        labels="labels.npy",
        models=entries,
        class_names=trained.class_names,
        grids_sha256=metadata["crqat.grids_sha256"],
        candidate=candidate,
        training=trained,
        noise=noise,
        layers=layer_summaries(quantized.graph, quantized.specs, noise),
    )


def _write_images(path: Path, images: Images) -> None:
    """Write images as .npy, uint8 of shape [N, C, H, W], in pieces: test images may not fit into memory."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=tuple(images.shape))
    for start in range(0, len(images), _CHUNK):
        array[start : start + _CHUNK] = images[start : start + _CHUNK].numpy()
    array.flush()
