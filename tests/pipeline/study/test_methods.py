from __future__ import annotations

from pathlib import Path

import pytest

from crqat.core.errors import UsageError
from crqat.pipeline.recipe import recipe
from crqat.pipeline.study.methods import METHODS, TRAININGS, needed, settings

RECIPE = """
name: small
data: {source: digits, labeled: 200}
model: {name: cifar/resnet20}
float: {epochs: 2}
qat: {epochs: 9, batch_size: 32, lr: 0.02}
"""


def test_a_method_brings_the_trainings_that_it_starts_from_before_it() -> None:
    assert needed(("cr-unlabeled",)) == ["float", "cr-unlabeled"]
    assert needed(("float-cr+qat", "qat-ema")) == ["float", "qat", "float-cr", "float-cr+qat"]
    assert needed(()) == list(TRAININGS)
    with pytest.raises(UsageError, match=r"^--methods: kd is not one of float, ptq, qat, "):
        needed(("kd",))


def test_all_trainings_share_labels_and_steps(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    base = recipe.load(path)
    steps: dict[str, int] = {}
    for name, training in TRAININGS.items():
        given = [] if training.start is None else ["model.weights=float.safetensors"]
        config = recipe.load(path, [*settings(name, base), *given])
        trained = recipe.train_config(config)
        assert config.data.labeled == 200
        assert (config.data.unlabeled_ratio > 0) == ("/" in training.views) == (training.unlabeled != "no") or (
            name == "float-cr+qat"  # its float network has seen them
        )
        sections = [trained.float_training, trained.qat]
        assert all(section.batch_size == 32 for section in sections if section.epochs and training.start is not None)
        own = sum(section.epochs for section in sections) if training.start is not None else 0
        steps[name] = own + (steps[training.start] if training.start is not None else 0)
    assert steps == {name: round(9 * training.steps) for name, training in TRAININGS.items()}


def test_compared_methods_differ_in_their_views_their_unlabeled_images_or_their_network() -> None:
    seen = [
        (training.views, training.unlabeled, training.start, training.settings, network)
        for training in TRAININGS.values()
        for network in training.methods.values()
    ]
    assert len(set(seen)) == len(seen) == len(METHODS)
