"""Images in class folders, from memory and streamed, and what is wrong with a folder."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crqat.core.errors import ToolError, UsageError
from crqat.core.image_file import load_image
from crqat.core.progress import quiet
from crqat.train.config import DataConfig
from crqat.train.data import imagefolder, sources, streaming
from crqat.train.data.batches import Batches, evaluation_batches, subset
from crqat.train.data.dataset import Dataset

CLASSES = ("cat", "dog", "eel")
CONFIG = DataConfig("imagefolder", crop_padding=2, size=20, crop=16)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes, 8 training images each, some of them in folders below, and 4 test images."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 4)):
        for name in CLASSES:
            for index in range(count):
                place = tmp_path / "set" / part / name / ("more" if index % 2 else "")
                place.mkdir(parents=True, exist_ok=True)
                pixels = draw.integers(0, 256, (24, 20 + index, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{index}.{'png' if index % 3 else 'jpg'}")
    (tmp_path / "set" / "train" / "cat" / "Thumbs.db").write_bytes(b"no image")
    (tmp_path / "set" / "train" / ".hidden").mkdir()
    return tmp_path / "set"


def loaded(root: Path, **changes: object) -> Dataset:
    return sources.of_recipe(DataConfig(**{**CONFIG.__dict__, "root": str(root), **changes}))


def test_classes_are_the_sorted_folders_and_images_the_files_below(root: Path) -> None:
    dataset = loaded(root)
    assert dataset.class_names == CLASSES
    assert isinstance(dataset.train_images, torch.Tensor)
    assert list(dataset.train_images.shape) == [24, 3, 16, 16] and list(dataset.test_images.shape) == [12, 3, 16, 16]
    assert dataset.train_labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert dataset.test_labels.bincount().tolist() == [4, 4, 4]
    first = sorted((root / "train" / "cat").rglob("*.[pj]*g"))[0]
    np.testing.assert_array_equal(dataset.train_images[0].numpy(), load_image(first, 20, 16))
    preprocessing = dataset.preprocessing
    assert (preprocessing.size, preprocessing.crop, preprocessing.mean[0]) == (20, 16, 0.485)
    assert dataset.notes == (
        f"ignored in {root}: 1 hidden folder (first {root}/train/.hidden), "
        f"1 file with another ending (1 .db; first {root}/train/cat/Thumbs.db)",
    )
    own = loaded(root, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 0.5)).preprocessing
    assert own.mean == (0.1, 0.2, 0.3) and own.std == (1.0, 1.0, 0.5) and own.crop == 16


def test_val_may_take_the_place_of_test(root: Path) -> None:
    (root / "test").rename(root / "val")
    assert len(loaded(root).test_labels) == 12


def test_a_streamed_set_gives_the_same_bits(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes decode, the order and the augmentation are the generator's: as from memory."""
    memory = loaded(root)
    monkeypatch.setattr(streaming, "IN_MEMORY_BYTES", 100)
    streamed = loaded(root)
    assert isinstance(streamed.train_images, imagefolder.FolderImages)
    chosen = torch.tensor([5, 0, 17, 9, 23, 2, 3])
    made = []
    for dataset in (memory, streamed):
        images = subset(dataset.train_images, chosen)
        batches = Batches(
            images, dataset.train_labels[chosen], dataset.preprocessing, 3, 2, True, torch.device("cpu"), strong=True
        )
        assert len(batches) == 2
        made.append(list(batches.epoch(torch.Generator().manual_seed(1), views=2)))
    for own, other in zip(*made, strict=True):
        assert len(own) == len(other) == 3
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))
    whole = [torch.cat(list(evaluation_batches(d.test_images, d.preprocessing, 5))) for d in (memory, streamed)]
    assert torch.equal(*whole)


def test_a_broken_file_ends_a_stream_in_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "IN_MEMORY_BYTES", 100)
    (root / "train" / "dog" / "2.png").write_bytes(b"broken")
    dataset = loaded(root)
    batches = Batches(
        dataset.train_images, dataset.train_labels, dataset.preprocessing, 24, 0, False, torch.device("cpu")
    )
    with pytest.raises(UsageError, match=r"dog/2\.png: cannot be decoded as an image") as caught:
        list(batches.epoch(torch.Generator()))
    assert "Traceback" not in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody tells who sent a signal")
def test_only_the_training_itself_ends_its_workers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "IN_MEMORY_BYTES", 100)
    images = loaded(root).train_images
    assert isinstance(images, streaming.StoredImages)
    others = set(multiprocessing.active_children())
    stream = streaming.stream_batches(images, [torch.tensor([index]) for index in range(24)])
    next(stream)  # one worker has decoded a batch; another may still be starting
    workers = [str(worker.pid) for worker in set(multiprocessing.active_children()) - others]
    assert workers
    for name in ("TERM", "INT"):  # to all processes, as torchrun, SLURM and terminals do
        subprocess.run(["kill", f"-{name}", *workers], check=True)
    assert len(list(stream)) == 23
    others = set(multiprocessing.active_children())
    stream = streaming.stream_batches(images, [torch.tensor([index]) for index in range(24)])
    next(stream)
    worker = (set(multiprocessing.active_children()) - others).pop()
    with pytest.raises(RuntimeError, match=r"Terminated|exited unexpectedly"):
        worker.terminate()
        worker.join(20)
        list(stream)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody tells who sent a signal")
