"""Results of the analyses of a trained run: layer accuracy, sensitivity and perturbation."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Annotated, Literal

from crqat.core.field_bounds import Range


@dataclass(frozen=True)
class LayerAccuracy:
    """Accuracy of the network with one layer quantized and all others in float.

    Attributes:
        layer: Name of the layer; "none" if no layer is quantized, "all" if every layer is.
        accuracy: Top-1 accuracy, as a share of the validation images.
        bits: Bit widths of the layer's weights and input, such as "4/8".
    """

    layer: str
    accuracy: float
    bits: str


@dataclass(frozen=True)
class AverageBits:
    """Mean bit width over all weights of a network.

    Attributes:
        asked: Largest mean that the user allows.
        proposed: Mean of the proposed bit widths.
    """

    asked: float
    proposed: float


@dataclass(frozen=True)
class Uniform:
    """KL divergence from the float network of a network with the same bit width in all layers, for comparison.

    Attributes:
        bits: Bit width of all layers.
        together: KL divergence with all layers quantized at once.
    """

    bits: int
    together: float


@dataclass(frozen=True)
class Divergence:
    """KL divergence of quantized networks from the float network.

    Attributes:
        sum: Sum over the layers of the divergence with that layer alone quantized at its proposed bit width.
        together: Divergence with all layers quantized at the proposed bit widths.
        uniform: Divergence with the same bit width in all layers, for comparison.
    """

    sum: float
    together: float
    uniform: Uniform


@dataclass(frozen=True)
class LayerSensitivity:
    """Divergence of the network with one layer quantized, by bit width.

    Attributes:
        layer: Name of the layer, as `quantization.overrides` takes it.
        weights: Number of weights in the layer.
        divergence: KL divergence from the float network, by bit width.
        bits: Proposed bit width.
    """

    layer: str
    weights: int
    divergence: dict[str, float]
    bits: int


@dataclass(frozen=True)
class Sensitivity:
    """Layout of `sensitivity.json`.

    Attributes:
        run: Name of the run.
        images: Number of calibration images.
        average_bits: Mean bit width of the weights, requested and proposed.
        divergence: KL divergence from the float network at the proposed bit widths.
        layers: The layers in the order of the network.
    """

    run: str
    images: int
    average_bits: AverageBits
    divergence: Divergence
    layers: list[LayerSensitivity]
    schema_version: int = 1


@dataclass(frozen=True)
class SensitivityPayload:
    """Summary of a sensitivity stage in its manifest; `Sensitivity` describes the attributes."""

    average_bits: AverageBits
    divergence: Divergence
    device: str = "cpu"
    schema_version: int = 1


@dataclass(frozen=True)
class NoiseLevel:
    """Accuracy and loss of a network at one noise level.

    Attributes:
        level: Standard deviation of input noise, in units of the normalized input; for weight noise, its norm as a
            share of the norm of each layer's weights.
        accuracy: Top-1 accuracy as a share of the validation images, one value per draw; a single value without noise.
        loss: Mean cross-entropy over the images in nats, one value per draw; a single value without noise.
    """

    level: Annotated[float, Range(ge=0)]
    accuracy: Annotated[list[float], Range(ge=1)]
    loss: Annotated[list[float], Range(ge=1)]


@dataclass(frozen=True)
class NoisyNetwork:
    """Results of one network of a run at every noise level.

    Attributes:
        network: "float", or the name of a candidate: "calibrated", "student" or "teacher".
        input_noise: Results with input noise, from weak to strong.
        weight_noise: Results with weight noise, from weak to strong.
    """

    network: Literal["float", "calibrated", "student", "teacher"]
    input_noise: list[NoiseLevel]
    weight_noise: list[NoiseLevel]


@dataclass(frozen=True)
class Perturbation:
    """Layout of `perturbation.json`.

    Attributes:
        run: Name of the run.
        images: Number of validation images.
        draws: Number of noise draws at each level above 0.
        networks: The networks, the float network first.
    """

    run: str
    images: int
    draws: int
    networks: list[NoisyNetwork]
    schema_version: int = 1


@dataclass(frozen=True)
class PerturbationPayload:
    """Summary of a perturbation stage in its manifest; `Perturbation` describes the attributes."""

    images: int
    draws: int
    device: str = "cpu"
    schema_version: int = 1


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation over draws; the latter is 0 for a single draw."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
