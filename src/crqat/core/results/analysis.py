"""What the analyses of a trained run measured."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Annotated, Literal

from crqat.core.field_bounds import Range


@dataclass(frozen=True)
class LayerAccuracy:
    """The accuracy with one layer quantized and the rest in float.

    Attributes:
        layer: Its name; "none" and "all" are what they say.
        accuracy: Top-1, share of the validation images.
        bits: Of its weights and its input, such as "4/8".
    """

    layer: str
    accuracy: float
    bits: str


@dataclass(frozen=True)
class AverageBits:
    """Mean bit width over all weights: what was allowed, and what the proposal has."""

    asked: float
    proposed: float


@dataclass(frozen=True)
class Uniform:
    """The same bit width in all layers, and its divergence."""

    bits: int
    together: float


@dataclass(frozen=True)
class Divergence:
    """KL divergence from the float network.

    Attributes:
        sum: Of the single layers at the proposed bit widths.
        together: With all layers quantized at these.
        uniform: For comparison.
    """

    sum: float
    together: float
    uniform: Uniform


@dataclass(frozen=True)
class LayerSensitivity:
    """What fewer bits cost one layer.

    Attributes:
        layer: Its name, as `quantization.overrides` takes it.
        weights: How many it has.
        divergence: By bit width.
        bits: The proposed bit width.
    """

    layer: str
    weights: int
    divergence: dict[str, float]
    bits: int


@dataclass(frozen=True)
class Sensitivity:
    """sensitivity.json.

    Attributes:
        run: The run's name.
        images: Calibration images.
        average_bits: Of the weights.
        divergence: Of the proposal.
        layers: In the network's order.
    """

    run: str
    images: int
    average_bits: AverageBits
    divergence: Divergence
    layers: list[LayerSensitivity]
    schema_version: int = 1


@dataclass(frozen=True)
class SensitivityPayload:
    """The payload of the stage's manifest; attributes as in `Sensitivity`."""

    average_bits: AverageBits
    divergence: Divergence
    device: str = "cpu"
    schema_version: int = 1


@dataclass(frozen=True)
class NoiseLevel:
    """A network under one strength of noise.

    Attributes:
        level: Of input noise the standard deviation, in units of the normalized input; of weight noise the norm, as a
            share of the norm of each layer's weights.
        accuracy: Top-1, share of the validation images, one value a draw; a single one without noise.
        loss: Cross-entropy in nats, mean over the images, likewise.
    """

    level: Annotated[float, Range(ge=0)]
    accuracy: Annotated[list[float], Range(ge=1)]
    loss: Annotated[list[float], Range(ge=1)]


@dataclass(frozen=True)
class NoisyNetwork:
    """One network of a run under noise.

    Attributes:
        network: "float", or the name of a candidate: "calibrated", "student" or "teacher".
        input_noise: From weak to strong.
        weight_noise: Likewise.
    """

    network: Literal["float", "calibrated", "student", "teacher"]
    input_noise: list[NoiseLevel]
    weight_noise: list[NoiseLevel]


@dataclass(frozen=True)
class Perturbation:
    """perturbation.json.

    Attributes:
        run: The run's name.
        images: Validation images.
        draws: Of noise at each level above 0.
        networks: The float network first.
    """

    run: str
    images: int
    draws: int
    networks: list[NoisyNetwork]
    schema_version: int = 1


@dataclass(frozen=True)
class PerturbationPayload:
    """The payload of the stage's manifest; attributes as in `Perturbation`."""

    images: int
    draws: int
    device: str = "cpu"
    schema_version: int = 1


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation over draws; of one draw the latter is 0."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