def test_a_signal_before_a_worker_is_ready_does_not_end_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "IN_MEMORY_BYTES", 100)
    images = loaded(root).train_images
    assert isinstance(images, streaming.StoredImages)
    fork = os.fork
    started: list[int] = []

    def signalled() -> int:
        started.append(fork())
        if started[-1]:
            for name in ("TERM", "INT"):
                subprocess.run(["kill", f"-{name}", str(started[-1])], check=True)
        return started[-1]

    monkeypatch.setattr(os, "fork", signalled)
    streamed = list(streaming.stream_batches(images, [torch.tensor([index]) for index in range(24)]))
    assert len(streamed) == 24
    assert len(started) == streaming.workers()


@pytest.mark.parametrize("change", ["gone", "longer", "newer"])
def test_a_folder_that_changes_while_it_is_read_is_noticed(root: Path, change: str) -> None:
    _, train, _, _ = imagefolder.list_folder(root)
    images = imagefolder.FolderImages(train, 20, 16, False)
    path = train[3].path
    if change == "gone":
        path.unlink()
    elif change == "longer":
        path.write_bytes(path.read_bytes() + b"\0")
        os.utime(path, ns=(train[3].modified, train[3].modified))
    else:
        os.utime(path, ns=(train[3].modified + 1, train[3].modified + 1))
    message = "cannot be read any more" if change == "gone" else "changed while the data set was read"
    with pytest.raises(ToolError, match=f"{path.name}: {message}") as caught:
        images[:]
    assert caught.value.exit_code == 3
    assert len(images[:3]) == 3


def test_what_is_wrong_with_a_folder_is_said(root: Path, tmp_path: Path) -> None:
    def refusal() -> str:
        with pytest.raises(UsageError) as caught:
            loaded(root)
        return str(caught.value)

    (root / "train" / "ape").mkdir()
    assert refusal() == (
        f"{root}/train/ape: a class without images ({imagefolder.USUAL_ENDINGS}): it is empty; add some or remove it"
    )
    (root / "train" / "ape" / "1.npy").touch()
    assert "(1 .npy; first" in refusal()
    shutil.rmtree(root / "train" / "ape")
    (root / "test" / "fox").mkdir()
    assert refusal().startswith(f"{root}/test/fox: a class that {root}/train does not have; remove it or add training")
    (root / "test" / "fox").rmdir()
    shutil.rmtree(root / "test" / "eel")  # a class without test images is no mistake
    assert loaded(root).test_labels.bincount().tolist() == [4, 4]
    shutil.move(root / "test" / "dog", tmp_path / "dog")
    (root / "test" / "cat").rename(root / "test" / "moved")
    (root / "test" / "cat").mkdir()
    shutil.rmtree(root / "test" / "moved")
    (root / "test" / "dog").mkdir()
    assert refusal().startswith(
        f"{root}/test: none of its 2 class folders has an image ({imagefolder.USUAL_ENDINGS}): cat: it"
    )
    shutil.rmtree(root / "test")
    (root / "test").mkdir()
    shutil.copy(next((root / "train" / "cat").glob("*.png")), root / "test")
    assert refusal().startswith(f"{root}/test: its images lie in no class folders")
    shutil.rmtree(root / "test")
    assert refusal().startswith(f"data.root: imagefolder wants {root}/train/CLASS/* and {root}/test/CLASS/* (or val/)")
    (root / "test").mkdir()
    assert refusal().startswith(f"{root}/test: no class folders")
    with pytest.raises(UsageError, match=f"set data.root to {root}$"):
        loaded(root / "train")
    with pytest.raises(UsageError, match=r"there is no such folder$"):
        loaded(root / "none")
    with pytest.raises(UsageError, match=r"^data\.root: missing; imagefolder needs the folder"):
        sources.load("imagefolder", None, False)


def test_an_image_that_is_not_rgb_needs_leave(root: Path) -> None:
    path = root / "train" / "eel" / "2.png"
    with Image.open(path) as image:
        grey = image.convert("L")
    grey.save(path)
    with pytest.raises(UsageError, match=r"eel/2\.png: has the color mode L, not RGB; .*data\.convert: true"):
        loaded(root)
    images = loaded(root, convert=True).train_images[:]
    colourless = [i for i in range(24) if torch.equal(images[i, 0], images[i, 1])]
    assert len(colourless) == 1


