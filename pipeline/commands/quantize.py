"""The `quantize` command: turns a network and a folder of images into verified INT8 files, with a recipe it writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from crqat.core.errors import ToolError, UsageError
from crqat.core.field_bounds import user_path
from crqat.core.progress import Progress
from crqat.core.typed_json import text
from crqat.train.config import FOLDER_CROP, FOLDER_SIZE, LARGEST_UNIT, is_onnx_file

if TYPE_CHECKING:
    from crqat.train.models.onnx_network import OnnxNetwork

# Largest number of calibration images; a folder with fewer than twice as many gives half of its images.
CALIBRATION = 100
_FEWEST = 20
_IMAGENET = 1000
_Number = TypeVar("_Number", int, float)
# The option for each key of a recipe that an error may name; the user of this command has written no recipe.
_OPTIONS = {
    r"model\.name": "MODEL",
    r"model\.weights": "--weights",
    r"quantization\.(weights|activations)": "--bits",
    r"data\.(mean|std|size|crop|interpolation)(\.\d+)?": r"--\1",
    r"set data\.channels: 1": "give one number for --mean and for --std",
    r", or set data\.convert: true to convert such images": "",
    "--runs": "--out",
}


@dataclass(frozen=True)
class Request:
    """Options of one call of `crqat quantize`.

    Attributes:
        model: Network as in `model.name` of a recipe, such as a float ONNX file, or the bare name of a torchvision or
            timm network.
        images: Folder with one folder of images for each class, or with images alone.
        test: Folder of the same kind with the test images; None splits `images`.
        weights: Checkpoint; None uses weights that torchvision or timm publish, or those of an ONNX file.
        labels: Whether class folders are used as labels.
        classes: Number of logits if class folders do not give it; None means 1,000 for published weights, or an ONNX
            file's own number.
        bits: Bit widths of weights and activations.
        advise: Whether half of the test images select the quantization method; the other half tests the network
            that the selected method gives.
        max_drop: Allowed accuracy drop in percentage points; without it (None), the results are not judged.
        seed: Seed of the random split into calibration and test images.
        preprocessing: Given values of `mean`, `std`, `size`, `crop` and `interpolation`, by their key in a recipe's
            `data` section.
        out: Directory for the recipe, the list of images and the run.
    """

    model: str
    images: Path
    test: Path | None
    weights: str | None
    labels: bool
    classes: int | None
    bits: tuple[int, int]
    advise: bool
    max_drop: float | None
    seed: int
    preprocessing: dict[str, Any]
    out: Path


@contextmanager
def in_options(out: Path) -> Iterator[None]:
    """Context manager in which errors name the options of the command, not the keys of the recipe that it writes.

    Args:
        out: Directory of the recipe.
    """
    try:
        yield
    except (UsageError, ToolError) as error:
        parts = str(error).replace(f"{out / 'recipe.yaml'}: ", "").split("; ")
        for key, option in _OPTIONS.items():
            parts = [re.sub(key, option, part) for part in parts]
        # Each of three numbers may be wrong for the same reason.
        raise type(error)("; ".join(dict.fromkeys(parts))) from error


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
    found = _listed(request.images, "--images", request.labels)
    if weights != "pretrained" and imported is None:
        data = _sized(request, data, progress)
    judging = None if request.test is None else _listed(request.test, "--test", request.labels)
    if judging is not None and judging[0] != found[0]:
        msg = (
            f"--test: {request.test} has other class folders than {request.images}; give both the same, or --no-labels"
        )
        raise UsageError(msg)
    calibrating, test = _split(request, found[1], None if judging is None else judging[1])
    _check_apart(request, calibrating, test)
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
        choosing, test = _halves(request, test)
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


def _listed(folder: Path, option: str, labels: bool) -> tuple[tuple[str, ...] | None, dict[str, int]]:
    """Return the class names (None without labels), and a map of image paths to class indices (0 without labels)."""
    from crqat.train.data.imagefolder import list_images

    folder = user_path(str(folder), option)
    paths = [file.path.relative_to(folder) for file in list_images(folder, option)]
    names = tuple(sorted({path.parts[0] for path in paths if len(path.parts) > 1}))
    loose = [path.name for path in paths if len(path.parts) == 1]
    if not labels or not names:
        return None, {str(path): 0 for path in paths}
    if loose:
        msg = f"{option}: {folder} has images outside its class folders, like {loose[0]}; move them, or use --no-labels"
        raise UsageError(msg)
    if len(names) == 1:
        msg = f"{option}: {folder} has one class folder, {names[0]}; add folders of other classes, or use --no-labels"
        raise UsageError(msg)
    return names, {str(path): names.index(path.parts[0]) for path in paths}


def _split(
    request: Request, images: dict[str, int], judging: dict[str, int] | None
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the calibration and the test images, a random split by the request's seed; no image is in both."""
    import torch

    if len(images) < _FEWEST:
        msg = f"--images: {request.images} has {len(images)} images; at least {_FEWEST} are needed"
        raise UsageError(msg)
    count = min(CALIBRATION, len(images) // 2) if judging is None else min(CALIBRATION, len(images))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(request.seed)).tolist()
    paths = list(images)
    calibrating = {paths[index]: images[paths[index]] for index in sorted(order[:count])}
    if judging is None:
        return calibrating, {paths[index]: images[paths[index]] for index in sorted(order[count:])}
    root = (request.test or request.images).resolve()
    return calibrating, {str(root / path): label for path, label in judging.items()}


def _check_apart(request: Request, calibrating: dict[str, int], test: dict[str, int]) -> None:
    """Check that no calibration image is a test image."""
    root = request.images.resolve()
    same = {(root / path).resolve() for path in calibrating} & {(root / path).resolve() for path in test}
    if same:
        msg = (
            f"--test: {len(same)} of its images are among the calibration images, such as {min(same)}; give a folder "
            "of other images, or leave --test out to split --images"
        )
        raise UsageError(msg)


def _halves(request: Request, images: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Split the test images at random: one half selects the quantization method, the other tests the selected one."""
    import torch

    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(request.seed + 1)).tolist()
    chosen, paths = set(order[: len(images) // 2]), list(images)
    halves: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for index, path in enumerate(paths):
        halves[index not in chosen][path] = images[path]
    return halves


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


def numbers(given: str, option: str, kind: Callable[[str], _Number]) -> list[_Number]:
    """Return the numbers in a text that separates them by commas, converted by `kind`.

    Raises:
        UsageError: The text is not a list of numbers; the message names the option.
    """
    try:
        return [kind(part) for part in given.split(",")]
    except ValueError:
        msg = f"{option}: {given} is not a list of numbers, such as 8,8 or 0.485,0.456,0.406"
        raise UsageError(msg) from None


def run_name(model: str, bits: Sequence[int]) -> str:
    """Return a name for the run of `model` at these bit widths that is valid as the name of a directory."""
    model = Path(model).stem if is_onnx_file(model) else model
    letters = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in model)
    return f"{letters}-w{bits[0]}a{bits[1]}"
