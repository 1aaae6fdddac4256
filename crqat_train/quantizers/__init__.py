"""Quantization methods. Each is an nn.Module that fake-quantizes in training and becomes a `Grid` for the export.

Fake quantization returns, in float32, the value of the nearest code: ``clip(rint(x / s), qmin - z, qmax - z) * s``. The
zero point z is 0 in all methods except LSQ+. The division is a true division: a multiplication by the reciprocal may be
off by one unit in the last place, which rounds some values to another code. docs/methods.md has each method's formula,
paper and deviations.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from crqat.core.errors import UsageError
from crqat.train.config import QuantizationConfig
from crqat.train.own_code import call_function, import_function
from crqat.train.placement.quantizer_spec import QuantizerSpec
from crqat.train.quantizers.base import MIN_SCALE, Quantizer, quantizer_of, specs_of
from crqat.train.quantizers.dorefa import DoReFaQuantizer
from crqat.train.quantizers.lsq import LSQQuantizer
from crqat.train.quantizers.lsq_plus import LSQPlusQuantizer
from crqat.train.quantizers.minmax import MinMaxQuantizer
from crqat.train.quantizers.observers import PERCENTILE, ActivationObserver, calibrate_weight
from crqat.train.quantizers.pact import PACTQuantizer

# The one registry of methods. `Quantizer.for_weights` says which of them weights may use.
METHODS: dict[str, type[Quantizer]] = {
    "lsq": LSQQuantizer,
    "lsq+": LSQPlusQuantizer,
    "dorefa": DoReFaQuantizer,
    "minmax": MinMaxQuantizer,
    "pact": PACTQuantizer,
}

__all__ = [
    "METHODS",
    "MIN_SCALE",
    "PERCENTILE",
    "ActivationObserver",
    "DoReFaQuantizer",
    "LSQPlusQuantizer",
    "LSQQuantizer",
    "MinMaxQuantizer",
    "PACTQuantizer",
    "Quantizer",
    "calibrate_weight",
    "method_named",
    "quantizer_maker",
    "quantizer_of",
    "specs_of",
]


def method_named(name: str, key: str) -> type[Quantizer]:
    """Return the class of a method: one of `METHODS`, or the user's own as "package.module:Class".

    Args:
        name: The name in the recipe.
        key: The recipe's key, "quantization.weight_method" or "quantization.activation_method".

    Raises:
        UsageError: The class cannot be imported, or is not a `Quantizer` that fits the key.
    """
    kind = "weights" if key.endswith("weight_method") else "activations"
    if ":" in name:
        found = import_function(name, key)
        if not (isinstance(found, type) and issubclass(found, Quantizer)):
            msg = f"{key}: {name} does not derive from crqat.train.quantizers.Quantizer; derive it from that"
            raise UsageError(msg)
        if found.forward is Quantizer.forward:
            msg = f"{key}: {name} has no forward(self, x) of its own; define it, see docs/adding_a_method.md"
            raise UsageError(msg)
    elif name in METHODS:
        found = METHODS[name]
    else:
        msg = f'{key}: "{name}" is not one of {", ".join(METHODS)}, nor a "package.module:Class"'
        raise UsageError(msg)
    if not (found.for_weights if kind == "weights" else found.for_activations):
        msg = f"{key}: {name} is not for {kind}; choose another method"
        raise UsageError(msg)
    return found


def quantizer_maker(config: QuantizationConfig) -> Callable[[QuantizerSpec], Quantizer]:
    """Return a function that creates each spec's quantizer by the recipe's methods for weights and activations.

    Raises:
        UsageError: See `method_named`. The returned function raises it, too, if a user's class breaks the interface.
    """
    names = {"weight": config.weight_method, "activation": config.activation_method}
    methods = {kind: method_named(name, f"quantization.{kind}_method") for kind, name in names.items()}

    def make(spec: QuantizerSpec) -> Quantizer:
        method, name, key = methods[spec.kind], names[spec.kind], f"quantization.{spec.kind}_method"
        if ":" not in name:
            return method(spec)
        made: Quantizer = call_function(method, name, key, {"spec": spec})
        scale = getattr(made, "scale", None)
        if (
            not isinstance(scale, Tensor)
            or scale.shape != made.initial_scale().shape
            or "scale" not in made.state_dict()
        ):
            shape = list(made.initial_scale().shape)
            msg = f"{key}: {name} needs a Parameter or buffer `scale` of shape {shape}, such as self.initial_scale()"
            raise UsageError(msg)
        return made

    return make
