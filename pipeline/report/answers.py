"""Finds test images that only the float or only the INT8 file classifies correctly, and counts them by class."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from crqat.core.results.benchmark import Results
from crqat.core.results.export import ExportPayload

# Number of pictures of each kind, and the side of a picture in pixels; images are resized to it.
_SHOWN, _SIDE = 12, 96
_CLASSES = 6

_Int = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Picture:
    """A test image that either only the float file or only the INT8 file classifies correctly.

    Attributes:
        number: Index of the image in the test images.
        source: PNG image as a data URL.
        label: Class of the image.
        float_answer: Class that the float file predicts.
        answer: Class that the INT8 file predicts.
    """

    number: int
    source: str
    label: str
    float_answer: str
    answer: str


@dataclass(frozen=True)
class ClassRow:
    """Counts of one class of the test images.

    Attributes:
        name: Name of the class.
        n: Number of its images.
        float_right: Number of images that the float file classifies correctly.
        right: Number of images that the INT8 file classifies correctly.
        only_float: Number of images that only the float file classifies correctly.
        only_this: Number of images that only the INT8 file classifies correctly.
    """

    name: str
    n: int
    float_right: int
    right: int
    only_float: int
    only_this: int

    @property
    def change(self) -> float:
        """Change of the class's accuracy from float to INT8, in percentage points."""
        return 100 * (self.right - self.float_right) / self.n


@dataclass(frozen=True)
class Difference:
    """Images on which the predictions of an INT8 file and of the float file differ in correctness, and their counts.

    Attributes:
        file: Name of the file.
        lost: The first twelve of the images that only the float file classifies correctly.
        lost_count: Number of all images that only the float file classifies correctly.
        won: The first twelve of the images that only this INT8 file classifies correctly.
        won_count: Number of all images that only this INT8 file classifies correctly.
        classes: All classes that have images, those whose accuracy drops most first.
    """

    file: str
    lost: list[Picture]
    lost_count: int
    won: list[Picture]
    won_count: int
    classes: list[ClassRow]

    @property
    def changed(self) -> list[ClassRow]:
        """Return the classes whose accuracy changed most from float to INT8: first decreases, then increases."""
        lose = [row for row in self.classes if row.change < 0][:_CLASSES]
        gain = [row for row in self.classes if row.change > 0][-_CLASSES:]
        return [*lose, *gain]


def differences(export_dir: Path, export: ExportPayload, results: Results) -> list[Difference]:
    """Compare the stored predictions of each measured file with those of the float file, image by image.

    A file without stored predictions is left out; without those of the float file, the list is empty.

    Args:
        export_dir: Directory of the export, with the test images and their labels.
        export: Summary of the export, from its manifest.
        results: Results of the benchmark on this export.
    """
    reference = next((m.classes() for m in results.models.values() if m.target == "float"), None)
    targets = {model.file for model in export.models if model.target not in ("float", "float16")}
    found = {file: model.classes() for file, model in results.models.items() if file in targets}
    try:
        images = np.load(export_dir / export.images, mmap_mode="r", allow_pickle=False)
        labels = np.load(export_dir / export.labels, allow_pickle=False)
    except (OSError, ValueError):  # the rest of the report does not need the images
        return []
    fits = reference is not None and len(reference) == len(images) == len(labels)
    return [
        _difference(file, reference, answers, labels, images, export.class_names)
        for file, answers in found.items()
        if fits and reference is not None and answers is not None
    ]


def _difference(
    file: str, reference: _Int, answers: _Int, labels: _Int, images: npt.NDArray[np.uint8], names: Sequence[str]
) -> Difference:
    def name(number: int) -> str:
        return names[number] if number < len(names) else str(number)

    def pictures(chosen: npt.NDArray[np.bool_]) -> list[Picture]:
        return [
            Picture(place, _png(images[place]), *(name(int(of[place])) for of in (labels, reference, answers)))
            for place in map(int, np.flatnonzero(chosen)[:_SHOWN])
        ]

    float_right, right = reference == labels, answers == labels
    lost, won = float_right & ~right, ~float_right & right
    every = np.ones(len(labels), np.bool_)
    rows = [
        ClassRow(name(number), *(int(of[labels == number].sum()) for of in (every, float_right, right, lost, won)))
        for number in map(int, np.unique(labels))
    ]
    rows.sort(key=lambda row: row.change)
    return Difference(file, pictures(lost), int(lost.sum()), pictures(won), int(won.sum()), rows)


def _png(image: npt.NDArray[np.uint8]) -> str:
    """Return a uint8 [C, H, W] image as a PNG data URL; unless it has three channels, only the first is shown."""
    from PIL import Image

    array = np.ascontiguousarray(image)
    picture = Image.fromarray(array.transpose(1, 2, 0) if len(array) == 3 else array[0])
    side = max(picture.size)
    if side < _SIDE:
        picture = picture.resize([length * max(1, _SIDE // side) for length in picture.size], Image.Resampling.NEAREST)
    elif side > _SIDE:
        picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