def test_duplicates_between_training_and_test_are_found_by_their_bytes(root: Path) -> None:
    _, train, test, _ = imagefolder.list_folder(root)
    assert imagefolder.duplicates(train, test) == []
    shutil.copy(train[5].path, root / "test" / "dog" / "copy.png")
    # As long as another one and with the same beginning, but not the same.
    almost = bytearray(train[6].path.read_bytes())
    almost[-1] ^= 1
    (root / "test" / "dog" / "almost.png").write_bytes(bytes(almost))
    _, train, test, _ = imagefolder.list_folder(root)
    assert imagefolder.duplicates(train, test) == [(train[5].path, root / "test" / "dog" / "copy.png")]
    said: list[str] = []
    config = DataConfig(**{**CONFIG.__dict__, "root": str(root)})
    (root / "test" / "dog" / "almost.png").unlink()
    notes = sources.of_recipe(config, lambda *args: said.append(str(args[-1]))).notes
    assert len(notes) == 2 and notes[1].startswith("1 of 13 test images are training images too, byte for byte, first")
    assert any(line.startswith("warning: 1 of 13 test images") for line in said)


def test_decoding_is_told_of(root: Path) -> None:
    _, train, _, _ = imagefolder.list_folder(root)
    seen: list[tuple[str, int, int]] = []
    images = imagefolder.FolderImages(train, 20, 16, False)
    decoded = streaming.decode(
        images, "training images", lambda task, done, total, *_: seen.append((task, done, total))
    )
    assert isinstance(decoded, torch.Tensor) and seen == [("training images", 24, 24)]
    assert torch.equal(streaming.decode(images, "", quiet)[:], images[:])


def test_swapped_parts_are_suspected(root: Path) -> None:
    shutil.rmtree(root / "test" / "eel")
    (root / "train").rename(root / "moved")
    (root / "test").rename(root / "train")
    (root / "moved").rename(root / "test")
    with pytest.raises(UsageError, match=r"test/eel: a class that .* or are the two parts swapped\?$"):
        loaded(root)
    shutil.rmtree(root / "test" / "eel")
    assert any(
        note.startswith("more test images (16) than training images (8): are the two") for note in loaded(root).notes
    )


def test_other_endings_links_and_hidden_files_are_taken_or_named(root: Path, tmp_path: Path) -> None:
    """Each once, with the first of its kind; a link is followed, and never into a circle."""
    cat = root / "train" / "cat"
    png = next(cat.glob("*.png"))
    Image.open(png).save(cat / "photo.JFIF", "JPEG")
    Image.open(png).save(cat / "picture.tga")
    shutil.move(root / "train" / "dog", tmp_path / "elsewhere")
    (root / "train" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "more").mkdir()
    shutil.copy(png, tmp_path / "more" / "linked.png")
    (cat / "linked").symlink_to(tmp_path / "more")
    (cat / "again").symlink_to(cat)
    (root / "train" / "all").symlink_to(root)
    (cat / "._photo.jpg").touch()
    (cat / ".cache").mkdir()
    shutil.copy(png, cat / ".cache" / "hidden.png")
    (root / "train" / "list.txt").touch()
    (root / "val").mkdir()
    names, train, _, left_out = imagefolder.list_folder(root)
    assert names == CLASSES
    assert np.bincount([file.label for file in train]).tolist() == [11, 8, 8]
    assert {"photo.JFIF", "picture.tga", "linked.png"} <= {file.path.name for file in train}
    assert left_out.split(", ") == [
        f"2 hidden folders (first {root}/train/.hidden)",
        f"2 links to folders that are read already (first {root}/train/all)",
        f"1 file beside the class folders (first {root}/train/list.txt)",
        f"1 folder beside test (first {root}/val)",
        f"1 hidden file (first {cat}/._photo.jpg)",
        f"1 file with another ending (1 .db; first {cat}/Thumbs.db)",
    ]
    assert loaded(root).train_images.shape == (27, 3, 16, 16)
    (cat / "gone.png").symlink_to(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"gone\.png: a link to a file that does not exist; repair or remove it$"):
        loaded(root)


def test_grey_images_have_one_channel(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UsageError, match=r"RGB, not grey; save it as grey, or set data\.convert: true .* leave data\.ch"
    ):
        loaded(root, channels=1)
    dataset = loaded(root, channels=1, convert=True)
    assert dataset.train_images.shape == (24, 1, 16, 16)
    assert (dataset.preprocessing.mean, dataset.preprocessing.std) == ((0.449,), (0.226,))
    first = sorted((root / "train" / "cat").rglob("*.[pj]*g"))[0]
    with Image.open(first) as image:
        image.convert("L").save(first.with_suffix(".png"))
    grey = load_image(first.with_suffix(".png"), 20, 16, channels=1)  # no leave needed
    assert grey.shape == (1, 16, 16) and grey.std() > 0
    monkeypatch.setattr(streaming, "IN_MEMORY_BYTES", 100)
    images = loaded(root, channels=1, convert=True).train_images
    assert isinstance(images, streaming.StoredImages)
    assert next(streaming.stream_batches(images, [torch.tensor([1, 2])])).shape == (2, 1, 16, 16)
