"""`crqat.export` and `crqat.verify`: write and verify the files of a network from the user's own training loop."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from crqat.core import targets as runtimes
from crqat.core.errors import UsageError, VerificationError
from crqat.core.grid import grids_hash
from crqat.core.preprocessing import Preprocessing, checked_bytes
from crqat.core.results.export import Claim, ExportedModel, ExportPayload
from crqat.core.results.verification import Verification
from crqat.core.run_directory import Manifest, git_revision, write_directory
from crqat.core.typed_json import to_json
from crqat.export.config import ExportConfig
from crqat.export.to_onnx import Quantized
from crqat.export.verification import checks
from crqat.export.write_models import METADATA_SCHEMA, make_file, write_models
from crqat.train.arguments import checked
from crqat.train.distributed import unwrapped
from crqat.train.quantized_model import FLOAT_WEIGHTS, QuantizedModel

Images = Tensor | npt.NDArray[np.uint8] | npt.NDArray[np.float32]


@dataclass(frozen=True)
class Export:
    """Files that `crqat.export` wrote, and their verification.

    Attributes:
        directory: Directory with the files, the expected codes of a few images, and manifest.json with the SHA-256 of
            each.
        files: Path of each file by target; "float" and "float16" are the baselines.
        verification: Result of the verification, by target.
        findings: Rules of the runtime that a file breaks, by target; empty unless `unsafe` was set.
        claims: Whether the file stores a trained Grid exactly, by target and quantized edge.
        macs: Multiply-accumulates of one image, by INT8 operation.
        float_layers: Multiply-accumulates of one image, by layer that `crqat.quantize` was asked to keep in float.
        preprocessing: Preprocessing stored in the files.
        config: Settings of the export.
        model: The finalized network of the files, on the CPU, in eval mode.
    """

    directory: Path
    files: Mapping[str, Path]
    verification: Mapping[str, Verification]
    findings: Mapping[str, Sequence[str]]
    claims: Mapping[str, Mapping[str, Claim]] = field(repr=False)
    macs: Mapping[str, int] = field(repr=False)
    float_layers: Mapping[str, int] = field(repr=False)
    preprocessing: Preprocessing = field(repr=False)
    config: ExportConfig = field(repr=False)
    model: QuantizedModel = field(repr=False)

    def __str__(self) -> str:
        """Return one line for each file."""
        return "\n".join(f"{path}: {self._said(target)}" for target, path in self.files.items())

    def _said(self, target: str) -> str:
        if target not in self.verification:
            return "the float network"
        verified = self.verification[target]
        return (
            f"verification {verified.status}, {verified.differing_codes} of {verified.codes} codes differ on "
            f"{verified.images} images"
        )


def export(
    model: nn.Module,
    out: str | Path,
    *,
    images: Images,
    preprocessing: Preprocessing,
    class_names: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    tensorrt_precision: Literal["float16", "float32"] = "float16",
    tensorrt_weights: Literal["int8", "float"] = "int8",
    unsafe: bool = False,
) -> Export:
    """Finalize a quantized network, and write and verify the files of its targets together with the float baseline.

    Args:
        model: Network that `crqat.quantize` or `crqat.load` returned, trained or not; for an EMA teacher, its
            `teacher.model`. DistributedDataParallel and torch.compile wrappers are unwrapped. The network is not
            changed.
        out: The directory. It is written completely or not at all; a directory of an earlier export is replaced.
        images: Images for the verification: bytes before normalization, uint8 of shape [N, C, H, W]. 32 are enough;
            none of them should be a test image.
        preprocessing: Mean and std, in units of 0..1, of your own normalization; they are stored in each file.
        class_names: One name for each logit; None numbers them.
        targets: A subset of the targets that the network was quantized for; None takes all of them.
        tensorrt_precision: Type of all operations in tensorrt.onnx that are not INT8.
        tensorrt_weights: How tensorrt.onnx stores weights; see `crqat.export.config.ExportConfig.weights`.
        unsafe: Write files even if they break a rule or fail verification; see `findings` and `verification`.

    Returns:
        The export; `crqat.benchmark` measures it.

    Raises:
        VerificationError: A file does not compute the network's codes, or could not be verified.
        UsageError: The network was not made by `crqat.quantize`, the images have another type or shape, a file breaks a
            rule of its runtime, or `out` holds files that this function did not write.
        ToolError: The directory cannot be written.
    """
    out, inner = Path(out), _unwrapped(model)
    quantized = _finalized(inner, preprocessing(checked_bytes(images, preprocessing)))
    config = checked(
        ExportConfig(
            targets=_targets(quantized.model, targets),
            tensorrt_precision=tensorrt_precision,
            weights=tensorrt_weights,
            allow_lossy=True,  # the verification reports losses
        ),
        {"weights": "tensorrt_weights"},
    )
    classes = quantized.graph.classes
    names = [str(index) for index in range(classes)] if class_names is None else [str(name) for name in class_names]
    if len(names) != classes:
        msg = f"class_names: {len(names)} names for the {classes} logits of the network; give one for each"
        raise UsageError(msg)
    mean, std = (tuple(map(float, values)) for values in (preprocessing.mean, preprocessing.std))
    preprocessing = replace(preprocessing, mean=mean, std=std)  # arrays and lists become JSON, too
    metadata = {
        "crqat.schema_version": METADATA_SCHEMA,
        "crqat.run": out.name,
        "crqat.preprocessing": json.dumps(to_json(preprocessing), sort_keys=True),
        "crqat.class_names": json.dumps(names),
        "crqat.grids_sha256": grids_hash(quantized.grids),
        "crqat.git_revision": git_revision(Path.cwd()),
    }
    manifest = Manifest("export", "", None, {}, {"torch": torch.__version__, "onnx": onnx.__version__})
    with write_directory(out, manifest) as folder:
        entries = write_models(quantized, folder, config, metadata, unsafe=True)
        own = {entry.target: entry for entry in entries if entry.verification is not None}
        if not unsafe:
            for entry in own.values():
                _refuse(entry)
        payload = ExportPayload(
            run=out.name,
            models=entries,
            class_names=names,
            grids_sha256=metadata["crqat.grids_sha256"],
            preprocessing=preprocessing,
        )
        manifest.payload = to_json(payload)
    first = next(iter(own.values()))
    return Export(
        directory=out,
        files={entry.target: out / entry.file for entry in entries},
        verification={target: entry.verification for target, entry in own.items() if entry.verification is not None},
        findings={target: tuple(entry.findings or ()) for target, entry in own.items()},
        claims={target: entry.claims for target, entry in own.items()},
        macs=first.macs or {},
        float_layers={} if first.float_layers is None else first.float_layers.macs,
        preprocessing=preprocessing,
        config=config,
        model=quantized.model,
    )


def verify(
    model_or_files: nn.Module | Export, images: Images, preprocessing: Preprocessing | None = None
) -> dict[str, Verification]:
    """Check that each target's file computes equal codes in torch, in the integer simulator and in ONNX Runtime.

    The codes of different targets' files are compared in the simulator. No other runtime, such as TensorRT, is run.

    Args:
        model_or_files: A quantized network, whose files are then made in memory; or an `Export`, whose files are read
            from disk.
        images: Network inputs, float32 of shape [N, C, H, W]; or bytes before normalization, uint8.
        preprocessing: Mean and std of the images; needed if `images` are bytes and the first argument is a network. An
            `Export` holds its own preprocessing.

    Returns:
        Results by target. A failed verification is returned, not raised.

    Raises:
        UsageError: See `export`.
    """
    if not isinstance(model_or_files, Export):
        quantized = _finalized(_unwrapped(model_or_files), _normalized(images, preprocessing))
        files = {name: make_file(quantized, name, ExportConfig()) for name in quantized.model.targets}
    else:
        given = model_or_files
        stored = {name: onnx.load(given.files[name]) for name in given.verification}
        quantized = _finalized(given.model, _normalized(images, given.preprocessing))
        files = {name: replace(make_file(quantized, name, given.config), model=model) for name, model in stored.items()}
    return checks.verify(quantized.model, quantized.grids, files, quantized.images)


def _refuse(entry: ExportedModel) -> None:
    """Raise an error if a file breaks a rule of its runtime or failed its verification."""
    if entry.findings:
        count, first = len(entry.findings), entry.findings[0]
        msg = f"{entry.file} breaks {count} rules, first: {first}; unsafe=True writes it anyway"
        raise UsageError(msg)
    verified = entry.verification
    if verified is not None and not verified.passed:
        msg = (
            f"{entry.file}: verification on {verified.images} images {verified.status}; nothing was written, "
            "unsafe=True writes it anyway"
        )
        raise VerificationError(msg)


def _targets(model: QuantizedModel, asked: Sequence[str] | None) -> tuple[str, ...]:
    """Return the targets to write files for."""
    if asked is None:
        return model.targets
    own = model.targets
    for target in [asked] if isinstance(asked, str) else asked:
        runtimes.get(target)
        if target not in own:
            msg = f"targets: the network was quantized for {', '.join(own)}; add {target} to crqat.quantize's targets"
            raise UsageError(msg)
    return (asked,) if isinstance(asked, str) else tuple(asked)


def _normalized(images: Images, preprocessing: Preprocessing | None) -> npt.NDArray[np.float32]:
    """Return network inputs: float32 images unchanged, bytes normalized."""
    array = np.asarray(images.detach().cpu() if isinstance(images, Tensor) else images)
    if array.dtype == np.float32 and array.ndim == 4 and len(array):
        return array
    if preprocessing is None:
        msg = (
            f"images: {array.dtype} of shape {list(array.shape)}; expected normalized images, float32 of shape "
            "[N, C, H, W] with N >= 1, or bytes with preprocessing=crqat.Preprocessing(mean, std)"
        )
        raise UsageError(msg)
    return preprocessing(checked_bytes(array, preprocessing))


def _unwrapped(model: nn.Module) -> QuantizedModel:
    """Return the quantized network inside wrappers such as DistributedDataParallel; refuse any other network."""
    inner = unwrapped(model) if isinstance(model, nn.Module) else model
    if not isinstance(inner, QuantizedModel) or FLOAT_WEIGHTS not in inner.meta:
        hint = "; of a teacher give teacher.model" if hasattr(model, "model") else ""
        msg = f"model: a {type(inner).__name__}; expected what crqat.quantize or crqat.load made{hint}"
        raise UsageError(msg)
    return inner


def _finalized(inner: QuantizedModel, normalized: npt.NDArray[np.float32]) -> Quantized:
    """Return what the exporter takes: a copy of the network, its Grids, and the given images.

    The copy is on the CPU, in eval mode, and finalized: its scales are values that every target can store.
    """
    expected = inner.meta["input_shape"]
    if list(normalized.shape[1:]) != expected:
        msg = f"images: shape {list(normalized.shape)}; the network was quantized with images of shape {expected}"
        raise UsageError(msg)
    own = copy.deepcopy(inner).cpu().eval().requires_grad_(False)
    own.to(memory_format=torch.contiguous_format)
    own.finalize()
    return Quantized(own, own.grids(), normalized)
