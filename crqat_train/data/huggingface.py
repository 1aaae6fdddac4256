"""Reads data sets that Hugging Face's `datasets` saved in a folder; the Arrow tables are memory-mapped, not loaded."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from crqat.core.errors import CrqatError, ToolError, UsageError
from crqat.core.image_file import decode_image
from crqat.train.data.imagefolder import check_unchanged, file_state
from crqat.train.data.streaming import StoredImages

TEST_SPLITS = ("test", "validation", "val")
_LABEL_NAMES = ("label", "labels")


@dataclass(frozen=True)
class Rows:
    """Images and labels in selected rows of a table.

    Attributes:
        table: A `datasets.Dataset` with undecoded images.
        column: Name of the image column.
        name: Name of the table in messages.
        files: Files of the table, with size and modification time.
        rows: Selected rows, int64 of shape [N].
        labels: Class of each selected row, int64 of shape [N].
    """

    table: Any
    column: str
    name: str
    files: tuple[tuple[Path, tuple[int, int]], ...]
    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)


class TableImages(StoredImages[Rows]):
    """Images in the rows of a table of Hugging Face's `datasets`, decoded when they are needed."""

    def _items_of(self, chosen: Tensor) -> Rows:
        picked, items = chosen.numpy(), self.items
        return replace(items, rows=items.rows[picked], labels=items.labels[picked])

    def __getitem__(self, chosen: Any) -> Tensor:
        """Decode images, see `StoredImages`; the table's files are checked for changes once for each batch."""
        for path, state in self.items.files:
            check_unchanged(path, state)
        return super().__getitem__(chosen)

    def _decode(self, index: int) -> Any:
        items, row = self.items, int(self.items.rows[index])
        name = f"{items.name}: row {row}"
        content = (items.table[row][items.column] or {}).get("bytes")
        if content is None:  # a stored path is not followed: the data set could then open any file
            msg = f"{name}: no image in column {items.column}; store the image itself there, not its path"
            raise UsageError(msg)
        return decode_image(
            io.BytesIO(content), name, self.size, self.crop, self.convert, self.channels, self.interpolation
        )


def _datasets() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        msg = "data.source: huggingface needs the package datasets; pip install crqat-edge[huggingface]"
        raise ToolError(msg) from error
    return datasets  # type: ignore[no-any-return]


def fetch(name: str, folder: Path) -> None:
    """Download a data set from the Hugging Face hub and save its splits in a folder, completely or not at all.

    Raises:
        ToolError: `datasets` is missing, or the download fails.
    """
    datasets = _datasets()
    part = folder.with_name(f"{folder.name}.part")
    try:
        datasets.DatasetDict(dict(datasets.load_dataset(name))).save_to_disk(part)
        part.rename(folder)
    except Exception as error:  # hub, network, disk, formats: whatever stops it
        msg = f"data.download: cannot fetch {name} into {folder} ({_reason(error)}); check name, network and disk"
        raise ToolError(msg) from error


