"""Saved Hugging Face data sets: splits, columns and labels, and what is wrong with one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from crqat.core.errors import ToolError, UsageError
from crqat.train.config import DataConfig
from crqat.train.data import huggingface, sources
from crqat.train.data.dataset import Dataset
from tests.crqat_train.stored_sets import png
from tests.needs import require

require("datasets")
import datasets  # noqa: E402

datasets.disable_progress_bars()

IMAGES = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CLASSES = ("cat", "dog", "eel")
LABEL = datasets.ClassLabel(names=list(CLASSES))


def table(numbers: range, kind: Any = LABEL, **columns: Any) -> Any:
    """Some of IMAGES; `columns` replaces values or adds columns of numbers."""
    values = {"image": [{"bytes": png(IMAGES[n]), "path": None} for n in numbers], "label": [n % 3 for n in numbers]}
    features = {"image": datasets.Image(), "label": kind}
    features |= {name: datasets.Value("int64") for name in columns if name not in features}
    return datasets.Dataset.from_dict({**values, **columns}, features=datasets.Features(features))


def saved(root: Path, **splits: Any) -> Path:
    place = root / f"set{len(list(root.iterdir()))}"
    datasets.DatasetDict(splits).save_to_disk(place)
    return place


def loaded(root: Path, **changes: object) -> Dataset:
    values = {**DataConfig("huggingface", size=8, crop=8).__dict__, "root": str(root), **changes}
    return sources.of_recipe(DataConfig(**values))


def refusal(root: Path, **changes: object) -> str:
    with pytest.raises(UsageError) as caught:
        loaded(root, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_splits_and_columns_are_found(tmp_path: Path) -> None:
    root = saved(tmp_path, train=table(range(9)), test=table(range(9, 12)), more=table(range(2)))
    dataset = loaded(root)
    assert torch.equal(dataset.train_images[:], IMAGES[:9]) and torch.equal(dataset.test_images[:], IMAGES[9:])
    assert dataset.train_labels.tolist() == [n % 3 for n in range(9)]
    assert dataset.class_names == CLASSES and dataset.preprocessing.crop == 8
    # Numbers without names, and a test split of a competition, whose labels are kept back.
    number = datasets.Value("int32")
    hidden = table(range(2), number, label=[-1, -1])
    root = saved(tmp_path, train=table(range(9), number), test=hidden, validation=table(range(9, 12), number))
    dataset = loaded(root)
    assert dataset.class_names == ("0", "1", "2") and torch.equal(dataset.test_images[:], IMAGES[9:])


def test_columns_can_be_named(tmp_path: Path) -> None:
    coarse = [n % 2 for n in range(9)]
    train = table(range(9), coarse=coarse)
    root = saved(tmp_path, train=train, test=table(range(9, 12), coarse=[0, 1, 0]))
    dataset = loaded(root, label_column="coarse", image_column="image")
    assert dataset.train_labels.tolist() == coarse and dataset.class_names == ("0", "1")
    assert refusal(root, image_column="label") == (
        f"{root}: data.image_column: label is not a column of images (datasets.Image); the table has image, label, "
        "coarse"
    )
    two = {"train": train.cast_column("coarse", datasets.ClassLabel(names=["a", "b"])), "test": train}
    root = saved(tmp_path, **two)
    assert refusal(root) == (
        f"{root}: data.label_column: 2 columns of class labels or numbers; name one; the table has image, label, coarse"
    )


def test_what_is_wrong_with_a_table_is_said(tmp_path: Path) -> None:
    test = table(range(9, 12))
    root = saved(tmp_path, train=table(range(9)))
    assert refusal(root) == f"{root}: has the splits train; it needs train and one of test, validation, val"
    root = saved(tmp_path, train=table(range(3), label=[0, None, 2]), test=test)
    assert refusal(root) == f"{root}/train: row 1: no label; every image needs its class"
    root = saved(tmp_path, train=table(range(3), datasets.Value("int64"), label=[0, 1, 3]), test=test)
    assert refusal(root) == f"{root}/train: row 2: label 3 is not a class number, 0..2"
    root = saved(tmp_path, train=table(range(3), datasets.Value("int64"), label=[1, 2, 3]), test=test)
    assert refusal(root) == f"{root}/train: row 2: label 3 is not a class number, 0..2; number the classes from 0"
    root = saved(tmp_path, train=table(range(3)), test=table(range(3), datasets.Value("int64"), label=[0, 7, 0]))
    assert refusal(root) == f"{root}/test: row 1: label 7 is not a class number, 0..2"
    root = saved(tmp_path, train=table(range(3)), test=test.rename_column("label", "other"))
    assert refusal(root).startswith(f"{root}/test: cannot read its columns image and label (")
    broken = {"bytes": png(IMAGES[0])[:60], "path": None}
    root = saved(tmp_path, train=table(range(2), image=[{"bytes": png(IMAGES[0]), "path": None}, broken]), test=test)
    assert refusal(root).startswith(f"{root}/train: row 1: cannot be decoded as an image (")
    root = saved(tmp_path, train=table(range(1), image=[None]), test=test)
    assert refusal(root).startswith(f"{root}/train: row 0: no image in column image")


def test_a_path_in_a_table_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(IMAGES[0]))
    root = saved(tmp_path, train=table(range(1)), test=table(range(1)))
    row = {"bytes": None, "path": str(tmp_path / "secret.png")}
    # save_to_disk would store the image: written by hand, as somebody else's table may be.
    hostile = table(range(1), image=[row])
    with datasets.arrow_writer.ArrowWriter(path=str(root / "train/data-00000-of-00001.arrow")) as writer:
        writer.write_table(hostile.data.table)
        writer.finalize()
    assert refusal(root).startswith(f"{root}/train: row 0: no image in column image")


@pytest.mark.parametrize("damage", ["cut", "noise", "state", "empty"])
def test_a_damaged_data_set_is_named(tmp_path: Path, damage: str) -> None:
    root = saved(tmp_path, train=table(range(9)), test=table(range(9, 12)))
    arrow = root / "train/data-00000-of-00001.arrow"
    if damage == "cut":
        arrow.write_bytes(arrow.read_bytes()[:-2000])
    elif damage == "noise":
        arrow.write_bytes(os.urandom(5000))
    elif damage == "state":
        (root / "train/state.json").write_text("{")
    else:
        (root / "dataset_dict.json").write_text("")
    message = refusal(root)
    assert message.startswith(f"{root}: cannot be read as a saved data set (")
    assert message.endswith("; write or copy it again")


@pytest.mark.parametrize("change", ["gone", "newer"])
def test_a_table_that_changes_while_it_is_read_is_noticed(tmp_path: Path, change: str) -> None:
    root = saved(tmp_path, train=table(range(9)), test=table(range(9, 12)))
    _, rows, _ = huggingface.open_saved(root, None, None)
    images = huggingface.TableImages(rows, 8, 8, False)
    assert torch.equal(images[[8, 0]], IMAGES[[8, 0]])
    arrow = root / "train/data-00000-of-00001.arrow"
    if change == "gone":
        arrow.unlink()
    else:
        os.utime(arrow, ns=(0, 0))
    with pytest.raises(ToolError, match=r"\.arrow: (cannot be read any more|changed while the data set was read)"):
        images[[8]]


def test_where_there_is_no_data_set_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=rf"no saved data set in {tmp_path}/none; write one by .*download: true"):
        sources.load("huggingface:a/b", str(tmp_path / "none"), False)
    with pytest.raises(UsageError, match=r"^data\.root: missing; huggingface needs a folder written by"):
        sources.load("huggingface", None, False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ToolError, match=r"needs the package datasets; pip install crqat-edge\[huggingface\]$"):
        loaded(tmp_path)


def test_a_download_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client is told to stay off the network, and says so itself."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    place = tmp_path / "set"
    with pytest.raises(ToolError, match=rf"^data\.download: cannot fetch nobody/nothing into {place} \(") as caught:
        sources.load("huggingface:nobody/nothing", str(place), True)
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_is_fetched_is_saved_and_read_from_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub itself is out of reach here; what it would give is put in its place."""
    splits = datasets.DatasetDict(train=table(range(9)), test=table(range(9, 12)))
    asked: list[str] = []

    def hub(name: str) -> Any:
        asked.append(name)
        return splits

    monkeypatch.setattr(datasets, "load_dataset", hub)
    changes: dict[str, object] = {"source": "huggingface:owner/name", "download": True}
    for _ in range(2):
        assert torch.equal(loaded(tmp_path / "deep" / "set", **changes).train_images[:], IMAGES[:9])
    assert asked == ["owner/name"]
    assert json.loads((tmp_path / "deep/set/dataset_dict.json").read_text())["splits"] == ["train", "test"]
