"""Summary of an export in its manifest, which the benchmark stage reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from crqat.core.preprocessing import Preprocessing
from crqat.core.results.benchmark import FloatLayers
from crqat.core.results.training import TrainingPayload
from crqat.core.results.verification import Fusion, Verification
from crqat.core.typed_json import OMIT, OMIT_EMPTY


@dataclass(frozen=True)
class Claim:
    """Statement of an exported file on whether it holds the trained Grid (scale, zero point and range) of one edge.

    Attributes:
        claim: "exact" if the file holds the Grid unchanged, "lossy" if its format cannot.
        note: What was lost or changed.
        bias_error: For a weight: largest error of its layer's bias, in real units.
    """

    claim: Literal["exact", "lossy"]
    note: str | None = field(default=None, metadata=OMIT)
    bias_error: float | None = field(default=None, metadata=OMIT)


@dataclass(frozen=True)
class ExportedModel:
    """One exported file; a float file has only a name and a target.

    Attributes:
        file: Name of the file in the export's directory.
        target: Target that the file was written for, "float" or "float16".
        precision: Type of the operations that are not INT8, "float32" or "float16".
        claims: How the file holds the trained Grid of each edge, by the edge's name.
        macs: Multiply-accumulates of each Conv and Gemm node that should run in INT8, by node name.
        float_layers: Layers that the recipe keeps in float.
        verification: Result of the verification, which compares the integer codes of file and integer simulator.
        fusion: Operations that ONNX Runtime fused; None for a file for another runtime.
        findings: Violations of the runtime's rules; None for a float file.
        expected_codes: Name of the file with the codes that a CPU should compute.
    """

    file: str
    target: str
    precision: str | None = field(default=None, metadata=OMIT)
    claims: dict[str, Claim] = field(default_factory=dict, metadata=OMIT_EMPTY)
    macs: dict[str, int] | None = field(default=None, metadata=OMIT)
    float_layers: FloatLayers | None = field(default=None, metadata=OMIT)
    verification: Verification | None = field(default=None, metadata=OMIT)
    fusion: Fusion | None = field(default=None, metadata=OMIT)
    findings: list[str] | None = field(default=None, metadata=OMIT)
    expected_codes: str | None = field(default=None, metadata=OMIT)


@dataclass(frozen=True)
class LayerSummary:
    """Summary of one Conv, ConvTranspose, Gemm or MatMul of the trained network.

    Attributes:
        layer: Name of the layer.
        operation: ONNX operator type.
        macs: Number of multiply-accumulates for one image.
        products: Mean number of products that each output sums.
        weight_bits: Bit width of the weight or second operand; None if it is float.
        input_bits: Bit width of the input or first operand; None if it is float.
        weight_snr: Signal-to-noise ratio of the quantized weight in dB; None if quantization changes nothing.
        input_snr: Signal-to-noise ratio of the quantized input in dB; None if quantization changes nothing.
        reason: Why the layer is float, if the recipe gives a reason.
    """

    layer: str
    operation: str
    macs: int
    products: int
    weight_bits: int | None
    input_bits: int | None
    weight_snr: float | None
    input_snr: float | None
    reason: str = ""


@dataclass(frozen=True)
class ExportPayload:
    """Summary of an export in its manifest.

    Attributes:
        run: Name of the run.
        models: The float file or files, then one file for each target.
        images: Name of the file with the test images, uint8 [N, C, H, W]; empty if they are not exported.
        labels: Name of the file with the class of each test image, int64 [N].
        class_names: Class names in the order of the logits.
        grids_sha256: SHA-256 of the exported Grids.
        candidate: Name of the exported network: "student", "teacher" or "calibrated".
        training: Summary of the training run that was exported; None for a network that crqat did not train.
        preprocessing: Preprocessing of the images, if `training` is None.
        noise: Signal-to-noise ratio of each quantizer, dB; None for one that changes nothing.
        layers: Summary of each layer, in the order of computation.
    """

    run: str
    models: list[ExportedModel]
    images: str = ""
    labels: str = ""
    class_names: list[str] = field(default_factory=list)
    grids_sha256: str | None = None
    candidate: str = ""
    training: TrainingPayload | None = None
    preprocessing: Preprocessing | None = field(default=None, metadata=OMIT)
    noise: dict[str, float | None] = field(default_factory=dict)
    layers: list[LayerSummary] = field(default_factory=list, metadata=OMIT_EMPTY)
    schema_version: int = 1
