"""The `quantize` command: a network and a folder of images become verified INT8 files, by a recipe that it writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from crqat.core.errors import ToolError, UsageError
from crqat.core.field_bounds import user_path
from crqat.core.progress import Progress
from crqat.core.typed_json import text
from crqat.train.config import FOLDER_CROP, FOLDER_SIZE, is_onnx_file

if TYPE_CHECKING:
    from crqat.train.models.onnx_network import OnnxNetwork

# At most so many images calibrate; half of a folder with fewer than twice as many.
CALIBRATION = 100
_FEWEST = 20
_IMAGENET = 1000
_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    Attributes:
        model: As `model.name` of a recipe, such as a float ONNX file, or the name alone of a network of torchvision or
            timm.
        images: A folder of class folders, or of images without classes.
        test: A folder of the same kind whose images judge; None splits `images`.
        weights: A checkpoint; None takes what torchvision or timm publish, or those of an ONNX file.
        labels: Whether class folders are labels.
        classes: Logits of the network where no class folders say it; None is 1,000 for published weights, and what an
            ONNX file has.
        bits: Of weights and of activations.
        advise: Whether half of the images that judge choose between ways to quantize; the others judge the chosen one.
        max_drop: Percentage points that may be lost; None judges nothing.
        seed: Of the split.
        preprocessing: `mean`, `std`, `size`, `crop` and `interpolation` of a recipe's `data` section, as far as given.
        out: Where the recipe, the list of images and the run go.
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


def write_recipe(request: Request, progress: Progress) -> Path:
    """Split the images, label them if nobody has, and write the list and the recipe.

    Returns:
        The recipe's path; its run has the same folder.

    Raises:
        UsageError: Images, weights or preprocessing are missing or do not fit; the message names the option.
        ToolError: A file cannot be read or written, or published weights cannot be fetched.
    """
    if request.advise and request.max_drop is None:
        msg = "--advise: looks for the cheapest way that passes; say what passes by --max-drop POINTS"
        raise UsageError(msg)
    name = _full_name(request.model)
    imported = _imported(name)
    weights = None if imported is not None and request.weights is None else _weights(name, request)
    data = _preprocessing(name, weights, request)
    if imported is not None:
        data = _of_file(name, imported, data)
    found = _listed(request.images, "--images", request.labels)
    judging = None if request.test is None else _listed(request.test, "--test", request.labels)
    if judging is not None and judging[0] != found[0]:
        msg = (
            f"--test: {request.test} has other class folders than {request.images}; give both the same, or --no-labels"
        )
        raise UsageError(msg)
    calibrating, test = _split(request, found[1], None if judging is None else judging[1])
    names = found[0]
    if names is not None and request.classes not in (None, len(names)):
        msg = (
            f"--classes: {request.classes}, and {request.images} has {len(names)} class folders; leave one of them out"
        )
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
    """A network's name as a recipe has it."""
    if ":" in name or "/" in name or is_onnx_file(name):
        return name
    from torchvision.models import list_models  # type: ignore[import-untyped]

    return f"torchvision/{name}" if name in list_models() else f"timm/{name}"


def _weights(name: str, request: Request) -> str:
    if request.weights is not None:
        return request.weights
    if name.startswith(("torchvision/", "timm/")):
        return "pretrained"
    msg = f"--weights: {name} needs a checkpoint of its weights; nobody publishes them"
    raise UsageError(msg)


def _imported(name: str) -> OnnxNetwork | None:
    """The network of an ONNX file; None of another name."""
    if not is_onnx_file(name):
        return None
    from crqat.train.models import from_onnx, onnx_file

    return from_onnx.network(onnx_file.read(user_path(name, "MODEL")))


def _of_file(name: str, network: OnnxNetwork, data: dict[str, Any]) -> dict[str, Any]:
    """The `data` section's keys, as the input of an ONNX file wants them.

    Raises:
        UsageError: It wants images that no folder has, or does not say how they are resized; the message says so.
    """
    _, channels, height, width = network.shape
    if channels not in (1, 3):
        msg = f"MODEL: {name} takes images of {channels} channels, and files of a folder have 1 or 3; write a recipe"
        raise UsageError(msg)
    if None not in (height, width) and height != width:
        msg = f"MODEL: {name} takes images of {height} x {width}, and squares are cut out here; write a recipe"
        raise UsageError(msg)
    data = data | ({"channels": 1} if channels == 1 else {})
    side = height or width
    if side is None:
        if data["size"] is None:
            msg = f"--size: {name} takes images of any size; give --size, pixels of the shorter side, and --crop"
            raise UsageError(msg)
        return data | {"crop": data["crop"] or data["size"]}
    if data["crop"] not in (None, side):
        msg = f"--crop: {data['crop']}, and {name} takes images of {side} x {side}; leave it out"
        raise UsageError(msg)
    if data["size"] is None and side != FOLDER_CROP:
        msg = (
            f"--size: to how many pixels is the shorter side of an image resized, before {side} x {side} are cut out "
            f"of the center for {name}? Give it, such as --size {side}"
        )
        raise UsageError(msg)
    return data | {"size": data["size"] or FOLDER_SIZE, "crop": side}


