"""The `export` stage: a finished training becomes ONNX files, the proof of them, and the images to measure them on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from crqat.core import targets as runtimes
from crqat.core.errors import UsageError
from crqat.core.grid import grids_hash, load_grids
from crqat.core.preprocessing import Preprocessing
from crqat.core.progress import Progress
from crqat.core.run_directory import verify_stage
from crqat.export.analysis.sqnr import quantizer_noise
from crqat.export.config import ExportConfig
from crqat.export.graph.from_torch import marked_graph
from crqat.export.graph.onnx_graph import split_macs
from crqat.export.qdq.lint import lint
from crqat.export.qdq.write import QDQModel, float_model, qdq_model
from crqat.export.verification.expected_codes import expected_codes
from crqat.export.verification.links import REFUSED, fusion, verify
from crqat.train.config import TrainConfig
from crqat.train.data import sources
from crqat.train.data.batches import Images
from crqat.train.data.split import split as split_images
from crqat.train.load_trained import rebuild, take_float_weights
from crqat.train.models.published import data_section
from crqat.train.quantizers.calibration import rounded_weights

METADATA_SCHEMA = "1"
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
) -> dict[str, Any]:
    """Run the stage and fill `out`.

    Args:
        train_dir: A finished train stage; its hashes are verified first.
        train: The recipe it was trained by.
        config: What to write.
        out: Empty directory.
        progress: Told of files and checks.
        run: The run's name.
        git_revision: For the files' metadata.
        unsafe: Write files that break a rule, too, and record what they break as "findings" of their entries.

    Returns:
        The manifest's payload: one entry for each file with its claims, fusion and verification.

    Raises:
        UsageError: An edge cannot keep its Grid on a target without `export.allow_lossy`, or a file breaks a rule and
            `unsafe` is not set.
    """
    trained = verify_stage(train_dir).payload
    targets = config.targets or train.targets
    precisions = {target: runtimes.get(target).float_type(config.tensorrt_precision) for target in targets}
    candidate = trained["best"] if config.candidate == "best" else config.candidate
    if candidate not in trained["candidates"]:
        msg = f"export.candidate: the training has no {candidate}, only {', '.join(trained['candidates'])}"
        if candidate == "teacher":
            msg += "; set consistency.teacher: ema, or candidate: best"
        raise UsageError(msg)
    model = rebuild(train_dir, train, trained, candidate)
    specs = model.specs
    grids = load_grids(train_dir / f"{candidate}.grids.json")
    latent = rounded_weights(model)
    preprocessing = Preprocessing.from_json(trained["preprocessing"])
    metadata = {
        "crqat.schema_version": METADATA_SCHEMA,
        "crqat.run": run,
        "crqat.preprocessing": json.dumps(trained["preprocessing"]),
        "crqat.class_names": json.dumps(trained["class_names"]),
        "crqat.grids_sha256": grids_hash(grids),
        "crqat.git_revision": git_revision,
    }
    shape, classes = trained["input_shape"], len(trained["class_names"])
    graph = marked_graph(model, shape, classes)
    node_macs, in_float = split_macs(graph)
    steps = 2 + len(targets)
    exported: dict[str, QDQModel] = {}
    findings: dict[str, list[str]] = {}
    for target in targets:
        exported[target] = qdq_model(
            graph,
            specs,
            grids,
            latent,
            target,
            precisions[target],
            {**metadata, "crqat.target": target},
            config.weights if runtimes.get(target).float_weights else "int8",
        )
        findings[target] = [str(finding) for finding in lint(exported[target].model, target)]
        refuse(exported[target], target, config.allow_lossy, [] if unsafe else findings[target])
        progress("export", len(exported), steps, f"{target}.onnx")
    dataset = sources.of_recipe(data_section(train), progress)
    # The baseline is the float network as it was before quantization, not the latent weights behind the quantizers.
    model_float = rebuild(train_dir, train, trained, candidate)
    take_float_weights(model_float, train_dir)
    float_graph = marked_graph(model_float, shape, classes)
    baselines = {"float": "float32"}
    if "float16" in precisions.values():
        baselines["float16"] = "float16"
    for name, kind in baselines.items():
        baseline = float_model(float_graph, {**metadata, "crqat.target": name}, kind)
        onnx.save(baseline, out / f"{name}.onnx")
    chosen = split_images(len(dataset.train_labels), train.data.validation, train.seed).validation[
        : config.verify_images
    ]
    verified = preprocessing(dataset.train_images[chosen].numpy())
    proof = verify(model, grids, exported, verified)
    noise = quantizer_noise(model, verified)
    progress("export", steps - 1, steps, "; ".join(f"{name}: {entry['status']}" for name, entry in proof.items()))
    entries: list[dict[str, Any]] = [{"file": f"{name}.onnx", "target": name} for name in baselines]
    for name, file in exported.items():
        executed = runtimes.get(name).not_run is None
        onnx.save(file.model, out / f"{name}.onnx")
        refused = proof[name]["status"].startswith(REFUSED)
        entries.append(
            {
                "file": f"{name}.onnx",
                "target": name,
                "precision": precisions[name],
                "claims": file.claims(),
                "macs": node_macs,
                "float_layers": in_float,
                "verification": proof[name],
                "fusion": fusion(file.model) if executed and not refused else None,
                "findings": findings[name],
            }
        )
        codes = f"{name}.codes.npz"
        if executed and not refused and expected_codes(file, verified, out / codes):
            entries[-1]["expected_codes"] = codes
    _write_images(out / "images.npy", dataset.test_images)
    np.save(out / "labels.npy", dataset.test_labels.numpy())
    progress("export", steps, steps, f"{len(dataset.test_labels)} test images")
    return {
        "run": run,
        "images": "images.npy",
        "labels": "labels.npy",
        "class_names": trained["class_names"],
        "grids_sha256": metadata["crqat.grids_sha256"],
        "candidate": candidate,
        "training": trained,
        "noise": noise,
        "models": entries,
    }


def _write_images(path: Path, images: Images) -> None:
    """uint8 of shape [N, C, H, W] as .npy, in pieces: test images may not fit into memory."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=tuple(images.shape))
    for start in range(0, len(images), _CHUNK):
        array[start : start + _CHUNK] = images[start : start + _CHUNK].numpy()
    array.flush()


def refuse(file: QDQModel, target: str, allow_lossy: bool, findings: Sequence[str]) -> None:
    """Refuse a file that breaks its runtime's rules, or holds a Grid with a loss that nobody allowed."""
    if findings:
        msg = (
            f"{target}.onnx breaks {len(findings)} rules, first: {findings[0]}; "
            "crqat export --unsafe writes it all the same"
        )
        raise UsageError(msg)
    lossy = {edge: claim for edge, claim in file.claims().items() if claim["claim"] == "lossy"}
    if lossy and not allow_lossy:
        edge, claim = next(iter(lossy.items()))
        msg = f"export.targets: {target} cannot hold {len(lossy)} trained Grids, first {edge} ({claim['note']}); "
        raise UsageError(msg + f"add {target} to `targets` and train again, or set export.allow_lossy: true")
