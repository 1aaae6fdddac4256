"""The `quantize` command: turns a network and a folder of images into verified INT8 files, with a recipe it writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from crqat.core.errors import ToolError, UsageError
from crqat.core.field_bounds import user_path
from crqat.core.progress import Progress
from crqat.core.typed_json import text
from crqat.pipeline.commands.quantize_images import halves, listed, split
from crqat.pipeline.commands.quantize_request import Request
from crqat.train.config import FOLDER_CROP, FOLDER_SIZE, LARGEST_UNIT, is_onnx_file

if TYPE_CHECKING:
    from crqat.train.models.onnx_network import OnnxNetwork

_IMAGENET = 1000


def write_recipe(request: Request, progress: Progress) -> Path:
    """Split the images, label them with the float network if they have no labels, and write the list and the recipe.

    Returns:
        The path of the recipe; its run lies in the same folder.

    Raises:
        UsageError: Images, weights or preprocessing are missing or do not fit; the message names the option.
        ToolError: A file cannot be read or written, or published weights cannot be fetched.
    """
    if request.advise and request.max_drop is None:
        msg = "--advise: needs --max-drop POINTS, the accuracy drop up to which a step passes, in percentage points"
        raise UsageError(msg)
    name = _full_name(request.model)
    imported = _imported(name)
    weights = None if imported is not None and request.weights is None else _weights(name, request)
    data = _preprocessing(name, weights, request)
    if imported is not None:
        data = _of_file(name, imported, data)
    found = listed(request.images, "--images", request.labels)
    if weights != "pretrained" and imported is None:
        data = _sized(request, data, progress)
    judging = None if request.test is None else listed(request.test, "--test", request.labels)
    if judging is not None and judging[0] != found[0]:
        msg = (
            f"--test: {request.test} has other class folders than {request.images}; give both the same, or --no-labels"
        )
        raise UsageError(msg)
    calibrating, test = split(request, found[1], None if judging is None else judging[1])
    names = found[0]
    if names is not None and request.classes not in (None, len(names)):
        msg = f"--classes: {request.classes}, but {request.images} has {len(names)} class folders; leave --classes out"
        raise UsageError(msg)
    if imported is not None:
        _check_classes(request, name, imported.classes, names)
    run = request.out.name
    recipe: dict[str, Any] = {
        "name": run,
        "seed": request.seed,
        "data": {
            "source": "imagelist",
            "root": str(request.images.resolve()),
            "image_list": str(request.out / "images.json"),
            **data,
        },
        "model": {"name": name} | ({} if weights is None else {"weights": weights}),
        "quantization": {
            "weights": request.bits[0],
            "activations": request.bits[1],
            "calibration_images": len(calibrating),
        },
        "qat": {"epochs": 0},
        "consistency": {"teacher": "none"},
        "gate": {"max_accuracy_drop": request.max_drop},
    }
    if weights == "pretrained":
        recipe["float"] = {"epochs": 0}
    labels_of = ""
    if names is None:
        count = request.classes or (_classes(name, weights) if imported is None else imported.classes)
        names, labels_of = tuple(f"class {index}" for index in range(count)), name
        calibrating, test = _answers(recipe, request, names, calibrating, test, progress)
    choosing: dict[str, int] = {}
    if request.advise:
        choosing, test = halves(request, test)
    _write(request.out, recipe, names, calibrating, test, labels_of, choosing)
    return request.out / "recipe.yaml"


def _full_name(name: str) -> str:
    """Return a network's name as a recipe spells it."""
    if ":" in name or "/" in name or is_onnx_file(name):
        return name
    from torchvision.models import list_models  # type: ignore[import-untyped]

    return f"torchvision/{name}" if name in list_models() else f"timm/{name}"


def _weights(name: str, request: Request) -> str:
    if request.weights is not None:
        if request.weights != "pretrained" and not user_path(request.weights, "--weights").is_file():
            msg = f"--weights: no file {request.weights} (relative to {Path.cwd()}); correct the path"
            raise UsageError(msg)
        return request.weights
    if name.startswith(("torchvision/", "timm/")):
        return "pretrained"
    msg = f"--weights: {name} has no published weights; give a checkpoint"
    raise UsageError(msg)


def _imported(name: str) -> OnnxNetwork | None:
    """Return the network in the ONNX file `name`; None if `name` is not an ONNX file."""
    if not is_onnx_file(name):
        return None
    from crqat.train.models import from_onnx, onnx_file
    from crqat.train.quantizers.finalize import check_values

    network = from_onnx.network(onnx_file.read(user_path(name, "MODEL")))
    check_values(network, f"MODEL: {name}")
    return network


def _of_file(name: str, network: OnnxNetwork, data: dict[str, Any]) -> dict[str, Any]:
    """Return the `data` section's keys that the input of an ONNX file requires.

    Raises:
        UsageError: The network takes images that are not square, or of other than 1 or 3 channels; or --size or
            --crop is missing or contradicts it.
    """
    _, channels, height, width = network.shape
    if channels not in (1, 3):
        msg = (
            f"MODEL: {name} takes images of {channels} channels, but image files have 1 or 3; write a recipe with your "
            "own function as data.source"
        )
        raise UsageError(msg)
    if None not in (height, width) and height != width:
        msg = (
            f"MODEL: {name} takes images of {height} x {width}, but images are cropped to squares; write a recipe with "
            "your own function as data.source"
        )
        raise UsageError(msg)
    data = data | ({"channels": 1} if channels == 1 else {})
    side = height or width
    if side is None:
        if data["size"] is None:
            msg = (
                f"--size: missing, and {name} takes images of any size; give --size (the shorter side after resizing) "
                "and --crop, in pixels"
            )
            raise UsageError(msg)
        return data | {"crop": data["crop"] or data["size"]}
    if data["crop"] not in (None, side):
        msg = f"--crop: {data['crop']}, but {name} takes images of {side} x {side}; leave --crop out"
        raise UsageError(msg)
    if data["size"] is None and side != FOLDER_CROP:
        msg = (
            f"--size: give the shorter side of an image after resizing, in pixels, before {side} x {side} are cropped "
            f"from the center for {name}, such as --size {side}"
        )
        raise UsageError(msg)
    return data | {"size": data["size"] or FOLDER_SIZE, "crop": side}


