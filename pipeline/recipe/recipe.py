"""The recipe: one YAML file with the configuration of every stage, checked before anything runs."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from crqat.core import targets as runtimes
from crqat.core.errors import UsageError
from crqat.core.field_bounds import STRICT, Range
from crqat.export.config import ExportConfig
from crqat.pipeline.gate.rules import GateConfig
from crqat.pipeline.recipe.yaml import parse_yaml, read_yaml
from crqat.runtime_eval.config import BenchmarkConfig
from crqat.train.config import (
    COLOUR_SOURCES,
    FILE_SOURCES,
    FOLDER_CROP,
    FOLDER_SIZE,
    ConsistencyConfig,
    DataConfig,
    FloatConfig,
    ModelConfig,
    Override,
    PTQConfig,
    QATConfig,
    QuantizationConfig,
    Target,
    TrainConfig,
    is_onnx_file,
    source_kind,
)

SECTIONS: dict[str, type[Any]] = {
    "data": DataConfig,
    "model": ModelConfig,
    "float": FloatConfig,
    "quantization": QuantizationConfig,
    "qat": QATConfig,
    "consistency": ConsistencyConfig,
    "ptq": PTQConfig,
    "export": ExportConfig,
    "benchmark": BenchmarkConfig,
    "gate": GateConfig,
}
_SHOWN_ERRORS = 3
# Keys of older recipes, and their replacements.
_REPLACED = {
    "quantization.method": "is now two keys, `weight_method` and `activation_method`; replace it by both",
}


@dataclass(frozen=True)
class Recipe:
    """Contents of a recipe file; paths in it are relative to the current directory.

    Attributes:
        name: Name of the run's directory: letters, digits, "_", "-" and "."; not starting with a dot.
        data: Source and augmentation of the images.
        model: Architecture and weights of the float network.
        seed: Seed of all random numbers.
        targets: The runtimes that the network must run on.
        device: Device of the training; "auto" uses CUDA if available.
        compile: "auto" fuses the training step with torch.compile if a C++ compiler is available.
        tracker: "tensorboard" writes epochs and final results into runs/NAME/tensorboard; null writes none.
        float_training: The `float` section: how the float network is trained if `model.weights` names no weights.
        quantization: Bit widths and quantization methods.
        qat: How the quantized network is trained (quantization-aware training).
        consistency: Loss that keeps the predictions of the trained network close to those of a teacher.
        ptq: Post-training methods that run after calibration, before any training.
        export: Which network is exported, and into which files.
        benchmark: How the exported files are measured.
        gate: Limits that the results must meet.
    """

    __pydantic_config__: ClassVar[Any] = STRICT
    name: str
    data: DataConfig
    model: ModelConfig
    seed: Annotated[int, Range(ge=0, lt=2**32)] = 0
    targets: tuple[Target, ...] = ("onnxruntime", "tensorrt")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: Literal["auto", "never"] = "auto"
    tracker: Literal["tensorboard"] | None = None
    float_training: Annotated[FloatConfig | None, pydantic.Field(alias="float")] = None
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    qat: QATConfig = field(default_factory=QATConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    ptq: PTQConfig = field(default_factory=PTQConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    gate: GateConfig = field(default_factory=GateConfig)


def top_level_keys() -> list[str]:
    """Return the top-level keys of a recipe, as YAML spells them."""
    return ["float" if item.name == "float_training" else item.name for item in fields(Recipe)]


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in a YAML file, after checking it.

    Args:
        path: The YAML file.
        overrides: "key.path=value" texts that replace values of the file; the values are YAML.

    Raises:
        UsageError: The recipe is wrong; the message names the place, the problem and the fix in one line.
    """
    data = read_yaml(path)
    if not isinstance(data, dict):
        msg = f"{path}: a recipe is a mapping of {', '.join(top_level_keys())}; `crqat init` writes one"
        raise UsageError(msg)
    overridden = [_override(data, text) for text in overrides]
    try:
        recipe = pydantic.TypeAdapter(Recipe).validate_json(json.dumps(data), strict=True)
    except pydantic.ValidationError as error:
        problems = [_explain(detail, path, overridden) for detail in error.errors()]
        more = f"; and {len(problems) - _SHOWN_ERRORS} more" if len(problems) > _SHOWN_ERRORS else ""
        raise UsageError("; ".join(problems[:_SHOWN_ERRORS]) + more) from error
    problem = _contradiction(recipe)
    if problem is not None:
        msg = f"{path}: {problem}"
        raise UsageError(msg)
    return recipe


def _override(data: dict[str, Any], text: str) -> str:
    """Apply one `--set` to the recipe's data and return the key's path."""
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        msg = f"--set {text}: write it as key.path=value, for example qat.epochs=3"
        raise UsageError(msg)
    section = data
    for key in keys[:-1]:
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            msg = f"--set {text}: `{key}` is a value, not a section"
            raise UsageError(msg)
    section[keys[-1]] = parse_yaml(value, f"--set {text}")
    return ".".join(keys)


