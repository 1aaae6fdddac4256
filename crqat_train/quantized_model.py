"""A network with its quantizers: one object that every stage builds once and hands on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, fx, nn

from artifacts.grid import Grid
from artifacts.targets import Residual
from crqat_train import calibration, representable
from crqat_train.config import QuantizationConfig
from crqat_train.layout import QuantizerSpec, insert_quantizers
from crqat_train.methods import Quantizer, quantizer_maker, quantizer_of, specs_of


class QuantizedModel(fx.GraphModule):
    """A float network's graph with quantizers on the edges that its targets need quantized.

    It is an `nn.Module` like any other: `train()`, `eval()`, `to()`, `state_dict()`, `copy.deepcopy` and
    `torch.compile` mean what they always mean. Its state dict has the keys of the float network, and the quantizers'
    under `quantizers.NAME`. `quantize_model` makes it.

    Attributes:
        targets: The runtimes whose limits it keeps to.
        specs: Edge, bit width and integer range of each quantizer, in the order of NNCF's layout.
    """

    @property
    def targets(self) -> tuple[str, ...]:
        """The runtimes whose limits it keeps to."""
        return tuple(self.meta["targets"])

    @property
    def specs(self) -> list[QuantizerSpec]:
        """Edge, bit width and integer range of each quantizer."""
        return specs_of(self)

    def quantizer(self, spec: QuantizerSpec) -> Quantizer:
        """The quantizer of one of `specs`."""
        return quantizer_of(self, spec)

    def calibrate(self, batches: Iterable[Tensor], method: str = "mse") -> None:
        """Set every quantizer's range from images; call it in eval mode.

        Args:
            batches: Normalized images, float32 of shape [N, C, H, W] each.
            method: "mse", "minmax" or "percentile"; see `QuantizationConfig.calibration`.
        """
        calibration.calibrate(self, batches, method)

    def finalize(self) -> list[str]:
        """Move each scale to a value that every target can store. Calling it again changes nothing.

        Returns:
            One line for each weight some of whose channels had to take a larger scale.

        Raises:
            UsageError: A scale is larger than a target can store.
        """
        return representable.make_representable(self, self.targets)

    def grids(self) -> dict[str, Grid]:
        """Edge name to scale, zero point and integer range."""
        return {spec.edge: self.quantizer(spec).grid() for spec in self.specs}


def quantize_model(
    model: nn.Module,
    example: Tensor,
    config: QuantizationConfig,
    targets: Sequence[str],
    make_quantizer: Callable[[QuantizerSpec], nn.Module] | None = None,
    residual: Residual | None = None,
) -> QuantizedModel:
    """Insert quantizers into a copy of the model, where NNCF would put them and as the targets need them.

    Args:
        model: Float network; it is not changed.
        example: Input of shape [N, C, H, W], float32.
        config: Bit widths and methods.
        targets: Names of runtimes; see `artifacts.targets`.
        make_quantizer: Called once for each spec; None makes the quantizers of the config's methods.
        residual: Which inputs of a residual Add are quantized; None takes what the targets want.

    Returns:
        The network with uncalibrated quantizers, in eval mode.

    Raises:
        UsageError: See `crqat_train.layout.insert_quantizers`.
    """
    make = make_quantizer or quantizer_maker(config)
    inserted, specs = insert_quantizers(model, example, config, targets, make, residual)
    quantized = QuantizedModel(inserted, inserted.graph)
    # fx.GraphModule copies `meta` when it is copied; other attributes would be lost.
    quantized.meta.update(specs=specs, targets=tuple(targets))
    return quantized
