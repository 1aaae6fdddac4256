"""What the analyses of a trained run measured."""

from __future__ import annotations

from dataclasses import dataclass


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