def _explain(detail: Any, path: Path, overridden: Sequence[str]) -> str:
    """Return one pydantic validation error as a line for the user."""
    place = ".".join(str(part) for part in detail["loc"] if part != "[key]")
    from_option = any(f"{place}.".startswith(f"{key}.") for key in overridden)
    where = f"--set {place}" if from_option else f"{path}: {place}"
    if detail["type"] == "unexpected_keyword_argument":
        *section, key = detail["loc"]
        if place in _REPLACED:
            return f"{where}: {_REPLACED[place]}"
        kind = None
        if section:
            # The last name that is a section; `consistency` is one inside `float` too.
            kind = Override if "overrides" in section else SECTIONS[[str(s) for s in section if s in SECTIONS][-1]]
        valid = top_level_keys() if kind is None else [item.name for item in fields(kind)]
        near = _near(str(key), valid)
        hint = f"did you mean `{near[0]}`?" if near else f"valid here: {', '.join(valid)}"
        return f"{where}: unknown key; {hint}"
    if detail["type"] == "missing":
        return f"{path}: {place}: missing"
    message = detail["msg"].replace("Input should be an object", "should be a section of key: value lines")
    given = json.dumps(detail["input"])
    shown = given if len(given) <= 60 else f"{given[:57]}..."
    hint = ""
    if detail["type"] == "literal_error":
        valid = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
        hint = "".join(f"; did you mean `{name}`?" for name in _near(str(detail["input"]), valid))
    return f"{where}: {message.replace('Input should', 'should')}, not {shown}{hint}"


def _near(word: str, valid: Sequence[str]) -> list[str]:
    """Return the valid name closest to a wrong one, ignoring case, if there is one."""
    names = {name.lower(): name for name in valid}
    return [names[name] for name in difflib.get_close_matches(word.lower(), names, n=1)]


def _contradiction(recipe: Recipe) -> str | None:
    """Return what is wrong with keys that are each valid but do not fit together; None if nothing is."""
    allowed = all(letter.isascii() and (letter.isalnum() or letter in "_.-") for letter in recipe.name)
    if not allowed or not recipe.name or recipe.name.startswith(".") or len(recipe.name) > 100:
        return (
            f"name: {json.dumps(recipe.name)} cannot name a directory; "
            "use up to 100 letters, digits, `_`, `-` and `.`, no dot in front"
        )
    if recipe.export.candidate == "teacher" and (recipe.consistency.teacher != "ema" or not recipe.qat.epochs):
        return "export.candidate: the training has no teacher; set consistency.teacher: ema, or candidate: student"
    problem = _unlabeled(recipe)
    if problem is not None:
        return problem
    kinds = {source_kind(recipe.data.source), source_kind(recipe.data.unlabeled)}
    problem = _channels(recipe, kinds)
    if problem is not None:
        return problem
    resized = [key for key in ("size", "crop", "interpolation", "convert") if getattr(recipe.data, key)]
    if resized and not kinds & set(FILE_SOURCES):
        return f"data.{resized[0]}: applies only to {', '.join(FILE_SOURCES)}, whose images are files; remove it"
    if recipe.data.image_list is not None and recipe.data.source != "imagelist":
        return "data.image_list: applies only to data.source: imagelist; remove it"
    columns = [key for key in ("image_column", "label_column") if getattr(recipe.data, key) is not None]
    if columns and "huggingface" not in kinds:
        return f"data.{columns[0]}: applies only to huggingface, whose data sets are tables; remove it"
    # Sizes missing with pretrained weights are looked up in their library later.
    published = recipe.model.weights == "pretrained" and None in (recipe.data.size, recipe.data.crop)
    if not published and (recipe.data.crop or FOLDER_CROP) > (recipe.data.size or FOLDER_SIZE):
        return "data.crop: larger than data.size, the shorter side it is cut from; set both"
    for pattern, override in recipe.quantization.overrides.items():
        if override == Override():
            return f"quantization.overrides.{pattern}: empty; set weights, activations or both"
    problem = _progression(recipe)
    if problem is not None:
        return problem
    for key, targets in (("targets", recipe.targets), ("export.targets", recipe.export.targets)):
        if targets is not None and (not targets or len(set(targets)) != len(targets)):
            return f"{key}: list each runtime once, at least one"
        refusing = runtimes.union(targets or ()).without_zero_points
        if refusing is not None and recipe.quantization.activation_method == "lsq+":
            others = ", ".join(target.name for target in runtimes.TARGETS.values() if target.zero_points)
            return (
                f"{key}: {refusing.title} refuses zero points other than 0, which activation_method `lsq+` learns; set "
                f"{key} to [{others}], or quantization.activation_method to lsq"
            )
    if recipe.model.nncf is not None and recipe.model.weights is not None:
        return "model.nncf: the checkpoint already has the float weights; remove model.weights"
    if recipe.model.weights_key is not None and recipe.model.weights in (None, "pretrained"):
        return "model.weights_key: needs a file in model.weights; set it to the file, or remove this key"
    if recipe.model.weights is None and recipe.float_training is None and not recipe.model.has_weights:
        return "float: missing; add it to train the float network, or name its weights in model.weights"
    return None


