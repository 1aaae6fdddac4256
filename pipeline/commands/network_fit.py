"""Finds the channels, size and normalization with which a network accepts a folder's images, for `crqat init`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crqat.core.errors import UsageError
from crqat.core.field_bounds import user_path
from crqat.core.preprocessing import Preprocessing
from crqat.pipeline.commands import folder_of_images
from crqat.pipeline.commands.folder_of_images import Folder, spread
from crqat.train.config import FOLDER_CROP, FOLDER_SIZE, is_onnx_file

if TYPE_CHECKING:
    from torch import Tensor, nn

# Numbers of images that are decoded, and of test images that the network classifies.
_DECODED, _ANSWERED = 100, 100
# Smallest gain in accuracy at which another normalization is suggested.
_CLEARLY = 0.1


@dataclass(frozen=True)
class Request:
    """Options of one call of `crqat init`.

    Attributes:
        path: File of the recipe to write.
        images: Folder of images, in a layout that a `data.source` reads, or with one folder for each class.
        model: Network as in `model.name` of a recipe, or the bare name of a torchvision or timm network.
        weights: Checkpoint; None uses weights that torchvision or timm publish, or trains the network.
        weights_key: Key as in `model.weights_key` of a recipe.
        preprocessing: Given values of `mean`, `std`, `size` and `crop`, by their key in a recipe's `data` section.
        every: Whether to write every key, not only the needed ones.
    """

    path: Path
    images: Path
    model: str
    weights: str | None
    weights_key: str | None
    preprocessing: dict[str, Any]
    every: bool = False


@dataclass
class Summary:
    """Result of one call of `crqat init`: what was found in the images and tried on the network.

    Attributes:
        recipe: File of the written recipe.
        classes: Number of classes of the images.
        train_images: Number of training images.
        test_images: Number of test images.
        channels: 3 (RGB) or 1 (grey).
        crop: Side of the square that the network gets, in pixels.
        float_top1: Share of the tried test images that the network classifies correctly; None without weights.
        tried_images: Number of test images that the network was tried on.
        warnings: One sentence for each probable mistake in the given options.
    """

    recipe: str
    classes: int
    train_images: int
    test_images: int
    channels: int
    crop: int
    float_top1: float | None = None
    tried_images: int = 0
    warnings: list[str] = field(default_factory=list)


class Fit:
    """Finds channels and a size that the network accepts, and adds them to the `data` section."""

    def __init__(self, request: Request, name: str, weights: str | None, folder: Folder, data: dict[str, Any]) -> None:
        self._request, self._name, self._weights, self._folder, self._data = request, name, weights, folder, data
        self.size_comment = ""
        self._size, self._crop = self._sides()
        self._pixels: Tensor | None = None

    def _sides(self) -> tuple[int, int]:
        """Return the `data` keys size and crop, in pixels, and add them to the recipe unless they are the defaults."""
        data, shorter = self._data, {min(sides) for sides in self._folder.sides}
        size, crop = data.get("size"), data.get("crop")
        if size is None and crop is None:
            size, crop, self.size_comment = self._usual(shorter)
        else:
            size, crop = size or crop, crop or size
        if size is None or crop is None:
            return self._published() if self._weights == "pretrained" else (FOLDER_SIZE, FOLDER_CROP)
        data["size"], data["crop"] = size, crop
        if crop > size:
            msg = f"--crop: {crop} is larger than --size {size}, the shorter side before cropping; make --size larger"
            raise UsageError(msg)
        return size, crop

    def _usual(self, shorter: set[int]) -> tuple[int | None, int | None, str]:
        """Return size, crop and a comment for the recipe, for a user who gave neither size nor crop.

        Args:
            shorter: Shorter sides of the folder's images, in pixels.

        Returns:
            Size and crop in pixels, or None for each if the recipe keeps its default; and the comment.
        """
        side = self._side_of_file()
        if side is not None:
            return (side if side != FOLDER_CROP or shorter == {side} else FOLDER_SIZE), side, ""
        if self._weights == "pretrained":
            return None, None, ""
        only = folder_of_images.common_side(self._folder.sides)
        if only is not None:
            same = len(self._folder.sides) == 1 and all(width == height for width, height in self._folder.sides)
            return only, only, "" if same else "images are not square: the center is cropped"
        said = (
            f"not given: the shorter side is resized to {FOLDER_SIZE}, and {FOLDER_CROP} x {FOLDER_CROP} pixels are "
            "cropped from the center; set `size` and `crop` if the network was trained with others"
        )
        return None, None, said

    def _side_of_file(self) -> int | None:
        """Return the side of the square images that an ONNX file takes; None if it takes any size, or for no file."""
        if not is_onnx_file(self._name):
            return None
        from crqat.train.models import from_onnx, onnx_file

        _, _, height, width = from_onnx.network(onnx_file.read(user_path(self._name, "--model"))).shape
        if None not in (height, width) and height != width:
            msg = (
                f"--model: {self._name} takes images of {height} x {width}, but image files are cropped to squares; "
                "write the recipe by hand, with your own function as data.source"
            )
            raise UsageError(msg)
        return height or width

    def _published(self) -> tuple[int, int]:
        from crqat.train.models.published import published

        found = published(self._name)
        return (FOLDER_SIZE, FOLDER_CROP) if found is None else (found.size, found.crop)

    def _attempts(self) -> Iterator[tuple[int, bool]]:
        """Yield pairs of the `data` keys `channels` and `convert` to try, the most likely first."""
        modes = set(self._folder.modes)
        if not modes:  # sizes and modes were not read; decoding will tell
            yield from ((3, False), (1, False), (3, True))
        elif modes <= {"L"}:
            yield from ((1, False), (3, True))
        elif modes <= {"RGB"}:
            yield from ((3, False), (1, True))
        else:
            yield from (((1, True), (3, True)) if modes <= {"L", "1"} else ((3, True), (1, True)))

    def try_network(self) -> Summary:
        """Decode some images, build the network, load its weights, run it on the images, and return the result.

        Raises:
            UsageError: The network accepts the images neither as RGB nor as grey; the message is that of the more
                likely kind.
        """
        problem: UsageError | None = None
        for channels, convert in self._attempts():
            try:
                summary = self._try(channels, convert)
            except UsageError as error:
                problem = problem or error
                continue
            if channels != 3:
                self._data["channels"] = channels
            if convert:
                self._data["convert"] = True
            return summary
        assert problem is not None  # noqa: S101 - each attempt ends in one or the other
        raise problem

    def _try(self, channels: int, convert: bool) -> Summary:
        from crqat.train.data.batches import evaluation_batches
        from crqat.train.data.builtin import imagenet
        from crqat.train.training.evaluate import answers
        from crqat.train.training.first_step import check_forward

        data, folder = self._data, self._folder
        for key in ("mean", "std"):
            if key in data and len(data[key]) != channels:
                msg = f"--{key}: has {len(data[key])} numbers for {channels} channels; give one number for each channel"
                raise UsageError(msg)
        usual = imagenet(channels)
        preprocessing = Preprocessing(tuple(data.get("mean", usual[0])), tuple(data.get("std", usual[1])))
        train, test = folder.parts(self._size, self._crop, convert, channels)
        pixels = train[spread(range(len(train)), _DECODED)]
        summary = Summary(
            str(self._request.path), len(folder.classes), len(train), len(test), channels, self._crop
        )  # fmt: skip
        network = self._network(channels)
        if network is not None:
            check_forward(network, next(evaluation_batches(pixels[:2], preprocessing, 2)), len(folder.classes))
            if self._weights is not None or is_onnx_file(self._name):
                chosen = spread(range(len(test)), _ANSWERED)
                images, expected = test[chosen], [folder.labels[index] for index in chosen]

                def top1(preparation: Preprocessing) -> float:
                    found = answers(network, images, preparation).tolist()
                    return sum(map(int.__eq__, found, expected)) / len(expected)

                summary.tried_images, summary.float_top1 = len(chosen), top1(preprocessing)
                summary.warnings += self._doubts(summary, pixels, top1)
        self._pixels = pixels
        return summary

    def _doubts(self, summary: Summary, pixels: Tensor, top1: Callable[[Preprocessing], float]) -> list[str]:
        """Return warnings if the accuracy on a few test images suggests wrong preprocessing or class order."""
        found, count = summary.float_top1 or 0.0, summary.tried_images
        if not {"mean", "std"} & self._data.keys():
            channels = summary.channels
            mean, std = (tuple(round(number, 3) for number in part) for part in _statistics(pixels))
            others = (
                Preprocessing(mean, std),
                Preprocessing((0.5,) * channels, (0.5,) * channels),
                Preprocessing((0.0,) * channels, (1.0,) * channels),
            )
            best = max(others, key=top1)
            if top1(best) - found > _CLEARLY:
                means, stds = (",".join(f"{number:g}" for number in part) for part in (best.mean, best.std))
                return [
                    f"normalization was not given, and the float network classifies {found:.0%} of {count} test images "
                    f"correctly; with --mean {means} --std {stds} it would be {top1(best):.0%}: how was it trained?"
                ]
        if found <= 2 / summary.classes:
            return [
                f"the float network classifies {found:.0%} of {count} test images correctly, hardly above chance: are "
                "mean and std, size, and the order of the class folders those of its training?"
            ]
        return []

    def _network(self, channels: int) -> nn.Module | None:
        """Return the network with its weights; None for published weights, which this command does not download."""
        from crqat.train.models import build as models
        from crqat.train.quantizers.finalize import check_values

        classes = len(self._folder.classes)
        if self._weights == "pretrained":
            return None
        network = models.build(self._name, classes, channels)
        if self._weights is not None:
            try:
                models.load_weights(network, user_path(self._weights, "--weights"), self._request.weights_key)
            except UsageError as error:
                if "wrong shape" not in str(error):
                    raise
                msg = f"{error}; {self._request.images} has {classes} classes"
                raise UsageError(msg) from error
            check_values(network, f"--weights: {self._weights}")
        return network

    def normalization(self) -> list[str]:
        """Return the comment lines that a recipe gets above `data.mean` if mean or std was not given."""
        from crqat.train.data.builtin import imagenet

        assert self._pixels is not None  # noqa: S101 - of `try_network`
        own = [", ".join(f"{number:.3f}" for number in part) for part in _statistics(self._pixels)]
        mean, std = (", ".join(map(str, part)) for part in imagenet(self._pixels.shape[1]))
        missing = " and ".join(key for key in ("mean", "std") if key not in self._data)
        return [
            f"{missing}: normalization was not given, so ImageNet's is used: mean [{mean}], std [{std}].",
            "Weights that were trained with another normalization lose accuracy: write theirs here.",
            f"The pixels of {len(self._pixels)} training images have mean [{own[0]}] and std [{own[1]}].",
        ]


def _statistics(pixels: Tensor) -> tuple[list[float], list[float]]:
    """Return mean and std of each channel, in units of 0..1, for uint8 images [N, C, H, W]."""
    values = pixels.double().transpose(0, 1).flatten(1) / 255
    return values.mean(1).tolist(), values.std(1).tolist()
