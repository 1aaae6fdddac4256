"""Writes the ONNX files of a quantized network for its targets, checked and verified, and the float baselines."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import torch

from crqat.core import targets as runtimes
from crqat.core.errors import UsageError
from crqat.core.progress import Progress, quiet
from crqat.core.results.export import ExportedModel
from crqat.export.config import ExportConfig
from crqat.export.graph.from_torch import marked_graph
from crqat.export.graph.macs import split_macs
from crqat.export.graph.onnx_graph import Graph
from crqat.export.qdq.lint import lint
from crqat.export.qdq.write import QDQModel, float_model
from crqat.export.to_onnx import Quantized
from crqat.export.verification.checks import REFUSED, verify
from crqat.export.verification.expected_codes import expected_codes
from crqat.export.verification.fusion import fusion
from crqat.train.quantized_model import FLOAT_WEIGHTS, take_float_weights

METADATA_SCHEMA = "1"


def write_models(
    quantized: Quantized,
    out: Path,
    config: ExportConfig,
    metadata: Mapping[str, str],
    progress: Progress = quiet,
    unsafe: bool = False,
) -> list[ExportedModel]:
    """Write all files of a network; each is verified before it is written.

    Args:
        quantized: The finalized network, its Grids, and the normalized images for the verification. The
            `meta["float_weights"]` of its model are the weights of the float baseline.
        out: Empty directory.
        config: Which files to write; targets None takes those of the network.
        metadata: Metadata of all files; each file adds its target.
        progress: Reports files and checks.
        unsafe: Write files even if they break a rule, and record the broken rules as "findings" of their entries.

    Returns:
        An entry for each file, the baselines first. A target's entry has MACs, verification, fusion, findings, and
        claims, which state for each edge whether the file stores its Grid exactly. A failed verification is recorded,
        not raised.

    Raises:
        UsageError: See `refuse`.
    """
    targets = config.targets or quantized.model.targets
    precisions = {target: _precision(target, config) for target in targets}
    steps = len(targets) + 2
    files: dict[str, QDQModel] = {}
    findings: dict[str, list[str]] = {}
    for target in targets:
        files[target] = make_file(quantized, target, config, metadata)
        findings[target] = [str(finding) for finding in lint(files[target].model, target)]
        refuse(files[target], target, config.allow_lossy, [] if unsafe else findings[target])
        progress("export", len(files), steps, f"{target}.onnx")
    baselines = {"float": "float32"}
    if "float16" in precisions.values():
        baselines["float16"] = "float16"
    graph = _float_graph(quantized)
    for name, kind in baselines.items():
        onnx.save(float_model(graph, {**metadata, "crqat.target": name}, kind), out / f"{name}.onnx")
    verified = verify(quantized.model, quantized.grids, files, quantized.images)
    progress("export", steps - 1, steps, "; ".join(f"{name}: {found.status}" for name, found in verified.items()))
    node_macs, in_float = split_macs(quantized.graph)
    entries = [ExportedModel(f"{name}.onnx", name) for name in baselines]
    for name, file in files.items():
        onnx.save(file.model, out / f"{name}.onnx")
        runs = runtimes.get(name).not_run is None and not verified[name].status.startswith(REFUSED)
        codes = f"{name}.codes.npz"
        entries.append(
            ExportedModel(
                file=f"{name}.onnx",
                target=name,
                precision=precisions[name],
                claims=file.claims(),
                macs=node_macs,
                float_layers=in_float,
                verification=verified[name],
                fusion=fusion(file.model) if runs else None,
                findings=findings[name],
                expected_codes=codes if runs and expected_codes(file, quantized.images, out / codes) else None,
            )
        )
    return entries


def make_file(
    quantized: Quantized, target: str, config: ExportConfig, metadata: Mapping[str, str] | None = None
) -> QDQModel:
    """Return a target's ONNX model in memory, written as the `export` configuration states."""
    weights = config.weights if runtimes.get(target).float_weights else "int8"
    return quantized.file(target, _precision(target, config), metadata, weights)


def _precision(target: str, config: ExportConfig) -> str:
    return runtimes.get(target).float_type(config.tensorrt_precision)


def _float_graph(quantized: Quantized) -> Graph:
    """Return the graph of the float network; training and `ptq` change the weights of the quantized one."""
    own = quantized.model.state_dict()
    if all(torch.equal(own[name].cpu(), tensor) for name, tensor in quantized.model.meta[FLOAT_WEIGHTS].items()):
        return quantized.graph  # calibration alone leaves the weights as they are
    model = copy.deepcopy(quantized.model)
    take_float_weights(model)
    return marked_graph(model, quantized.graph.input_shape, quantized.graph.classes)


def refuse(file: QDQModel, target: str, allow_lossy: bool, findings: Sequence[str]) -> None:
    """Refuse a file that breaks its runtime's rules, or has lossy Grids although `allow_lossy` is False.

    Raises:
        UsageError: The message names the first broken rule or lossy Grid, and the fix.
    """
    if findings:
        msg = (
            f"{target}.onnx breaks {len(findings)} rules, first: {findings[0]}; crqat export --unsafe writes it anyway"
        )
        raise UsageError(msg)
    lossy = {edge: claim for edge, claim in file.claims().items() if claim.claim == "lossy"}
    if lossy and not allow_lossy:
        edge, claim = next(iter(lossy.items()))
        msg = f"export.targets: {target} cannot hold {len(lossy)} trained Grids, first {edge} ({claim.note}); "
        raise UsageError(msg + f"add {target} to `targets` and train again, or set export.allow_lossy: true")
