"""Measures, without training, how much the float network's outputs change if one layer is quantized to few bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from crqat.core.progress import Progress
from crqat.core.results.training import TrainingPayload
from crqat.core.run_directory import payload_of, verify_stage
from crqat.train.config import TrainConfig
from crqat.train.data import sources
from crqat.train.data.batches import evaluation_batches
from crqat.train.data.split import split_of
from crqat.train.load_trained import rebuild
from crqat.train.models import published
from crqat.train.placement.quantizer_spec import QuantizerSpec
from crqat.train.quantized_model import take_float_weights
from crqat.train.quantizers import calibrate_weight, quantizer_of
from crqat.train.quantizers.calibration import observe, only, weight_of
from crqat.train.training.callbacks import set_width

WIDTHS = (2, 3, 4, 6, 8)
_BATCH = 64


@dataclass
class LayerDivergence:
    """Divergence of one layer at each bit width.

    Attributes:
        layer: Name of the layer, as in `quantization.overrides`.
        weights: Number of its weights.
        divergence: KL(float || quantized) of the softmax, mean over the images in nats, for each bit width.
    """

    layer: str
    weights: int
    divergence: dict[int, float] = field(default_factory=dict)


class Divergences:
    """A float network whose quantizers can be switched on by layer at any bit width.

    Args:
        train_dir: A finished train stage, whose float network is used; its hashes are verified first.
        config: The training configuration in the recipe of that stage.
        images: Largest number of calibration images to compare on.

    Attributes:
        images: Number of images that are used.
    """

    def __init__(self, train_dir: Path, config: TrainConfig, images: int) -> None:
        trained = payload_of(TrainingPayload, train_dir, verify_stage(train_dir))
        asked = config.quantization
        # The targets' limits apply at 8 bits; smaller bit widths are not limited.
        widest = replace(asked, weights=8, activations=8, first_layer=8, last_layer=8, overrides={})
        self._model = rebuild(train_dir, replace(config, quantization=widest), trained, "student")
        self._specs = self._model.specs
        take_float_weights(self._model)
        self._asked, self._calibration = {spec.edge: spec for spec in self._specs}, asked.calibration
        dataset = sources.of_recipe(published.data_section(config))
        chosen = split_of(dataset.train_labels, config.data, config.seed).train
        calibrating = dataset.train_images[chosen[: asked.calibration_images]]
        self.images = min(images, len(calibrating))
        self._batches = list(evaluation_batches(calibrating[: self.images], dataset.preprocessing, _BATCH))
        self._observers = observe(self._model, evaluation_batches(calibrating, dataset.preprocessing, _BATCH))
        self._layers: dict[str, list[QuantizerSpec]] = {}
        for spec in self._specs:
            if spec.kind == "weight":
                source = self._asked.get(spec.input_edge or "")
                self._layers.setdefault(spec.operation, []).extend([spec] if source is None else [spec, source])
        with only(self._model, []):
            self._float = self._log_probabilities()

    def one_layer_at_a_time(self, progress: Progress, widths: Sequence[int] = WIDTHS) -> list[LayerDivergence]:
        """Return the divergences of every layer at every bit width, weights and input, with all others in float."""
        rows = {
            name: LayerDivergence(
                name, sum(weight_of(self._model, spec).numel() for spec in specs if spec.kind == "weight")
            )
            for name, specs in self._layers.items()
        }
        done, total = 0, len(rows) * len(widths)
        for bits in widths:
            self._set({spec.edge: bits for spec in self._specs})
            for name, specs in self._layers.items():
                rows[name].divergence[bits] = self._divergence(specs)
                done += 1
                progress("quantizing one layer at a time", done, total, f"{name} at {bits} bits")
        return list(rows.values())

    def together(self, bits: Mapping[str, int]) -> float:
        """Return the divergence with every layer quantized at its own bit width; other activations stay in float.

        Args:
            bits: Bit width by layer. An input shared by several layers gets their largest bit width.
        """
        widths: dict[str, int] = {}
        for name, specs in self._layers.items():
            for spec in specs:
                widths[spec.edge] = max(bits[name], widths.get(spec.edge, 0))
        self._set(widths)
        return self._divergence([self._asked[edge] for edge in widths])

    def _set(self, widths: Mapping[str, int]) -> None:
        for edge, bits in widths.items():
            spec = self._asked[edge]
            quantizer = quantizer_of(self._model, spec)
            set_width(quantizer, min(bits, spec.bits), keep_range=False)
            if spec.kind == "weight":
                calibrate_weight(quantizer, weight_of(self._model, spec), self._calibration)
            else:
                self._observers[edge].calibrate(quantizer, self._calibration)

    def _divergence(self, active: Sequence[QuantizerSpec]) -> float:
        with only(self._model, active):
            quantized = self._log_probabilities()
        return float(functional.kl_div(quantized, self._float, reduction="batchmean", log_target=True))

    @torch.no_grad()
    def _log_probabilities(self) -> Tensor:
        logits = torch.cat([self._model(batch) for batch in self._batches])
        return functional.log_softmax(logits.double(), dim=1)
