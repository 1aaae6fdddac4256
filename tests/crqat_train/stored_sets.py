"""CIFAR-10 images as WebDataset shards and as a saved Hugging Face data set, for tests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from crqat.train.data.dataset import Dataset
from tests.needs import require

PER_SHARD = 100


def png(image: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "png")
    return buffer.getvalue()


def tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """An archive of these files."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def sample(key: str, image: Tensor, label: int) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", png(image)), (f"{key}.cls", str(label).encode())]


def write_shards(root: Path, cifar: Dataset, train: int, test: int) -> Path:
    """By webdataset's own writer; the class names beside them."""
    require("webdataset")
    import webdataset

    root.mkdir(parents=True)
    for part, images, labels in parts(cifar, train, test):
        pattern = f"file:{root}/{part}-%04d.tar"
        with webdataset.ShardWriter(pattern, maxcount=PER_SHARD, verbose=0) as writer:
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                writer.write({"__key__": f"{part}/{index:05}", "png": png(image), "cls": label, "json": {"n": index}})
    (root / "classes.txt").write_text("\n".join(cifar.class_names) + "\n")
    return root


def write_saved(root: Path, cifar: Dataset, train: int, test: int) -> Path:
    """By `datasets`; columns are named as on the hub."""
    require("datasets")
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "label": datasets.ClassLabel(names=list(cifar.class_names)),
            "n": datasets.Value("int32"),
        }
    )
    splits = {}
    for part, images, labels in parts(cifar, train, test):
        columns = {
            "img": [{"bytes": png(image), "path": None} for image in images],
            "label": list(labels),
            "n": list(range(len(labels))),
        }
        splits[part] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(splits).save_to_disk(root)
    return root


def parts(cifar: Dataset, train: int, test: int) -> Sequence[tuple[str, Tensor, list[int]]]:
    return (
        ("train", cifar.train_images[:train], cifar.train_labels[:train].tolist()),
        ("test", cifar.test_images[:test], cifar.test_labels[:test].tolist()),
    )
