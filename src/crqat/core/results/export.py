"""What an export leaves to the next stage: the payload of its manifest."""

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
    """How a file holds the trained Grid of one edge.

    Attributes:
        claim: "exact" or "lossy".
        note: What is lost or was changed.
        bias_error: Of a weight: the largest error of its layer's bias, as a real number.
    """

    claim: Literal["exact", "lossy"]
    note: str | None = field(default=None, metadata=OMIT)
    bias_error: float | None = field(default=None, metadata=OMIT)


@dataclass(frozen=True)
class ExportedModel:
    """One file; a float file has a name and a target alone.

    Attributes:
        file: Its name in the export's directory.
        target: The runtime that it was written for, "float" or "float16".
        precision: Of what is not INT8, "float32" or "float16".
        claims: By edge.
        macs: Multiply-accumulates of each Conv and Gemm that INT8 is asked of, by node.
        float_layers: What was kept in float by name.
        verification: The checks of its integer codes.
        fusion: What ONNX Runtime fused; None of a file for another runtime.
        findings: Rules of its runtime that it breaks; None of a float file.
        expected_codes: The file with the codes that a CPU is to compute.
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
    """One Conv, ConvTranspose, Gemm or MatMul of the network, as it was trained.

    Attributes:
        layer: Its name.
        operation: Of ONNX.
        macs: Multiply-accumulates for one image.
        products: How many each output sums, as a mean.
        weight_bits: Of the weight or second operand; None if it is float.
        input_bits: Of the input or first operand; None if it is float.
        weight_snr: Signal-to-noise of the weight's quantizer, dB; None where it changes nothing.
        input_snr: Likewise.
        reason: Why the layer is float, if the recipe says so.
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
    """An export.

    Attributes:
        run: Its name.
        models: The float file or files, then one for each target.
        images: File of the test images, uint8 [N, C, H, W]; empty where they are not exported.
        labels: File of their classes, int64 [N].
        class_names: In the order of the logits.
        grids_sha256: Of the Grids that were exported.
        candidate: Which of the training's was.
        training: That it was made of.
        preprocessing: Of an export without a training, which says it otherwise.
        noise: Signal-to-noise of each quantizer, dB; None where it changes nothing.
        layers: What became of each layer, in the order of computation.
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