def _check_classes(request: Request, name: str, classes: int, names: Sequence[str] | None) -> None:
    if request.classes not in (None, classes):
        msg = f"--classes: {request.classes}, and {name} has {classes} outputs; leave it out"
        raise UsageError(msg)
    if names is not None and len(names) != classes:
        msg = (
            f"--images: {request.images} has {len(names)} class folders, and {name} has {classes} outputs; give one "
            "for each, in the order of their names, or use --no-labels"
        )
        raise UsageError(msg)


def _preprocessing(name: str, weights: str | None, request: Request) -> dict[str, Any]:
    """The `data` section's keys of it. What is published with the weights need not be said."""
    given = {key: value for key, value in request.preprocessing.items() if value is not None}
    if any(len(given.get(key, ())) == 1 for key in ("mean", "std")):  # one number is that of grey images
        given["channels"] = 1
    if weights == "pretrained":
        return given
    missing = [key for key in ("mean", "std") if key not in given]
    if missing:
        msg = (
            f"--{missing[0]}: how does {name} want its images normalized? {weights or 'The file'} does not say; give "
            "--mean and --std of each channel in units of 0..1, such as --mean 0.485,0.456,0.406"
        )
        raise UsageError(msg)
    if is_onnx_file(name):  # the file says it
        return {"size": None, "crop": None, **given}
    return {"size": FOLDER_SIZE, "crop": FOLDER_CROP, **given}


def _listed(folder: Path, option: str, labels: bool) -> tuple[tuple[str, ...] | None, dict[str, int]]:
    """The class names, None without labels, and each image's path, in order, with its class, 0 without labels."""
    from crqat.train.data.imagefolder import list_images

    folder = user_path(str(folder), option)
    paths = [file.path.relative_to(folder) for file in list_images(folder, option)]
    names = tuple(sorted({path.parts[0] for path in paths if len(path.parts) > 1}))
    loose = [path.name for path in paths if len(path.parts) == 1]
    if not labels or not names:
        return None, {str(path): 0 for path in paths}
    if loose:
        msg = (
            f"{option}: {folder} has images beside its class folders, such as {loose[0]}; move them, or use --no-labels"
        )
        raise UsageError(msg)
    if len(names) == 1:
        msg = f"{option}: {folder} has one class folder, {names[0]}; add those of the others, or use --no-labels"
        raise UsageError(msg)
    return names, {str(path): names.index(path.parts[0]) for path in paths}


def _split(
    request: Request, images: dict[str, int], judging: dict[str, int] | None
) -> tuple[dict[str, int], dict[str, int]]:
    """What calibrates and what judges, drawn by the seed; nothing is in both."""
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


def _halves(request: Request, images: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """What chooses and what judges the choice, drawn by the seed."""
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
    msg = f"--classes: how many classes has {name}? Images without class folders do not say it"
    raise UsageError(msg)


def _answers(
    recipe: dict[str, Any],
    request: Request,
    names: Sequence[str],
    calibrating: dict[str, int],
    test: dict[str, int],
    progress: Progress,
) -> tuple[dict[str, int], dict[str, int]]:
    """The same images with the float network's answers as their classes."""
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
        progress("answers of the float network", len(part), len(part))
        found.append(dict(zip(part, seen, strict=True)))
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
    """Numbers separated by commas.

    Raises:
        UsageError: They are none; the message names the option.
    """
    try:
        return [kind(part) for part in given.split(",")]
    except ValueError:
        msg = f"{option}: {given} is no list of numbers, such as 8,8 or 0.485,0.456,0.406"
        raise UsageError(msg) from None


def run_name(model: str, bits: Sequence[int]) -> str:
    """Of a model's run: letters, digits and what a directory's name may have."""
    model = Path(model).stem if is_onnx_file(model) else model
    letters = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in model)
    return f"{letters}-w{bits[0]}a{bits[1]}"
