from __future__ import annotations

import pytest

from crqat.core.errors import UsageError
from crqat.pipeline.recipe import keys, recipe
from crqat.train.config import DataConfig, ModelConfig


def test_every_key_of_a_resolved_recipe_is_explained_with_its_default() -> None:
    base = recipe.Recipe("r", DataConfig("digits"), ModelConfig("cifar/resnet20"))
    known = keys.every_key()
    for name, value in recipe.resolved(base).items():
        assert known[name].meaning
        if not isinstance(value, dict):
            assert known[name].required or known[name].default == value
            continue
        assert known[name].keys == tuple(f"{name}.{own}" for own in value)
        for own, default in value.items():
            found = known[f"{name}.{own}"]
            assert found.meaning and "Likewise." not in found.meaning, found.key
            assert found.required or found.default == default, found.key
    assert [key.key for key in known.values() if key.required] == ["name", "data", "data.source", "model", "model.name"]


def test_type_bounds_and_values_are_those_that_a_recipe_is_checked_by() -> None:
    found = keys.explain("qat.lr")
    assert (found.type, found.default, found.meaning) == ("number, above 0", 0.01, "Peak learning rate.")
    assert keys.explain("gate.min_agreement").type == "number, at least 0 and at most 1; or null"
    assert keys.explain("float.lr").default == 0.1  # the same key of another section
    assert keys.explain("consistency.teacher").allowed == ("ema", "float", "pseudo-label", "none")
    assert keys.explain("quantization.weight_method").allowed[-1] == "package.module:name"
    assert keys.explain("data.channels").allowed == ("1", "3")
    assert "onnxruntime" in keys.explain("export.targets").allowed
    assert keys.explain("data.std").meaning.startswith("Standard deviation of each channel")
    lines = list(keys.lines(keys.explain("gate")))
    assert any("gate.max_accuracy_drop" in line and "1.0" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "near"),
    [("qat.lrr", "`qat.lr`"), ("max_accuracy_drop", "`gate.max_accuracy_drop`"), ("QAT.EPOCHS", "`qat.epochs`")],
)
def test_an_unknown_key_is_one_line_with_the_closest(name: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"^{name}: not a key of a recipe; did you mean {near}"):
        keys.explain(name)
