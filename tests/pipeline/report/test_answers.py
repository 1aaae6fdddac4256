"""Images that only one file answers rightly, and the classes that change: counted by hand."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crqat.core.results import answers as packed
from crqat.core.results.benchmark import Results
from crqat.core.results.export import ExportedModel, ExportPayload
from crqat.core.typed_json import from_json
from crqat.pipeline.report.answers import differences
from tests.pipeline.conftest import measured

LABELS = np.array([0, 0, 0, 1, 1, 2])
FLOAT = np.array([0, 0, 1, 1, 1, 0])
INT8 = np.array([0, 2, 0, 1, 0, 0])


def case(folder: Path, image: np.ndarray[Any, np.dtype[np.uint8]]) -> tuple[ExportPayload, Results]:
    """An export's images, all alike, and the answers above."""
    np.save(folder / "images.npy", np.stack([image] * len(LABELS)))
    np.save(folder / "labels.npy", LABELS)
    export = ExportPayload(
        "run", [ExportedModel("float.onnx", "float"), ExportedModel("onnxruntime.onnx", "onnxruntime")],
        "images.npy", "labels.npy", ["cat", "dog", "eel"],
    )  # fmt: skip
    results = measured(0.2, (0.1, 0.3))
    for model in results["models"].values():
        model["accuracy"] = {**model["accuracy"], "n": len(LABELS)}
        model["answers"] = packed.pack(FLOAT if model["target"] == "float" else INT8)
        if model["versus_float"] is not None:
            model["versus_float"].update(only_float_right=2, only_this_right=1)
    return export, from_json(Results, results)


def test_each_image_and_class_is_counted(tmp_path: Path) -> None:
    image = np.arange(3 * 8 * 8, dtype=np.uint8).reshape(3, 8, 8)
    (found,) = differences(tmp_path, *case(tmp_path, image))
    assert found.file == "onnxruntime.onnx"
    assert [(p.number, p.label, p.float_answer, p.answer) for p in found.lost] == [
        (1, "cat", "cat", "eel"),
        (4, "dog", "dog", "cat"),
    ]
    assert [(p.number, p.label, p.float_answer, p.answer) for p in found.won] == [(2, "cat", "dog", "cat")]
    assert (found.lost_count, found.won_count) == (2, 1)
    rows = {row.name: row for row in found.classes}
    cat, dog = rows["cat"], rows["dog"]
    assert (cat.n, cat.float_right, cat.right, cat.only_float, cat.only_this, cat.change) == (3, 2, 2, 1, 1, 0.0)
    assert (dog.n, dog.float_right, dog.right, dog.only_float, dog.only_this, dog.change) == (2, 2, 1, 1, 0, -50.0)
    assert [row.name for row in found.changed] == ["dog"]
    # The picture is the image, enlarged pixel by pixel.
    shown = Image.open(io.BytesIO(base64.b64decode(found.lost[0].source.partition(",")[2])))
    assert shown.size == (96, 96)
    assert (np.asarray(shown)[::12, ::12].transpose(2, 0, 1) == image).all()


def test_a_large_grey_image_is_reduced(tmp_path: Path) -> None:
    (found,) = differences(tmp_path, *case(tmp_path, np.zeros((1, 300, 200), np.uint8)))
    shown = Image.open(io.BytesIO(base64.b64decode(found.won[0].source.partition(",")[2])))
    assert (shown.size, shown.mode) == ((64, 96), "L")


def test_without_answers_or_images_there_is_nothing_to_show(tmp_path: Path) -> None:
    export, results = case(tmp_path, np.zeros((3, 8, 8), np.uint8))
    models = {file: replace(model, answers=None) for file, model in results.models.items()}
    assert differences(tmp_path, export, replace(results, models=models)) == []
    (tmp_path / "images.npy").unlink()
    assert differences(tmp_path, export, results) == []
