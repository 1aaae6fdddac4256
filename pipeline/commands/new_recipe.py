"""The `init` command: writes a recipe for a folder of images and a network after trying both."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crqat.core.errors import ToolError, UsageError
from crqat.core.progress import Progress
from crqat.pipeline.commands import folder_of_images
from crqat.pipeline.commands.folder_of_images import Folder
from crqat.pipeline.commands.network_fit import Fit, Request, Summary
from crqat.pipeline.recipe import write
from crqat.train.config import DataConfig, is_onnx_file

if TYPE_CHECKING:
    from crqat.train.data.imagelist import ImageList

# Names of options for the recipe keys that appear in messages of other modules.
_OPTIONS = {
    "model.weights_key": "--weights-key",
    "model.weights": "--weights",
    "model.name": "--model",
    "data.root": "--images",
}


def write_default(path: Path) -> None:
    """Write the commented recipe for scikit-learn's digits, which explains every key.

    Raises:
        UsageError: The file exists.
        ToolError: The file cannot be written.
    """
    _write(path, write.TEMPLATE.read_text("utf-8"))


def write_for(request: Request, progress: Progress) -> Summary:
    """Inspect the images, try the network on some of them, and write the recipe.

    Raises:
        UsageError: The file exists, or images, network, weights and preprocessing do not fit together; the message
            names the option.
        ToolError: A file cannot be read or written, or a package is missing.
    """
    if request.path.exists():
        raise UsageError(_exists(request.path))
    try:
        return _write_for(request, progress)
    except UsageError as error:
        words = str(error)
        for key, option in _OPTIONS.items():
            words = words.replace(key, option)
        raise UsageError(words) from error


def _write_for(request: Request, progress: Progress) -> Summary:
    from crqat.train.models import build as models

    name = _full_name(request.model)
    if is_onnx_file(name) and request.weights is not None:
        msg = f"--weights: {name} already has its weights; leave the option out"
        raise UsageError(msg)
    models.check_name(name)
    image_list = request.path.with_name(f"{request.path.stem}.images.json")
    folder = folder_of_images.read(request.images, image_list, progress)
    published = request.weights is None and name.startswith(("torchvision/", "timm/"))
    weights = "pretrained" if published else request.weights
    values: dict[str, Any] = {
        "name": _run_name(request.path),
        "data": {**folder.data, **{key: value for key, value in request.preprocessing.items() if value is not None}},
        "model": {"name": name}
        | ({} if weights is None else {"weights": weights})
        | ({} if request.weights_key is None else {"weights_key": request.weights_key}),
        "qat": {"epochs": 0},
    }
    fit = Fit(request, name, weights, folder, values["data"])
    summary = fit.try_network()
    order = [item.name for item in fields(DataConfig)]
    values["data"] = {key: values["data"][key] for key in sorted(values["data"], key=order.index)}
    comments = {"": _head(folder, summary), "qat.epochs": [_calibration(request.path)]}
    if fit.size_comment:
        comments["data.size"] = [fit.size_comment]
    if not (published or {"mean", "std"} <= values["data"].keys()):
        comments["data.mean"] = fit.normalization()
    if weights is None and not is_onnx_file(name):
        values["float"] = {"epochs": 10}
        comments["float.epochs"] = ["no --weights were given: the network is trained from scratch"]
    elif published and _published_classes(name) != len(folder.classes):
        values["float"] = {"epochs": 5, "lr": 0.01}
        comments["float.epochs"] = [f"the published weights are for other classes than these {len(folder.classes)}"]
    if folder.listed is not None:
        _write_list(Path(values["data"]["image_list"]), folder.listed)
    _write(request.path, write.filled(values, comments) if request.every else write.needed(values, comments))
    return summary


def _exists(path: Path) -> str:
    return f"{path}: exists already; name another file"


def _write(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UsageError(_exists(path)) from error
    except OSError as error:
        msg = f"{path}: cannot be written: {error.strerror}"
        raise ToolError(msg) from error


def _write_list(path: Path, listed: ImageList) -> None:
    from crqat.core.typed_json import text

    try:
        path.write_text(text(listed) + "\n", "utf-8")
    except OSError as error:
        msg = f"{path}: cannot be written: {error.strerror}"
        raise ToolError(msg) from error


def _full_name(name: str) -> str:
    """Return a network's name as a recipe spells it."""
    if ":" in name or "/" in name or is_onnx_file(name):
        return name
    from torchvision.models import list_models  # type: ignore[import-untyped]

    return f"torchvision/{name}" if name in list_models() else f"timm/{name}"


def _run_name(path: Path) -> str:
    """Return the name of the recipe's run, reduced to letters, digits and other characters of directory names."""
    letters = "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "_-") else "_" for letter in path.stem
    )
    return letters[:100] or "run"


def _published_classes(name: str) -> int:
    if name.startswith("torchvision/"):
        from torchvision.models import get_model_weights

        return len(get_model_weights(name.removeprefix("torchvision/")).DEFAULT.meta["categories"])
    from timm.models import get_pretrained_cfg

    configuration = get_pretrained_cfg(name.removeprefix("timm/"))
    return configuration.num_classes if configuration is not None else 0


def _head(folder: Folder, found: Summary) -> list[str]:
    size = f"{found.crop} x {found.crop} pixels, {'grey' if found.channels == 1 else 'RGB'}"
    lines = [
        f"{found.train_images} training and {found.test_images} test images of {found.classes} classes, {size}.",
        "`crqat explain KEY` explains a key; leave out the keys that you do not change.",
    ]
    if folder.listed is not None:
        lines.insert(1, "Half of each class trains and calibrates, the other half tests; data.image_list says which.")
    return lines


def _calibration(path: Path) -> str:
    return f"calibration alone; `crqat advise {path}` says whether training is needed"
