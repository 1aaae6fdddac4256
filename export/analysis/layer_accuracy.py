"""Measures the accuracy with one layer quantized and all others in float, layer by layer."""

from __future__ import annotations

from pathlib import Path

from crqat.core.progress import Progress
from crqat.core.results.analysis import LayerAccuracy
from crqat.core.results.training import TrainingPayload
from crqat.core.run_directory import payload_of, verify_stage
from crqat.train.config import TrainConfig
from crqat.train.data import sources
from crqat.train.data.batches import subset
from crqat.train.data.split import split_of
from crqat.train.load_trained import rebuild
from crqat.train.models import published
from crqat.train.placement.quantizer_spec import QuantizerSpec
from crqat.train.quantizers.calibration import only
from crqat.train.training.evaluate import accuracy


def accuracy_of_each_layer(
    train_dir: Path, config: TrainConfig, candidate: str, progress: Progress
) -> list[LayerAccuracy]:
    """Return the validation accuracy with one layer at a time quantized, weights and input; worst layer first.

    Args:
        train_dir: A finished train stage; its hashes are verified first.
        config: The training configuration in the recipe of that stage.
        candidate: "student", "teacher" or "calibrated".
        progress: Reports layers.

    Returns:
        Rows with the fields `layer`, `accuracy` in 0..1 and `bits`, the bit widths as "weights/input". In the first
        row, `layer` is "none": every quantizer is off; in the second, it is "all": every quantizer is on. After
        training, "none" has the latent weights, which differ from the float network's.
    """
    trained = payload_of(TrainingPayload, train_dir, verify_stage(train_dir))
    model = rebuild(train_dir, config, trained, candidate)
    specs = model.specs
    dataset = sources.of_recipe(published.data_section(config))
    chosen = split_of(dataset.train_labels, config.data, config.seed).validation
    images, labels = subset(dataset.train_images, chosen), dataset.train_labels[chosen]
    by_edge = {spec.edge: spec for spec in specs}
    rows: list[LayerAccuracy] = []
    layers: list[tuple[str, list[QuantizerSpec]]] = [("none", []), ("all", list(specs))]
    for spec in specs:
        if spec.kind == "weight":
            source = by_edge.get(spec.input_edge or "")
            layers.append((spec.operation, [spec] if source is None else [spec, source]))
    for number, (layer, active) in enumerate(layers, start=1):
        with only(model, active):
            share = accuracy(model, images, labels, dataset.preprocessing)
        bits = "/".join(str(spec.bits) for spec in active) if layer not in ("none", "all") else ""
        rows.append(LayerAccuracy(layer, share, bits))
        progress("quantizing one layer at a time", number, len(layers), f"{layer}: {share:.2%}")
    return rows[:2] + sorted(rows[2:], key=lambda row: row.accuracy)
