"""WebDataset shards: what is indexed and decoded, and what is wrong with an archive."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from crqat.core.errors import ToolError, UsageError
from crqat.core.progress import quiet
from crqat.train.config import DataConfig
from crqat.train.data import imagefolder, sources, webdataset
from crqat.train.data.dataset import Dataset
from tests.crqat_train.stored_sets import png, sample, tar

IMAGES = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def loaded(root: Path, **changes: object) -> Dataset:
    values = {**DataConfig("webdataset", size=8, crop=8).__dict__, "root": str(root), **changes}
    return sources.of_recipe(DataConfig(**values))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two training shards and one test shard with three classes."""
    for part, numbers in (("train-0", range(4)), ("train-1", range(4, 9)), ("test-0", range(9, 12))):
        members = [member for n in numbers for member in sample(f"{n:04}", IMAGES[n], n % 3)]
        tar(tmp_path / f"{part}.tar", members)
    return tmp_path


def refusal(root: Path) -> str:
    with pytest.raises(UsageError) as caught:
        loaded(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def replaced(root: Path, *members: tuple[str, bytes]) -> str:
    tar(root / "train-1.tar", members)
    return refusal(root)


def test_shards_are_parts_by_a_word_of_their_name(root: Path) -> None:
    dataset = loaded(root)
    assert torch.equal(dataset.train_images[:], IMAGES[:9]) and torch.equal(dataset.test_images[:], IMAGES[9:])
    assert dataset.train_labels.tolist() == [n % 3 for n in range(9)]
    assert dataset.class_names == ("0", "1", "2")
    assert (dataset.preprocessing.size, dataset.preprocessing.crop) == (8, 8)
    (root / "train-1.tar").rename(root / "imagenet1k-train-0001.tar")
    (root / "test-0.tar").rename(root / "some_validation_00.tar")
    (root / "constraint.tar").write_bytes(b"neither")
    (root / "classes.txt").write_text("cat\ndog\neel\n")
    dataset = loaded(root)
    assert dataset.class_names == ("cat", "dog", "eel")
    assert torch.equal(dataset.train_images[:], IMAGES[[4, 5, 6, 7, 8, 0, 1, 2, 3]])


def test_images_of_any_size_and_name(root: Path) -> None:
    """Long names, dots in folders, further files of a sample, images of other sizes: resized as a folder's are."""
    large = torch.randint(0, 256, (3, 30, 17), dtype=torch.uint8)
    deep = "a.b/" + "x" * 150 + "/ü"
    members = [
        (f"{deep}.cls", b" 2\n"),
        (f"{deep}.seg.png", b"?"),
        (f"{deep}.JSON", b"{}"),
        (f"{deep}.PNG", png(large)),
    ]
    tar(root / "train-1.tar", [("./.hidden", b"?"), ("README", b"?"), ("info.json", b"{}"), *members])
    dataset = loaded(root)
    assert len(dataset.train_labels) == 5 and dataset.train_labels[4] == 2
    (root / "large.png").write_bytes(png(large))
    file = imagefolder.ImageFile(root / "large.png", 0, *imagefolder.file_state(root / "large.png"))
    assert torch.equal(dataset.train_images[4:5][0], imagefolder.FolderImages((file,), 8, 8, False)[:][0])


def test_what_is_wrong_with_a_sample_is_said(root: Path) -> None:
    path = root / "train-1.tar"
    good = sample("0005", IMAGES[5], 1)
    assert replaced(root, good[0]) == (
        f"{path}: 0005: a sample without a .cls with its class number; add it or leave the sample out"
    )
    assert replaced(root, good[1], *sample("6", IMAGES[6], 0)).startswith(f"{path}: 0005: a sample without an image")
    assert replaced(root, *good, ("0005.jpg", b"")).startswith(f"{path}: 0005.jpg: a second image of the same sample")
    assert replaced(root, good[0], ("0005.cls", b"cat")) == f"{path}: 0005.cls: holds 'cat', not a class number"
    assert replaced(root, good[0], ("0005.cls", b"-1")).endswith("holds '-1', not a class number")
    assert replaced(root, good[0], ("0005.cls", b"1" * 10**6)).endswith(f"holds '{'1' * 32}', not a class number")
    assert replaced(root, good[0], ("0005.cls", b"9")).startswith(
        f"{root}: labels go up to 9, but no training image has label 3; number the classes from 0 without gaps"
    )
    (root / "classes.txt").write_text("cat\ndog\neel\n")
    assert replaced(root, good[0], ("0005.cls", b"3")) == (
        f"{path}: 0005.cls: label 3 is not a class number, 0..2 (classes are numbered from 0); "
        "correct the label, or classes.txt"
    )
    assert replaced(root, ("a\n\x1b[1m.png", b""), ("b.cls", b"1")).startswith(f"{path}: a\\n\\x1b[1m: a sample")
    (root / "classes.txt").write_text("cat\ncat\n")
    assert refusal(root).startswith(f"{root}/classes.txt: write one class name a line")


def test_what_is_no_image_names_shard_and_member(root: Path) -> None:
    broken = png(IMAGES[0])[:60]
    message = replaced(root, ("deep/0005.png", broken), ("deep/0005.cls", b"1"))
    assert message.startswith(f"{root}/train-1.tar: deep/0005.png: cannot be decoded as an image (")
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "png")
    message = replaced(root, ("5.png", bomb.getvalue()), ("5.cls", b"1"))
    assert message == f"{root}/train-1.tar: 5.png: 9000 x 9000 pixels; images above 64 megapixels are refused"
    grey = io.BytesIO()
    Image.new("L", (9, 9)).save(grey, "png")
    members = [("5.png", grey.getvalue()), ("5.cls", b"1")]
    assert "train-1.tar: 5.png: has the color mode L, not RGB; save it as RGB, or set data.convert: true" in replaced(
        root, *members
    )
    assert len(loaded(root, convert=True).train_labels) == 5