def _check_classes(request: Request, name: str, classes: int, names: Sequence[str] | None) -> None:
    if request.classes not in (None, classes):
        msg = f"--classes: {request.classes}, but {name} has {classes} outputs; leave --classes out"
        raise UsageError(msg)
    if names is not None and len(names) != classes:
        msg = (
            f"--images: {request.images} has {len(names)} class folders, but {name} has {classes} outputs; give as "
            "many class folders as outputs, named so that they sort in the order of the outputs, or use --no-labels"
        )
        raise UsageError(msg)


def _preprocessing(name: str, weights: str | None, request: Request) -> dict[str, Any]:
    """Return the preprocessing keys of the `data` section; values published with the weights are left out."""
    given = {key: value for key, value in request.preprocessing.items() if value is not None}
    for key in ("mean", "std"):
        large = next((number for number in given.get(key, ()) if abs(number) > LARGEST_UNIT), None)
        if large is not None:
            msg = f"--{key}: {large:g} is not in units of 0..1; divide the numbers by 255"
            raise UsageError(msg)
    if any(len(given.get(key, ())) == 1 for key in ("mean", "std")):  # a single number is for grey images
        given["channels"] = 1
    if weights == "pretrained":
        return given
    missing = [key for key in ("mean", "std") if key not in given]
    if missing:
        msg = (
            f"--{missing[0]}: {name} needs the normalization of its training, which {weights or 'the file'} does not "
            "state; give --mean and --std of each channel in units of 0..1, such as --mean 0.485,0.456,0.406"
        )
        raise UsageError(msg)
    if is_onnx_file(name):  # the file determines it
        return {"size": None, "crop": None, **given}
    return given


def _sized(request: Request, data: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Return `data` with size and crop: `common_side` of the images if they have one, else ImageNet's."""
    from crqat.pipeline.commands import folder_of_images
    from crqat.train.data.imagefolder import list_images

    if "size" not in data and "crop" not in data:
        sides = folder_of_images.sides_of(list_images(user_path(str(request.images), "--images"), "--images"))
        only = folder_of_images.common_side(sides)
        if only is not None:
            return data | {"size": only, "crop": only}
        note = f"resized to {FOLDER_SIZE} and cropped to {FOLDER_CROP} pixels; set --size and --crop for another input"
        progress("images", 1, 1, note)
    return {"size": FOLDER_SIZE, "crop": FOLDER_CROP, **data}


def _classes(name: str, weights: str | None) -> int:
    if weights == "pretrained":
        return _IMAGENET
    msg = f"--classes: give the number of classes of {name}; images without class folders do not show it"
    raise UsageError(msg)


def _answers(
    recipe: dict[str, Any],
    request: Request,
    names: Sequence[str],
    calibrating: dict[str, int],
    test: dict[str, int],
    progress: Progress,
) -> tuple[dict[str, int], dict[str, int]]:
    """Return both maps of images to classes with the float network's predictions as the classes."""
    from crqat.pipeline.recipe import recipe as recipes
    from crqat.train.data import sources
    from crqat.train.models import build as models
    from crqat.train.models import published
    from crqat.train.training.evaluate import answers

    # In the order of the file, which is sorted.
    calibrating, test = dict(sorted(calibrating.items())), dict(sorted(test.items()))
    _write(request.out, recipe, names, calibrating, test, "")
    config = recipes.train_config(recipes.load(request.out / "recipe.yaml"))
    dataset = sources.of_recipe(published.data_section(config), progress)
    channels = dataset.train_images.shape[1]
    if config.model.weights == "pretrained":
        network, _ = models.pretrained(config.model.name, len(names), channels)
    else:
        network = models.build(config.model.name, len(names), channels)
        if config.model.weights is not None:
            models.load_weights(network, user_path(config.model.weights, "--weights"))
    found = []
    for part, images in ((calibrating, dataset.train_images), (test, dataset.test_images)):
        seen = answers(network.eval(), images, dataset.preprocessing).tolist()
        progress("predictions of the float network", len(part), len(part))
        found.append(dict(zip(part, seen, strict=True)))
    if len(only := {answer for part in found for answer in part.values()}) == 1:
        msg = (
            f"MODEL: the float network predicts {names[only.pop()]} for all {len(calibrating) + len(test)} images, so "
            "agreement with it would say nothing; check --weights, --mean and --std"
        )
        raise UsageError(msg)
    return found[0], found[1]


def _write(
    out: Path,
    recipe: dict[str, Any],
    names: Sequence[str],
    calibrating: dict[str, int],
    test: dict[str, int],
    labels_of: str,
    judging: dict[str, int] | None = None,
) -> None:
    from crqat.train.data.imagelist import ImageList

    try:
        out.mkdir(parents=True, exist_ok=True)
        listed = ImageList(list(names), calibrating, test, labels_of, judging or {})
        for file, content in (("images.json", text(listed)), ("recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))):
            partial = out / f".{file}.partial"
            partial.write_text(content + "\n")
            partial.replace(out / file)
    except OSError as error:
        msg = f"--out: {out} cannot be written: {error.strerror}"
        raise ToolError(msg) from error
