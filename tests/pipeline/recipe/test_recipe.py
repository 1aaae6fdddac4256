"""Recipes: what is accepted, and in which words everything else is refused."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from crqat.core.errors import UsageError
from crqat.export.config import ExportConfig
from crqat.pipeline.gate.rules import GateConfig
from crqat.pipeline.recipe import recipe
from crqat.runtime_eval.config import BenchmarkConfig
from crqat.train.config import ConsistencyConfig, FloatConfig, QATConfig, QuantizationConfig

ROOT = Path(__file__).parents[3]
TEMPLATE = ROOT / "pipeline" / "templates" / "recipe.yaml"
MINIMAL = "name: a\ndata: {source: digits}\nmodel: {name: cifar/resnet20}\nfloat: {epochs: 1}\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    """The one line, without the path of the file."""
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        recipe.load(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), "FILE")


def test_minimal_recipe_gets_the_defaults(tmp_path: Path) -> None:
    loaded = recipe.load(write(tmp_path, MINIMAL))
    assert loaded.seed == 0
    assert loaded.targets == ("onnxruntime", "tensorrt")
    assert loaded.float_training == FloatConfig(epochs=1)
    assert loaded.qat == QATConfig()
    assert loaded.gate == GateConfig()


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_named_as_their_file(path: Path) -> None:
    assert recipe.load(path).name == path.stem


def test_template_states_every_key_with_its_default() -> None:
    """Where the template departs from a default, its comment says so."""
    loaded = recipe.load(TEMPLATE)
    assert loaded.quantization == QuantizationConfig()
    assert loaded.float_training == FloatConfig()
    assert loaded.qat == QATConfig()
    assert loaded.consistency == ConsistencyConfig()
    assert (loaded.export, loaded.benchmark, loaded.gate) == (ExportConfig(), BenchmarkConfig(), GateConfig())
    for section in (loaded, loaded.data, loaded.model):
        for item in fields(section):
            if item.default is MISSING or item.name in ("crop_padding", "flip", "float_training"):
                continue
            assert getattr(section, item.name) == item.default, item.name
    text = TEMPLATE.read_text()
    assert re.search(r"crop_padding: 1 .*Default: 4", text)
    assert re.search(r"flip: false .*Default: true", text)


def test_template_mentions_every_key() -> None:
    lines = TEMPLATE.read_text().splitlines()
    written: dict[str, set[str]] = {"": set()}
    section = ""
    for line in lines:
        if match := re.match(r"(  )?([a-z0-9_]+):", line):
            if not match[1]:
                section = match[2]
            written.setdefault(section if match[1] else "", set()).add(match[2])
    assert written.pop("") == set(recipe.top_level_keys())
    assert written == {name: {item.name for item in fields(kind)} for name, kind in recipe.SECTIONS.items()}


def test_sections_are_the_recipes_dataclass_fields(tmp_path: Path) -> None:
    values = recipe.resolved(recipe.load(write(tmp_path, MINIMAL)))
    assert {key for key, value in values.items() if isinstance(value, dict)} == set(recipe.SECTIONS)
    assert set(values) == set(recipe.top_level_keys())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("quantisation: {}", "FILE: quantisation: unknown key; did you mean `quantization`?"),
        ("qat: {epoch: 3}", "FILE: qat.epoch: unknown key; did you mean `epochs`?"),
        ("float_training: {}", "FILE: float_training: unknown key; valid here: name, data, model, seed"),
        ("quantization: {weights: 9}", "FILE: quantization.weights: should be less than or equal to 8, not 9"),
        (
            "quantization: {overrides: {conv1: {weight: 4}}}",
            "FILE: quantization.overrides.conv1.weight: unknown key; did you mean `weights`?",
        ),
        (
            "quantization: {overrides: {conv1: {weights: 1}}}",
            "FILE: quantization.overrides.conv1.weights: should be greater than or equal to 2, not 1",
        ),
        (
            "quantization: {overrides: {conv1: {}}}",
            "FILE: quantization.overrides.conv1: empty; set weights, activations or both",
        ),
        (
            "qat: {progressive_bits: [4, 8]}",
            "FILE: qat.progressive_bits: [4, 8] must decrease",
        ),
        (
            "quantization: {overrides: {conv1: {weights: 3}}}\nqat: {progressive_bits: [8, 4]}",
            "FILE: qat.progressive_bits: ends at 4, above the smallest requested bit width; add 3",
        ),
        ("qat: {freeze_bn_at: 2}", "FILE: qat.freeze_bn_at: should be less than or equal to 1, not 2"),
        ("quantization: {weights: 8.0}", "FILE: quantization.weights: should be a valid integer, not 8.0"),
        ("quantization: {method: lsq}", "FILE: quantization.method: is now two keys, `weight_method` and"),
        ("quantization: {weight_method: pact}", "FILE: quantization.weight_method: should be 'lsq', 'lsq+', 'dorefa'"),
        (
            "quantization: {activation_method: lsq+}",
            "FILE: targets: TensorRT refuses zero points other than 0, which activation_method `lsq+` learns; set",
        ),
        (
            "targets: [onnxruntime]\nexport: {targets: [tensorrt]}\nquantization: {activation_method: lsq+}",
            "FILE: export.targets: TensorRT refuses zero points other than 0",
        ),
        ("qat: {lr: fast}", 'FILE: qat.lr: should be a valid number, not "fast"'),
        ("qat: {lr: -1}", "FILE: qat.lr: should be greater than 0, not -1"),
        ("qat: 3", "FILE: qat: should be a section of key: value lines, not 3"),
        ("seed: -1", "FILE: seed: should be greater than or equal to 0, not -1"),
        ("seed: yes", "FILE: seed: should be a valid integer, not true"),
        ("targets: [tensorrt, cpu]", "FILE: targets.1: should be 'onnxruntime' or 'tensorrt', not \"cpu\""),
        (
            "benchmark: {provider: TensorRTExecutionProvider}",
            "FILE: benchmark.provider: should be 'CPUExecutionProvider', 'CUDAExecutionProvider', "
            "'TensorrtExecutionProvider' or 'NvTensorRTRTXExecutionProvider', not \"TensorRTExecutionProvider\"; "
            "did you mean `TensorrtExecutionProvider`?",
        ),
        ("benchmark: {provider: cuda}", "FILE: benchmark.provider: should be 'CPUExecutionProvider'"),
        (
            "benchmark: {require: [tensorrtt]}",
            "FILE: benchmark.require.0: should be 'onnxruntime', 'tensorrt' or 'openvino', not \"tensorrtt\"; "
            "did you mean `tensorrt`?",
        ),
        ("targets: []", "FILE: targets: list each runtime once, at least one"),
        ("targets: [tensorrt, tensorrt]", "FILE: targets: list each runtime once, at least one"),
    ],
)
def test_wrong_values_are_refused_with_path_and_remedy(tmp_path: Path, extra: str, message: str) -> None:
    assert refusal(tmp_path, MINIMAL + extra).startswith(message)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("source: digits, size: 40", "FILE: data.size: applies only to imagefolder, imagelist, "),
        ("source: digits, convert: true", "FILE: data.convert: applies only to imagefolder"),
        (
            "source: digits, channels: 1",
            "FILE: data.channels: applies only to imagefolder, imagelist, webdataset, huggingface, cif",
        ),
        ("source: cifar10, channels: 2", "FILE: data.channels: should be 1 or 3, not 2"),
        ("source: imagefolder, channels: 1, mean: [0.1, 0.2, 0.3]", "FILE: data.mean: has 3 numbers for 1 channels"),
        (
            "source: cifar10, std: [0.2]",
            "FILE: data.std: has 1 numbers for 3 channels (data.channels); give one for each",
        ),
        ("source: webdataset, label_column: x", "FILE: data.label_column: applies only to huggingface, whose data"),
        ('source: "huggingface:a/b", crop: 300', "FILE: data.crop: larger than data.size"),
        ("source: webdataset, root: x, size: 100", "FILE: data.crop: larger than data.size"),
        ("source: imagefolder, root: x, crop: 300", "FILE: data.crop: larger than data.size, the shorter side"),
        ("source: imagefolder, root: x, size: 100", "FILE: data.crop: larger than data.size"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tmp_path: Path, section: str, message: str) -> None:
    assert refusal(tmp_path, MINIMAL.replace("source: digits", section)).startswith(message)


def test_a_place_in_a_weights_file_needs_the_file(tmp_path: Path) -> None:
    keyed = MINIMAL.replace("{name: cifar/resnet20}", "{name: cifar/resnet20, weights: WEIGHTS, weights_key: ema}")
    assert recipe.load(write(tmp_path, keyed.replace("WEIGHTS", "a.pth"))).model.weights_key == "ema"
    for none in ("null", "pretrained"):
        assert refusal(tmp_path, keyed.replace("WEIGHTS", none)).startswith(
            "FILE: model.weights_key: needs a file in model"
        )


def test_methods_are_mixed_freely(tmp_path: Path) -> None:
    methods = ["quantization={weight_method: dorefa, activation_method: lsq+}", "targets=[onnxruntime]"]
    loaded = recipe.load(write(tmp_path, MINIMAL), methods)
    assert loaded.quantization == QuantizationConfig(weight_method="dorefa", activation_method="lsq+")


def test_unlabeled_images_without_a_teacher_are_refused(tmp_path: Path) -> None:
    text = MINIMAL.replace("{source: digits}", "{source: digits, unlabeled: digits}")
    assert recipe.load(write(tmp_path, text)).data.unlabeled == "digits"
    for off in ("teacher: none", "weight: 0"):
        message = refusal(tmp_path, text + f"consistency: {{{off}}}\n")
        assert message.startswith("FILE: data.unlabeled: used only by the consistency term")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.unlabeled_root=frames"], "data.unlabeled_root: has no effect without data.unlabeled"),
        (["consistency.teacher=pseudo-label"], "consistency.teacher: pseudo-label needs unlabeled images; set data"),
        (
            ["consistency.teacher=pseudo-label", "data.labeled=100", "data.unlabeled_ratio=0"],
            "consistency.teacher: pseudo-label needs unlabeled images; set data",
        ),
        (["float.consistency={teacher: float}"], "float.consistency.teacher: float is not possible in float training"),
        (["float.fine_tune=true"], "float.fine_tune: needs given weights to continue from; name"),
        (["float.consistency={weigth: 1}"], "unknown key; did you mean `weight`?"),
    ],
)
def test_what_unlabeled_images_and_float_training_need(tmp_path: Path, overrides: list[str], message: str) -> None:
    assert message in refusal(tmp_path, MINIMAL, *overrides)


def test_given_weights_are_trained_on_only_if_the_recipe_says_so(tmp_path: Path) -> None:
    weights = ["model.weights=float.safetensors", "float.epochs=3"]
    fixed, tuned = (recipe.load(write(tmp_path, MINIMAL), [*weights, f"float.fine_tune={on}"]) for on in (False, True))
    assert recipe.train_config(fixed).float_training.epochs == 0
    assert recipe.resolved(fixed)["float"] is None
    assert recipe.train_config(tuned).float_training.epochs == 3
    assert recipe.load(write(tmp_path, json.dumps(recipe.resolved(tuned)))) == tuned


def test_several_errors_share_the_line(tmp_path: Path) -> None:
    text = refusal(tmp_path, "model: {}\nqat: {epochs: x, lr: x, batch_size: x}")
    assert text == (
        "FILE: name: missing; FILE: data: missing; FILE: model.name: missing; and 3 more"
    )  # fmt: skip


@pytest.mark.parametrize("name", ["../up", ".hidden", "a/b", "", "a b", "é", "a" * 101, "a\\nb"])
def test_names_that_are_no_directory_are_refused(tmp_path: Path, name: str) -> None:
    assert refusal(tmp_path, MINIMAL.replace("name: a\n", f'name: "{name}"\n')).startswith("FILE: name: ")


def test_float_section_or_weights_are_needed(tmp_path: Path) -> None:
    text = MINIMAL.replace("float: {epochs: 1}\n", "")
    assert refusal(tmp_path, text).startswith("FILE: float: missing")
    loaded = recipe.load(write(tmp_path, text), ["model.weights=w.pth"])
    assert recipe.resolved(loaded)["float"] is None


def test_a_checkpoint_of_nncf_brings_the_weights(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL.replace("float: {epochs: 1}\n", ""))
    loaded = recipe.load(path, ["model.nncf=start"])
    assert recipe.resolved(loaded)["float"] is None
    assert recipe.train_config(loaded).model.nncf == "start"
    text = path.read_text().replace("{name: cifar/resnet20}", "{name: cifar/resnet20, nncf: start, weights: w.pth}")
    assert refusal(tmp_path, text).startswith("FILE: model.nncf: the checkpoint already has the float weights")


def test_unused_float_section_does_not_change_what_train_depends_on(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    one, other = (recipe.load(path, ["model.weights=w.pth", f"float.epochs={epochs}"]) for epochs in (1, 2))
    assert recipe.train_config(one) == recipe.train_config(other)
    one, other = (recipe.load(path, [f"float.epochs={epochs}"]) for epochs in (1, 2))
    assert recipe.train_config(one).float_training == FloatConfig(epochs=1)
    assert recipe.train_config(other).float_training == FloatConfig(epochs=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", "FILE:2: the key `name` appears twice"),
        ("name: a\ndata: &x {source: digits}\nmodel: *x\n", "FILE:3: aliases are not allowed"),
        ("name: a\ndata: !!python/object:os.system {}\n", "FILE:2: the tag tag:yaml.org,2002:python/object:os.system"),
        ("name: !!binary aGk=\n", "FILE:1: the tag tag:yaml.org,2002:binary is not allowed"),
        ("name: a\nseed: [\n", "FILE:3: "),
        ("name: a\nqat: {lr: .inf}\n", "FILE:2: not a finite number"),
        ("name: a\nqat: {lr: 1e999}\n", "FILE:2: not a finite number"),
        ("name: a\nqat: {lr: .nan}\n", "FILE:2: not a finite number"),
        (f"seed: {'9' * 5000}\n", "FILE:1: not a finite number"),
        ("? [a]\n: b\n", "FILE:1: a key must be a word"),
        ("a: 1\n---\nb: 1\n", "FILE:2: "),
        ("[" * 5000, "FILE: nested too deeply"),
        ("name: a\x00b", "FILE: unacceptable character"),
        ("", "FILE: a recipe is a mapping of name, data"),
        ("- a\n", "FILE: a recipe is a mapping of name, data"),
    ],
)
def test_yaml_that_is_no_recipe_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, text).startswith(message)


def test_dates_and_exponents_mean_what_they_look_like(tmp_path: Path) -> None:
    loaded = recipe.load(write(tmp_path, MINIMAL.replace("name: a", "name: 2024-01-02") + "qat: {lr: 1e-4}\n"))
    assert loaded.name == "2024-01-02"
    assert loaded.qat.lr == 1e-4


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "none.yaml", "No such file"),
        (tmp_path, "Is a directory"),
        (Path("/dev/zero"), "larger than 64 KiB"),
    ):
        with pytest.raises(UsageError, match=message):
            recipe.load(path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"name: \xe9")
    with pytest.raises(UsageError, match="not UTF-8"):
        recipe.load(latin)


def test_set_replaces_values_of_the_file(tmp_path: Path) -> None:
    overrides = ["qat.epochs=3", "targets=[tensorrt]", "float.lr=1", "data.root=a=b", "gate={min_agreement: 0.5}"]
    loaded = recipe.load(write(tmp_path, MINIMAL), overrides)
    assert loaded.qat == QATConfig(epochs=3)
    assert loaded.targets == ("tensorrt",)
    assert loaded.float_training == FloatConfig(epochs=1, lr=1.0)
    assert loaded.data.root == "a=b"
    assert loaded.gate.min_agreement == 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("qat.epochs", "--set qat.epochs: write it as key.path=value"),
        ("qat..epochs=3", "--set qat..epochs=3: write it as key.path=value"),
        ("=3", "--set =3: write it as key.path=value"),
        ("qat.epoch=3", "--set qat.epoch: unknown key; did you mean `epochs`?"),
        ("qat.epochs=three", '--set qat.epochs: should be a valid integer, not "three"'),
        ("qat={epochs: three}", '--set qat.epochs: should be a valid integer, not "three"'),
        ("name.first=x", "--set name.first=x: `name` is a value, not a section"),
        ("qat.lr=[1", "--set qat.lr=[1:1: "),
    ],
)
def test_wrong_set_is_refused_by_its_own_name(tmp_path: Path, override: str, message: str) -> None:
    assert refusal(tmp_path, MINIMAL, override).startswith(message)


def test_resolved_is_json_and_complete(tmp_path: Path) -> None:
    loaded = recipe.load(write(tmp_path, MINIMAL))
    values = recipe.resolved(loaded)
    assert json.loads(json.dumps(values)) == values
    assert values["float"] == {
        "epochs": 1, "batch_size": 128, "lr": 0.1, "weight_decay": 5e-4, "precision": "float32",
        "fine_tune": False, "strong": "none", "consistency": None,
    }  # fmt: skip
    again = write(tmp_path, json.dumps(values))
    assert recipe.load(again) == loaded


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["digits", "lsq", "auto"])
)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner)
)


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """A valid recipe in which some values, and sometimes a key, are anything."""
    made: dict[str, Any] = yaml.safe_load(MINIMAL)
    for name in draw(st.lists(st.sampled_from(recipe.top_level_keys()), max_size=4)):
        keys = [item.name for item in fields(recipe.SECTIONS[name])] if name in recipe.SECTIONS else []
        known = st.dictionaries(st.sampled_from(keys or ["x"]), SCALARS, max_size=3)
        chosen: st.SearchStrategy[Any] = known if keys else ANYTHING
        made[name] = draw(chosen | ANYTHING)
    if draw(st.booleans()):
        made[draw(st.text(max_size=8))] = draw(ANYTHING)
    return made


@settings(max_examples=60, deadline=None)
@given(recipes())
def test_any_mapping_is_a_recipe_or_one_line(values: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
        try:
            loaded = recipe.load(path)
        except UsageError as error:
            assert str(error).isprintable()
            return
        path.write_text(json.dumps(recipe.resolved(loaded)))
        assert recipe.load(path) == loaded


def test_a_run_of_another_version_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    values = recipe.resolved(recipe.load(path))
    assert recipe.from_resolved(values) == recipe.load(path)
    values["quantization"]["method"] = "lsq"
    with pytest.raises(UsageError, match=r"quantization\.method: is now two keys.*another version of crqat: train it"):
        recipe.from_resolved(values)


def test_what_an_older_run_does_not_record_is_the_default_of_today(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    for key, value in recipe.resolved(recipe.load(path)).items():
        if key not in recipe.SECTIONS or value is None:
            assert recipe.completed(key, value) == value
            continue
        required = {item.name for item in fields(recipe.SECTIONS[key]) if not has_default(item)}
        given = {name: item for name, item in value.items() if name in required}
        assert recipe.completed(key, given).keys() == value.keys()
        for name in value.keys() - required:
            older = {other: item for other, item in value.items() if other != name}
            default = recipe.completed(key, older)[name]
            assert recipe.completed(key, {**older, name: "another"})[name] == "another" != default


def has_default(item: Field[Any]) -> bool:
    return item.default is not MISSING or item.default_factory is not MISSING


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[]", {}),
        ("[linear, 'layer1.*']", {"all": ("linear", "layer1.*")}),
        ("{tensorrt: [linear]}", {"tensorrt": ("linear",)}),
    ],
)
def test_float_layers_for_all_targets_or_for_one(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    loaded = recipe.load(write(tmp_path, f"{MINIMAL}quantization: {{float_layers: {text}}}\n"))
    assert loaded.quantization.float_layers == expected
    assert recipe.from_resolved(recipe.resolved(loaded)) == loaded


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("linear", "quantization.float_layers: should be a section"),
        ("[1]", "quantization.float_layers.all.0: should be a valid string, not 1"),
        ("{tensort: [linear]}", "quantization.float_layers.tensort: should be .*; did you mean `tensorrt`"),
    ],
)
def test_wrong_float_layers(tmp_path: Path, text: str, message: str) -> None:
    assert re.search(message, refusal(tmp_path, f"{MINIMAL}quantization: {{float_layers: {text}}}\n"))


def test_the_recipe_of_the_page_on_images_without_labels_is_valid(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "unlabeled.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    loaded = recipe.load(write(tmp_path, text))
    assert loaded.data.unlabeled_root == "frames"
    assert recipe.train_config(loaded).float_training.consistency is not None