def test_a_file_that_claims_to_be_large_is_not_read(root: Path) -> None:
    """64 MiB and more are refused by the header alone; the file is sparse on disk."""
    member = tarfile.TarInfo("5.png")
    member.size = 10**12
    with (root / "train-1.tar").open("wb") as file:
        file.write(member.tobuf())
        file.truncate(10**12 + 2 * 512)
    assert refusal(root).startswith(f"{root}/train-1.tar: 5.png: 953674 MiB; image files above 64 MiB are refused")


def cut(length: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:length]


def flip(at: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut(0), "empty file"),
        (cut(100), "truncated header"),
        (cut(700), "unexpected end of data"),
        (cut(512 * 5), "unexpected end of data"),
        (cut(512 * 4 * 5), r"it is cut off at byte 10240"),  # whole, but for the end
        (flip(3), "bad checksum"),
        (flip(512 * 4 + 3), r"no header at byte 2048"),
        (lambda content: content + content, r"no header at byte \d+"),
        (lambda _: b"\x1f\x8b" + bytes(3000), "invalid header|bad checksum"),
    ],
    ids=["empty", "header", "image", "label", "no end", "first header", "later header", "two in one", "gzip"],
)
def test_a_damaged_archive_is_named(root: Path, damage: Callable[[bytes], bytes], reason: str) -> None:
    path = root / "train-1.tar"
    path.write_bytes(damage(path.read_bytes()))
    message = refusal(root)
    assert message.startswith(f"{path}: a damaged tar archive (") and message.endswith("; write or copy it again")
    assert re.search(reason, message), message


def test_a_hostile_archive_is_refused(root: Path) -> None:
    """Links, devices, a size below 0 that leads back, and a header as long as the file."""
    path = root / "train-1.tar"
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        link = tarfile.TarInfo("5.png")
        link.type, link.linkname = kind, "/etc/passwd"
        path.write_bytes(link.tobuf() + bytes(1024))
        assert refusal(root) == f"{path}: 5.png: a link, a device or a sparse file; store it as a file"
    header = bytearray(tarfile.TarInfo("5.txt").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + (2**16 - 1024).to_bytes(2, "big")  # -1024 in base 256
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    path.write_bytes(tarfile.TarInfo("4.txt").tobuf() + bytes(header) + bytes(1024))
    assert refusal(root).startswith(f"{path}: a damaged tar archive (")
    long = tarfile.TarInfo("././@LongLink")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 10**9
    with path.open("wb") as file:
        file.write(long.tobuf())
        file.truncate(10**9 + 2048)
    reason = "a header claims 1000000000 bytes, only 0 to 65536 are allowed"
    assert refusal(root) == f"{path}: a damaged tar archive ({reason}); write or copy it again"


def test_names_that_climb_out_are_only_names(root: Path) -> None:
    members = sample("../../0005", IMAGES[5], 1) + sample("/etc/passwd", IMAGES[6], 2)
    tar(root / "train-1.tar", members)
    before = sorted(root.parent.rglob("*"))
    assert torch.equal(loaded(root).train_images[4:], IMAGES[5:7])
    assert sorted(root.parent.rglob("*")) == before


@pytest.mark.parametrize("change", ["gone", "newer"])
def test_a_shard_that_changes_while_it_is_read_is_noticed(root: Path, change: str) -> None:
    _, train, _ = webdataset.list_shards(root, quiet)
    images = webdataset.ShardImages(train, 8, 8, False)
    assert torch.equal(images[[8, 0]], IMAGES[[8, 0]])
    path = root / "train-1.tar"
    if change == "gone":
        path.unlink()
    else:
        os.utime(path, ns=(0, 0))
    message = "cannot be read any more" if change == "gone" else "changed while the data set was read"
    with pytest.raises(ToolError, match=rf"train-1\.tar: {message}"):
        images[[8]]
    assert torch.equal(images[:4], IMAGES[:4])


def test_a_folder_without_shards_is_said(root: Path) -> None:
    with pytest.raises(UsageError, match=r"^data\.root: missing; webdataset needs the folder with train-\*\.tar"):
        sources.load("webdataset", None, False)
    (root / "test-0.tar").rename(root / "test-0.tar.gz")
    assert refusal(root) == (
        f"data.root: no test shards in {root}; webdataset wants train-*.tar and test-*.tar there"
        " (uncompressed: unpack .tar.gz)"
    )
    assert refusal(root / "none").startswith(f"data.root: no train shards in {root}/none")
    tar(root / "test-0.tar", [("README", b"nothing")])
    assert refusal(root).startswith(f"{root}/test-0.tar: no images (.jpg, ")