def open_saved(root: Path, image_column: str | None, label_column: str | None) -> tuple[tuple[str, ...], Rows, Rows]:
    """Return class names, training rows and test rows of a `datasets.DatasetDict` written by `save_to_disk`.

    Args:
        root: The folder.
        image_column: Name of the image column; None takes the only one.
        label_column: Name of the label column; None takes the only one, or "label".

    Raises:
        UsageError: The folder was not written by `save_to_disk`, is damaged, has no suitable splits or columns, or a
            row has no label.
        ToolError: `datasets` is missing, or a file cannot be read.
    """
    datasets = _datasets()
    if not (root / "dataset_dict.json").is_file():
        msg = (
            f"data.root: no saved data set in {root}; write one by `datasets.load_dataset(...).save_to_disk(...)`, or "
            'set data.source: "huggingface:NAME" and `download: true`, which downloads it into a new folder'
        )
        raise UsageError(msg)
    try:
        splits = datasets.load_from_disk(str(root))
        for split in splits.values():
            split.data.table.validate(full=True)  # offsets within the file's bounds; images are not read
    except Exception as error:  # `datasets` raises many kinds of errors for damaged files
        msg = f"{root}: cannot be read as a saved data set ({_reason(error)}); write or copy it again"
        raise UsageError(msg) from error
    train = splits.get("train")
    if train is None or not set(TEST_SPLITS) & set(splits):
        msg = f"{root}: has the splits {', '.join(splits)}; it needs train and one of {', '.join(TEST_SPLITS)}"
        raise UsageError(msg)
    image = _image_column(datasets, train, image_column, root)
    label = _label_column(datasets, train, label_column, root)
    feature = train.features[label]
    named = isinstance(feature, datasets.ClassLabel)
    training = _rows(train, image, label, f"{root}/train")
    names = tuple(feature.names) if named else tuple(map(str, range(len(np.unique(training.labels)))))
    _check(training, names, label)
    tests = (_rows(splits[name], image, label, f"{root}/{name}") for name in TEST_SPLITS if name in splits)
    # Test splits published for competitions have -1 as every label.
    test = next((rows for rows in tests if len(rows) and rows.labels.max() >= 0), None)
    if test is None:
        msg = f"{root}: none of its splits {', '.join(name for name in TEST_SPLITS if name in splits)} has labels"
        raise UsageError(msg)
    _check(test, names, label)
    return names, training, test


def _image_column(datasets: ModuleType, table: Any, wanted: str | None, root: Path) -> str:
    found = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    return _choose(found, wanted, f"{root}: data.image_column", "of images (datasets.Image)", table)


def _label_column(datasets: ModuleType, table: Any, wanted: str | None, root: Path) -> str:
    def whole(feature: Any) -> bool:
        return isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint"))

    labels = [name for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    numbers = [name for name, feature in table.features.items() if whole(feature)]
    found = labels if wanted is None else [*labels, *numbers]
    if not found:
        found = [name for name in numbers if name in _LABEL_NAMES]
    return _choose(found, wanted, f"{root}: data.label_column", "of class labels or numbers", table)


def _choose(found: Iterable[str], wanted: str | None, key: str, kind: str, table: Any) -> str:
    names = list(found)
    if wanted in names:
        return str(wanted)
    if wanted is None and len(names) == 1:
        return names[0]
    problem = f"{wanted} is not a column {kind}" if wanted else f"{len(names) or 'no'} columns {kind}; name one"
    msg = f"{key}: {problem}; the table has {', '.join(table.features)}"
    raise UsageError(msg)


def _rows(table: Any, image: str, label: str, name: str) -> Rows:
    try:
        column = table.select_columns([label]).with_format("arrow")[:][label]
        missing = np.flatnonzero(column.is_null().to_numpy())
        if len(missing):
            msg = f"{name}: row {missing[0]}: no {label}; every image needs its class"
            raise UsageError(msg)
        labels = column.to_numpy().astype(np.int64)
        images = table.select_columns([image]).cast_column(image, _datasets().Image(decode=False))
        files = tuple((path, file_state(path)) for path in (Path(file["filename"]) for file in table.cache_files))
    except CrqatError:
        raise
    except Exception as error:  # e.g. a split whose columns differ from those of train
        msg = f"{name}: cannot read its columns {image} and {label} ({_reason(error)})"
        raise UsageError(msg) from error
    return Rows(images, image, name, files, np.arange(len(labels)), labels)


def _check(rows: Rows, names: tuple[str, ...], label: str) -> None:
    wrong = np.flatnonzero((rows.labels < 0) | (rows.labels >= len(names)))
    if len(wrong):
        from_one = "; number the classes from 0" if rows.labels.min() == 1 and rows.labels.max() == len(names) else ""
        msg = f"{rows.name}: row {wrong[0]}: {label} {rows.labels[wrong[0]]} is not a class number, 0..{len(names) - 1}"
        msg += from_one
        raise UsageError(msg)
    if not len(rows):
        msg = f"{rows.name}: has no rows; save a data set that has some"
        raise UsageError(msg)


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
