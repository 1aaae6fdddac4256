"""How a quantizer learns its Grid. Every method is a module that fake-quantizes and ends as a `Grid`.

Fake quantization gives, in float32, the value of the nearest code: ``clip(rint(x / s), qmin - z, qmax - z) * s``, with
the zero point z = 0 but for LSQ+. The division is a true division: a multiplication by the reciprocal is off by one
unit in the last place and flips roundings. docs/methods.md has each method's formula, paper and deviations.
"""

from __future__ import annotations

from collections.abc import Callable

from crqat.train.config import QuantizationConfig
from crqat.train.placement.insert import QuantizerSpec
from crqat.train.quantizers.base import MIN_SCALE, Quantizer, quantizer_of, specs_of
from crqat.train.quantizers.dorefa import DoReFaQuantizer
from crqat.train.quantizers.lsq import LSQQuantizer
from crqat.train.quantizers.lsq_plus import LSQPlusQuantizer
from crqat.train.quantizers.minmax import MinMaxQuantizer
from crqat.train.quantizers.observers import PERCENTILE, ActivationObserver, calibrate_weight
from crqat.train.quantizers.pact import PACTQuantizer

WEIGHT_METHODS: dict[str, type[Quantizer]] = {
    "lsq": LSQQuantizer,
    "lsq+": LSQPlusQuantizer,
    "dorefa": DoReFaQuantizer,
    "minmax": MinMaxQuantizer,
}
ACTIVATION_METHODS: dict[str, type[Quantizer]] = {**WEIGHT_METHODS, "pact": PACTQuantizer}
METHODS: dict[str, type[Quantizer]] = {**WEIGHT_METHODS, **ACTIVATION_METHODS}

__all__ = [
    "ACTIVATION_METHODS",
    "METHODS",
    "MIN_SCALE",
    "PERCENTILE",
    "WEIGHT_METHODS",
    "ActivationObserver",
    "DoReFaQuantizer",
    "LSQPlusQuantizer",
    "LSQQuantizer",
    "MinMaxQuantizer",
    "PACTQuantizer",
    "Quantizer",
    "calibrate_weight",
    "quantizer_maker",
    "quantizer_of",
    "specs_of",
]


def quantizer_maker(config: QuantizationConfig) -> Callable[[QuantizerSpec], Quantizer]:
    """What makes each spec's quantizer, by the recipe's methods for weights and activations."""

    def make(spec: QuantizerSpec) -> Quantizer:
        if spec.kind == "weight":
            return WEIGHT_METHODS[config.weight_method](spec)
        return ACTIVATION_METHODS[config.activation_method](spec)

    return make
