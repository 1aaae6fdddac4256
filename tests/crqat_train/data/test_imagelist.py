from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from crqat.core.errors import ToolError, UsageError
from crqat.train.config import DataConfig
from crqat.train.data import imagelist, sources

LIST: dict[str, Any] = {
    "classes": ["cat", "dog"], "labels_of": "", "schema_version": 1,
    "train": {"a/1.png": 0, "a/2.png": 1}, "test": {"b/3.png": 1},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for grey, name in enumerate(("a/1.png", "a/2.png", "b/3.png", "other/4.png"), 1):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (grey, grey, grey)).save(tmp_path / name)
    return tmp_path


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "images.json"
    path.write_text(json.dumps({**LIST, **changes}))
    return path


def test_a_list_is_a_source(folder: Path) -> None:
    test = {"b/3.png": 1, str(folder / "other" / "4.png"): 0}
    path = write(folder, test=test, labels_of="a network")
    config = DataConfig("imagelist", root=str(folder), image_list=str(path), size=8, crop=8)
    dataset = sources.of_recipe(config)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.train_images[:].flatten(1).float().mean(1).tolist() == [1, 2]
    assert torch.equal(dataset.train_labels, torch.tensor([0, 1]))
    assert dict(zip(dataset.test_images[:][:, 0, 0, 0].tolist(), dataset.test_labels.tolist(), strict=True)) == {
        3: 1,
        4: 0,
    }
    assert "the labels are the answers of a network: accuracy is the agreement with it" in dataset.notes
    assert imagelist.outside(path) == [folder / "other"]
    assert imagelist.outside(write(folder)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": {}}, r"images\.json: test: lists no images"),
        ({"train": {"a/1.png": 2}}, r"images\.json: train: a/1\.png has class 2, but the classes are 0\.\.1"),
        ({"classes": "cat"}, r"images\.json: damaged: classes .*; write it again by `crqat quantize`"),
    ],
)
def test_a_wrong_list_is_refused_in_one_line(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        imagelist.read(write(folder, **changes))


def test_a_listed_image_that_is_gone_is_named(folder: Path) -> None:
    (folder / "a" / "1.png").unlink()
    config = DataConfig("imagelist", root=str(folder), image_list=str(write(folder)), size=8, crop=8)
    with pytest.raises(ToolError, match=r"a/1\.png: cannot be read any more"):
        sources.of_recipe(config)
    with pytest.raises(UsageError, match=r"^data\.image_list: missing, or data\.root is; imagelist needs"):
        sources.of_recipe(DataConfig("imagelist", root=str(folder)))
