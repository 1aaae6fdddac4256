"""Image files: what they become, and what is refused."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from torchvision.transforms.v2 import functional as torchvision_f  # type: ignore[import-untyped]

from crqat.core.errors import ToolError, UsageError
from crqat.core.image_file import endings, load_image
from crqat.core.preprocessing import Preprocessing


def picture(width: int = 40, height: int = 30) -> npt.NDArray[np.uint8]:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 8, columns * 6, (rows + columns) * 3], axis=2).astype(np.uint8)


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize(("width", "height"), [(40, 30), (30, 40), (33, 33), (200, 17)])
@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.webp"])
def test_resize_and_crop_are_torchvisions(tmp_path: Path, width: int, height: int, name: str) -> None:
    options: dict[str, Any] = {"lossless": True} if name.endswith("webp") else {}
    image = Image.fromarray(picture(width, height))
    array = load_image(saved(tmp_path / name, image, **options), 24, 16)
    assert array.dtype == np.uint8 and array.shape == (3, 16, 16) and array.flags.c_contiguous
    resized = torchvision_f.resize(image, 24, interpolation=torchvision_f.InterpolationMode.BILINEAR)
    left, top = (resized.width - 16) // 2, (resized.height - 16) // 2
    expected = np.asarray(resized)[top : top + 16, left : left + 16].transpose(2, 0, 1)
    # Its rule for the longer side cuts off, ours rounds: at most one pixel of the longer side.
    np.testing.assert_allclose(array.astype(int), expected.astype(int), atol=8 if width != height else 0)


def test_an_image_of_the_right_size_is_not_changed(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(picture(32, 32)))
    np.testing.assert_array_equal(load_image(path, 32, 32), picture(32, 32).transpose(2, 0, 1))


def test_the_exif_tag_turns_the_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    path = saved(tmp_path / "a.jpg", Image.fromarray(picture(32, 32)), exif=exif, quality=100, subsampling=0)
    turned = np.rot90(picture(32, 32), k=-1).transpose(2, 0, 1)
    assert np.abs(load_image(path, 32, 32).astype(int) - turned).mean() < 3


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_other_modes_are_refused_or_converted(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(picture(16, 16)).convert(mode)
    path = saved(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"), image)
    with pytest.raises(UsageError, match=rf"a\.(png|jpg): has the color mode {mode}, not RGB; .*data\.convert: true"):
        load_image(path, 16, 16)
    with Image.open(path) as again:
        expected = np.asarray(again.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(load_image(path, 16, 16, convert=True), expected)


@pytest.mark.parametrize("convert", [False, True])
def test_transparency_and_16_bits_have_no_meaning_in_rgb(tmp_path: Path, convert: bool) -> None:
    image = Image.fromarray(picture(16, 16)).convert("RGBA")
    opaque = saved(tmp_path / "opaque.png", image)
    image.putpixel((3, 3), (1, 2, 3, 254))
    with pytest.raises(UsageError, match=r"seen\.png: has transparent pixels; put it on a background"):
        load_image(saved(tmp_path / "seen.png", image), 16, 16, convert)
    deep = Image.fromarray(np.full((16, 16), 40000, np.uint16))
    with pytest.raises(UsageError, match=r"deep\.png: I;16 pixels of more than 8 bits"):
        load_image(saved(tmp_path / "deep.png", deep), 16, 16, convert)
    if convert:
        np.testing.assert_array_equal(load_image(opaque, 16, 16, convert), picture(16, 16).transpose(2, 0, 1))
    else:
        with pytest.raises(UsageError, match="RGBA, not RGB"):
            load_image(opaque, 16, 16)


@pytest.mark.parametrize("mode", ["RGB", "1", "P", "CMYK"])
def test_images_become_grey_with_leave(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(picture(16, 16)).convert(mode)
    path = saved(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"), image)
    with pytest.raises(UsageError, match=rf"{mode}, not grey; save it as grey, or set data\.convert: true"):
        load_image(path, 16, 16, channels=1)
    with Image.open(path) as again:
        expected = np.asarray(again.convert("L"))[None]
    np.testing.assert_array_equal(load_image(path, 16, 16, convert=True, channels=1), expected)
    with pytest.raises(UsageError, match=r"1 channel .* or 3 .*, not 4; set data.channels"):
        load_image(path, 16, 16, channels=4)


def test_no_format_is_read_that_calls_another_program(tmp_path: Path) -> None:
    """Pillow hands EPS to Ghostscript, whatever the file is called."""
    path = saved(tmp_path / "a.eps", Image.fromarray(picture(16, 16))).rename(tmp_path / "a.jpg")
    with pytest.raises(UsageError, match=r"a\.jpg: cannot be decoded as an image \(cannot identify"):
        load_image(path, 16, 16)
    assert {".jpg", ".jfif", ".png", ".webp", ".tga"} <= endings()
    assert not {".eps", ".ps", ".pdf", ".mpg", ".h5", ".wmf"} & endings()


def test_what_cannot_be_decoded_is_named_in_one_line(tmp_path: Path) -> None:
    good = saved(tmp_path / "good.jpg", Image.fromarray(picture(200, 200))).read_bytes()
    png = saved(tmp_path / "good.png", Image.fromarray(picture(200, 200))).read_bytes()
    specimens = {
        "text.jpg": b"not an image",
        "empty.png": b"",
        "half.jpg": good[: len(good) // 2],
        "half.png": png[: len(png) // 2],
        "flipped.png": png[:60] + bytes([png[60] ^ 255]) + png[61:],
    }
    for name, content in specimens.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=rf"{name}: cannot be decoded as an image \(") as caught:
            load_image(tmp_path / name, 16, 16)
        assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_large_files_and_bombs_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    large = tmp_path / "large.bmp"
    with large.open("wb") as file:
        file.truncate(100 * 2**20)  # sparse
    with pytest.raises(UsageError, match=r"large\.bmp: 100 MiB; image files above 64 MiB are refused"):
        load_image(large, 16, 16)
    # A header that promises 65,000 x 65,000 pixels, and one of 9,000 x 9,000: their sizes are looked at, nothing else.
    small = saved(tmp_path / "a.bmp", Image.fromarray(picture(16, 16))).read_bytes()
    for side, message in ((65000, "cannot be decoded as an image"), (9000, "9000 x 9000 pixels; images above 64 mega")):
        bomb = tmp_path / f"{side}.bmp"
        bomb.write_bytes(small[:18] + struct.pack("<ii", side, side) + small[26:])
        with pytest.raises(UsageError, match=f"{side}.bmp: {message}"):
            load_image(bomb, 16, 16)


def test_a_file_that_is_gone_is_the_environments_fault(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=r"gone\.png: cannot be read: No such file") as caught:
        load_image(tmp_path / "gone.png", 16, 16)
    assert caught.value.exit_code == 3


def test_preprocessing_survives_json() -> None:
    for made in (Preprocessing((0.5,), (0.25,)), Preprocessing((0.1, 0.2, 0.3), (1.0, 2.0, 3.0), 256, 224)):
        assert Preprocessing.from_json(json.loads(json.dumps(asdict(made)))) == made


def test_the_filter_of_the_weights_is_used_wherever_the_model_runs(tmp_path: Path) -> None:
    image = Image.fromarray(picture(48, 48))
    path = saved(tmp_path / "a.png", image)
    for name in ("bilinear", "bicubic", "lanczos", "nearest"):
        expected = np.asarray(image.resize((24, 24), Image.Resampling[name.upper()])).transpose(2, 0, 1)
        np.testing.assert_array_equal(load_image(path, 24, 24, interpolation=name), expected)
    made = Preprocessing((0.5,), (0.25,), 256, 224, "bicubic")
    assert Preprocessing.from_json(asdict(made)) == made
    assert Preprocessing.from_json({"mean": [0.5], "std": [0.25], "size": 4, "crop": 4}).interpolation == "bilinear"
    with pytest.raises(ValueError, match="interpolation 'cubic' is not one of bilinear"):
        Preprocessing.from_json({**asdict(made), "interpolation": "cubic"})