def _unlabeled(recipe: Recipe) -> str | None:
    """Return a problem of unlabeled images or of their use; None if there is none."""
    data, section = recipe.data, recipe.float_training
    in_float = None if section is None else section.consistency
    used = [term for term in (recipe.consistency, in_float) if term and term.teacher != "none" and term.weight > 0]
    if data.unlabeled is not None and not used:
        return "data.unlabeled: used only by the consistency term, which is off; set consistency.teacher and .weight"
    if data.unlabeled_root is not None and data.unlabeled is None:
        return "data.unlabeled_root: has no effect without data.unlabeled; add `unlabeled: imagefolder`"
    found = data.unlabeled_ratio > 0 and (data.unlabeled is not None or data.labeled is not None)
    if recipe.consistency.teacher == "pseudo-label" and not found:
        return "consistency.teacher: pseudo-label needs unlabeled images; set data.unlabeled or data.labeled"
    if in_float is not None and in_float.teacher != "ema":
        return f"float.consistency.teacher: {in_float.teacher} is not possible in float training; set it to ema"
    if (
        section is not None
        and section.fine_tune
        and recipe.model.weights is None
        and not is_onnx_file(recipe.model.name)
    ):
        return "float.fine_tune: needs given weights to continue from; name their file in model.weights, or remove it"
    return None


def _channels(recipe: Recipe, kinds: set[str | None]) -> str | None:
    """Return a problem of `data.channels`, `data.mean` and `data.std`; None if there is none."""
    data = recipe.data
    if data.channels is not None and not kinds & set(COLOUR_SOURCES):
        return f"data.channels: applies only to {', '.join(COLOUR_SOURCES)}; other sources determine it; remove it"
    if source_kind(data.source) not in COLOUR_SOURCES:
        return None
    channels = data.channels or 3
    for key, values in (("mean", data.mean), ("std", data.std)):
        if values is not None and len(values) != channels:
            return f"data.{key}: has {len(values)} numbers for {channels} channels (data.channels); give one for each"
    return None


def _progression(recipe: Recipe) -> str | None:
    """Return a problem of `qat.progressive_bits`; None if there is none."""
    bits, quantization = recipe.qat.progressive_bits, recipe.quantization
    if not bits:
        return None
    if list(bits) != sorted(set(bits), reverse=True):
        return f"qat.progressive_bits: {list(bits)} must decrease"
    asked = [quantization.weights, quantization.activations, quantization.first_layer, quantization.last_layer]
    for override in quantization.overrides.values():
        asked += [width for width in (override.weights, override.activations) if width is not None]
    least = min(asked)
    if bits[-1] > least:
        return f"qat.progressive_bits: ends at {bits[-1]}, above the smallest requested bit width; add {least}"
    return None


def _trained(recipe: Recipe) -> FloatConfig | None:
    """Return the section that trains the float network; None if its weights are given and stay unchanged."""
    section = recipe.float_training
    return None if section is None or (recipe.model.has_weights and not section.fine_tune) else section


def from_resolved(values: dict[str, Any]) -> Recipe:
    """Return the recipe with the values that `resolved` returned, as a manifest stores them.

    Raises:
        UsageError: The recipe was written by a version with other keys.
    """
    try:
        return pydantic.TypeAdapter(Recipe).validate_json(json.dumps(values), strict=True)
    except pydantic.ValidationError as error:
        problem = _explain(error.errors()[0], Path("the run's recipe"), ())
        msg = f"{problem}; the run is from another version of crqat: train it again"
        raise UsageError(msg) from error


def train_config(recipe: Recipe) -> TrainConfig:
    """Return the configuration of the `train` stage: the keys of a recipe that it depends on."""
    return TrainConfig(
        seed=recipe.seed,
        targets=recipe.targets,
        data=recipe.data,
        model=recipe.model,
        # Unused with given weights: a fixed value keeps a change of it from triggering a new training run.
        float_training=_trained(recipe) or FloatConfig(epochs=0),
        quantization=recipe.quantization,
        qat=recipe.qat,
        consistency=recipe.consistency,
        ptq=recipe.ptq,
        device=recipe.device,
        compile=recipe.compile,
    )


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Return all values of a recipe, defaults included, as JSON values under the keys of the YAML file."""
    values = asdict(recipe)
    values["float"] = values.pop("float_training")
    if _trained(recipe) is None:
        values["float"] = None
    data: dict[str, Any] = json.loads(json.dumps(values))
    return data


def completed(key: str, recorded: Any) -> Any:
    """Return a recorded value of a recipe's top-level key, with the defaults of entries that it lacks.

    Args:
        key: Top-level key of the recipe, such as "qat".
        recorded: Value of the key in a manifest, which an older version with fewer entries may have written.
    """
    kind = SECTIONS.get(key)
    if recorded is None and key in {item.name for item in fields(Recipe) if item.default_factory is not MISSING}:
        recorded = {}
    if kind is None or not isinstance(recorded, dict):
        return recorded
    defaults = {item.name: item.default for item in fields(kind) if item.default is not MISSING}
    made = {item.name: item.default_factory() for item in fields(kind) if item.default_factory is not MISSING}
    return {**json.loads(json.dumps(defaults | made)), **recorded}
