"""Makes ONNX files from a quantized network in memory, without a train stage on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from crqat.core import targets as runtimes
from crqat.core.grid import Grid
from crqat.core.targets import Residual
from crqat.export.graph.from_torch import marked_graph
from crqat.export.graph.onnx_graph import Graph
from crqat.export.qdq.write import QDQModel, qdq_model
from crqat.train.config import QuantizationConfig
from crqat.train.placement.quantizer_spec import QuantizerSpec
from crqat.train.quantized_model import QuantizedModel, quantize_model
from crqat.train.quantizers.calibration import rounded_weights


@dataclass
class Quantized:
    """A quantized network with the data needed to write its files.

    Attributes:
        model: The network, on the CPU, in eval mode. `graph` is computed only once: after changing the network, make a
            new object by `dataclasses.replace`.
        grids: Grids by edge name.
        images: Normalized float32 images of shape [N, C, H, W]; they determine the input size of the graph.
    """

    model: QuantizedModel
    grids: dict[str, Grid]
    images: npt.NDArray[np.float32]

    @classmethod
    def of(cls, model: QuantizedModel, images: Tensor) -> Quantized:
        """Return the model with these images and with the Grids of its quantizers."""
        return cls(model, model.grids(), images.numpy())

    @property
    def specs(self) -> list[QuantizerSpec]:
        """Return the specs of the model's quantizers."""
        return self.model.specs

    @cached_property
    def latent(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return the latent float32 weights before BN folding, by edge name."""
        return rounded_weights(self.model)

    @cached_property
    def graph(self) -> Graph:
        """Return the float graph with markers on quantized edges."""
        with torch.no_grad():
            classes = self.model(torch.from_numpy(self.images[:1])).shape[1]
        return marked_graph(self.model, self.images.shape[1:], classes)

    def file(
        self,
        target: str,
        precision: str = "float32",
        metadata: Mapping[str, str] | None = None,
        weights: str = "int8",
    ) -> QDQModel:
        """Return a target's ONNX model with the parameters of its quantizers; see `crqat.export.qdq.write`."""
        described = {**(metadata or {}), "crqat.target": target}
        return qdq_model(self.graph, self.specs, self.grids, self.latent, target, precision, described, weights)

    def files(self) -> dict[str, QDQModel]:
        """Return the ONNX model of each target by name, with float operations in the target's default type."""
        return {name: self.file(name, target.float_types[0]) for name, target in runtimes.TARGETS.items()}


def quantize_network(
    network: nn.Module,
    batches: Sequence[Tensor],
    targets: Sequence[str],
    config: QuantizationConfig | None = None,
    residual: Residual | None = None,
) -> Quantized:
    """Quantize a float network by calibration only.

    Args:
        network: Float network on the CPU; it is left in eval mode and is otherwise unchanged.
        batches: Normalized images for calibration, float32 of shape [N, C, H, W] each.
        targets: Names of the target runtimes; see `crqat.core.targets`.
        config: Bit widths and methods; None for the defaults.
        residual: Which inputs of a residual Add are quantized; see `crqat.train.quantized_model.quantize_model`.

    Raises:
        UsageError: See `crqat.train.quantized_model.quantize_model`.
    """
    config = config or QuantizationConfig()
    model = quantize_model(network.eval(), batches[0][:2], config, targets, residual=residual)
    model.calibrate(list(batches), config.calibration)
    model.finalize()
    return Quantized.of(model.eval(), torch.cat(list(batches)))
