"""A quantized network in memory and the files that are made of it, without a train stage on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from artifacts import targets as runtimes
from artifacts.grid import Grid
from artifacts.targets import Residual
from crqat_train.calibration import rounded_weights
from crqat_train.config import QuantizationConfig
from crqat_train.layout import QuantizerSpec
from crqat_train.quantized_model import QuantizedModel, quantize_model
from export.graph import Graph
from export.qdq import QDQModel, qdq_model
from export.trace import marked_graph


@dataclass
class Quantized:
    """A quantized network with what its files are made from.

    Attributes:
        model: CPU, eval mode. Its graph is exported once: after a change, make a new one by `dataclasses.replace`.
        grids: Edge name to Grid.
        images: Normalized float32 images of shape [N, C, H, W], of which the graph takes the size.
    """

    model: QuantizedModel
    grids: dict[str, Grid]
    images: npt.NDArray[np.float32]

    @classmethod
    def of(cls, model: QuantizedModel, images: Tensor) -> Quantized:
        """With the Grids that its quantizers have."""
        return cls(model, model.grids(), images.numpy())

    @property
    def specs(self) -> list[QuantizerSpec]:
        """The model's quantizers."""
        return self.model.specs

    @property
    def latent(self) -> dict[str, npt.NDArray[np.float32]]:
        """Weight edge name to the unfolded weight."""
        return rounded_weights(self.model)

    @cached_property
    def graph(self) -> Graph:
        """The marked float graph."""
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
        """A target's file; see `export.qdq.qdq_model`."""
        described = {**(metadata or {}), "crqat.target": target}
        return qdq_model(self.graph, self.specs, self.grids, self.latent, target, precision, described, weights)

    def files(self) -> dict[str, QDQModel]:
        """Every target's file as it ships."""
        return {name: self.file(name, target.float_types[0]) for name, target in runtimes.TARGETS.items()}


def quantize_network(
    network: nn.Module,
    batches: Sequence[Tensor],
    targets: Sequence[str],
    config: QuantizationConfig | None = None,
    residual: Residual | None = None,
) -> Quantized:
    """Quantize a float network by calibration alone.

    Args:
        network: On the CPU; it is not changed, but for being in eval mode afterwards.
        batches: Normalized images, float32 of shape [N, C, H, W] each, from which the ranges start.
        targets: Names of runtimes; see `artifacts.targets`.
        config: Widths and methods, None for the defaults.
        residual: See `crqat_train.layout.quantize_model`.

    Raises:
        UsageError: See `crqat_train.layout.quantize_model`.
    """
    config = config or QuantizationConfig()
    model = quantize_model(network.eval(), batches[0][:2], config, targets, residual=residual)
    model.calibrate(list(batches), config.calibration)
    model.finalize()
    return Quantized.of(model.eval(), torch.cat(list(batches)))
