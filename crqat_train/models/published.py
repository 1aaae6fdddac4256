"""Looks up the preprocessing and the accuracy that torchvision and timm publish with their weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from crqat.core.errors import UsageError
from crqat.train.config import FILE_SOURCES, DataConfig, Interpolation, TrainConfig, source_kind

# Pillow's filters by their names in torchvision and timm.
_FILTERS: dict[str, Interpolation] = {
    "bilinear": "bilinear",
    "bicubic": "bicubic",
    "lanczos": "lanczos",
    "nearest": "nearest",
}


@dataclass(frozen=True)
class Published:
    """Preprocessing and accuracy published with one set of weights.

    Attributes:
        mean: Mean of each channel, in units of 0..1.
        std: Standard deviation of each channel, in units of 0..1.
        size: Pixels of the shorter side after resizing.
        crop: Side of the centre square, in pixels.
        interpolation: Interpolation of the resizing; a value of `data.interpolation`.
        accuracy: Published top-1 accuracy on ImageNet's validation images, in 0..1; None if none is published.
        note: Published preprocessing that crqat cannot reproduce; empty if there is none.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    crop: int
    interpolation: Interpolation
    accuracy: float | None = None
    note: str = ""


def published(name: str) -> Published | None:
    """Return the data published with the default weights of "torchvision/NAME" or "timm/NAME"; None if there are none.

    Nothing is downloaded: the libraries hold these data together with the weights' addresses.
    """
    if name.startswith("torchvision/"):
        return _of_torchvision(name.removeprefix("torchvision/"))
    return _of_timm(name.removeprefix("timm/")) if name.startswith("timm/") else None


def _of_torchvision(name: str) -> Published | None:
    from torchvision.models import get_model_weights  # type: ignore[import-untyped]

    try:
        weights = get_model_weights(name).DEFAULT
    except (ValueError, AttributeError):  # `models.pretrained` reports the error
        return None
    how: Any = weights.transforms()
    metrics = (weights.meta.get("_metrics") or {}).get("ImageNet-1K") or {}
    accuracy = metrics.get("acc@1")
    return Published(
        tuple(how.mean), tuple(how.std), how.resize_size[0], how.crop_size[0],
        _filter(how.interpolation.value), None if accuracy is None else accuracy / 100,
    )  # fmt: skip


def _of_timm(name: str) -> Published | None:
    try:
        from timm.models import get_pretrained_cfg
    except ImportError:  # `models.pretrained` reports it
        return None
    try:
        configuration = get_pretrained_cfg(name)
    except RuntimeError:  # `models.pretrained` reports that there are no such weights
        return None
    if configuration is None:
        return None
    crop = configuration.input_size[-1]
    note = ""
    if configuration.crop_mode not in ("", "center", None):
        note = (
            f"published with crop mode {configuration.crop_mode}; crqat resizes the shorter side and crops the center"
        )
    interpolation = _filter(configuration.interpolation or "bicubic")
    mean, std = tuple(configuration.mean), tuple(configuration.std)
    size = int(crop / (configuration.crop_pct or 0.875))
    return Published(mean, std, size, crop, interpolation, None, note)


def _filter(name: str) -> Interpolation:
    return _FILTERS.get(name, "bilinear")


def data_section(config: TrainConfig) -> DataConfig:
    """Return the recipe's `data` section, completed by the preprocessing published with `pretrained` weights.

    Values of the recipe take precedence. The published size, crop and interpolation are used only for images that crqat
    reads from files (`FILE_SOURCES`). With a data function nothing published is used.

    Raises:
        UsageError: The recipe sets only one of `data.size` and `data.crop`, and it does not fit the published value of
            the other.
    """
    data = config.data
    found = published(config.model.name) if config.model.weights == "pretrained" else None
    kind = source_kind(data.source)
    if found is None or kind is None or ":" in kind:
        return data
    data = replace(data, mean=data.mean or found.mean, std=data.std or found.std)
    if kind in FILE_SOURCES:
        data = replace(
            data,
            size=data.size or found.size,
            crop=data.crop or found.crop,
            interpolation=data.interpolation or found.interpolation,
        )
        if (data.crop or 0) > (data.size or 0):
            msg = (
                f"data.crop: {data.crop} is larger than data.size {data.size}, the shorter side it is cut from "
                f"({config.model.name} was published with size {found.size} and crop {found.crop}); set both"
            )
            raise UsageError(msg)
    return data


def notes(config: TrainConfig) -> tuple[str, ...]:
    """Describe the published preprocessing that `data_section` uses or cannot use, one line each."""
    data = data_section(config)
    found = published(config.model.name) if data != config.data else None
    if found is None:
        return ()
    keys = [key for key in ("mean", "std", "size", "crop", "interpolation") if getattr(data, key)]
    taken = [f"{key} {_shown(getattr(data, key))}" for key in keys if getattr(data, key) != getattr(config.data, key)]
    line = f"as published with the weights of {config.model.name}: {', '.join(taken)}"
    return (line, *([f"the weights of {config.model.name} were {found.note}"] if found.note else []))


def _shown(value: Any) -> str:
    return "/".join(f"{number:g}" for number in value) if isinstance(value, tuple) else str(value)


def published_accuracy(config: TrainConfig, classes: int) -> float | None:
    """Return the published accuracy of the recipe's weights, in 0..1; None if it does not apply.

    It applies if the weights are used unchanged and with the preprocessing published with them.
    """
    data, found = config.data, None
    if config.model.weights == "pretrained" and config.float_training.epochs == 0 and classes == 1000:
        found = published(config.model.name)
    if found is None or found.accuracy is None or source_kind(data.source) not in FILE_SOURCES:
        return None
    used = data_section(config)
    same = (used.mean, used.std, used.size, used.crop, used.interpolation)
    return found.accuracy if same == (found.mean, found.std, found.size, found.crop, found.interpolation) else None
