from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from torch import nn

from crqat.core.errors import UsageError
from crqat.pipeline.cli import crqat
from crqat.pipeline.recipe import recipe
from crqat.train.data import sources
from tests import needs
from tests.conftest import made_once

NETWORK = """
import torch
from torch import nn


def network(classes: int = 10, channels: int = 1) -> nn.Module:
    layers = nn.Conv2d(channels, 12, 3, 2), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(16, classes))


def twelve() -> nn.Module:
    return network(12)


class Wave(nn.Sequential):  # of values in 0..1 nearly the same, of others another
    def forward(self, images):
        return super().forward((1 - torch.cos(torch.pi * images)) / 2)


def wave() -> nn.Module:
    return Wave(*network())
"""
POINTED = ("--images", "digits", "--model", "small:network", "--weights", "small.pt")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits in train/CLASS and test/CLASS, and a network that was trained on them by values in 0..1."""
    with made_once(tmp_path_factory, "new_recipe") as (folder, filled):
        if filled:
            return folder
        data = sources.load("digits", None, False)
        parts = (("train", data.train_images, data.train_labels), ("test", data.test_images, data.test_labels))
        for part, images, labels in parts:
            for index, (image, label) in enumerate(zip(images[:], labels.tolist(), strict=True)):
                path = folder / "digits" / part / f"digit{label}" / f"{index:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.asarray(image[0])).save(path)
        (folder / "small.py").write_text(NETWORK)
        space: dict[str, Any] = {}
        exec(NETWORK, space)  # noqa: S102 - the text above
        torch.manual_seed(0)
        network: nn.Module = space["network"]()
        inputs = data.train_images[:].float() / 255
        optimizer = torch.optim.Adam(network.parameters(), 0.01)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(inputs), data.train_labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        torch.save(network.state_dict(), folder / "small.pt")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with links to the images, the weights and the network's module."""
    for name in ("digits", "small.py", "small.pt"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(crqat, arguments, standalone_mode=False)


def data_of(path: str) -> dict[str, Any]:
    """The `data` section of a recipe as far as it is not default."""
    section = recipe.resolved(recipe.load(Path(path)))["data"]
    usual = recipe.completed("data", {})
    return {key: value for key, value in section.items() if value != usual.get(key)}


def test_the_recipe_has_the_needed_keys_and_runs_as_it_is(place: Path) -> None:
    said = run("init", "own.yaml", *POINTED, "--mean", "0", "--std", "1", "--json")
    assert said.exception is None, said.output
    summary = json.loads(said.stdout)
    assert (summary["train_images"], summary["test_images"], summary["channels"], summary["crop"]) == (1000, 797, 1, 8)
    assert summary["float_top1"] > 0.8 and summary["warnings"] == [] and summary["tried_images"] == 100
    text = Path("own.yaml").read_text()
    assert re.findall(r"^ *(\w+):", text, re.M) == [
        *("name", "data", "source", "root", "size", "crop", "channels", "mean", "std"),
        *("model", "name", "weights", "qat", "epochs"),
    ]
    assert "normalization" not in text
    # As it is but for the time of the measurement.
    short = ["--set", "benchmark.latency_rounds=6", "--set", "benchmark.latency_seconds=0.1"]
    ended = run("run", "own.yaml", *short, "--set", "targets=[onnxruntime]", "--json", "--quiet")
    assert ended.exception is None, ended.output
    found = json.loads(ended.stdout)
    assert (found["verdict"], found["exit_code"], ended.return_value) == ("pass", 0, 0)
    assert found["results"]["models"]["float.onnx"]["accuracy"]["top1"] > 0.8
    assert Path(found["files"]["report"]).is_file()
    assert ended.stderr == ""
    # The float file that came out is a network, too, which says by itself what it takes.
    file = "runs/own/export/float.onnx"
    assert run("init", "onnx.yaml", *POINTED[:3], file, "--mean", "0", "--std", "1").exception is None
    assert recipe.load(Path("onnx.yaml")).model.name == file
    assert data_of("onnx.yaml") == data_of("own.yaml")
    assert "already has its weights" in str(run("init", "new.yaml", *POINTED[:3], file, *POINTED[4:]).exception)


def test_shards_and_saved_tables_are_told_by_what_lies_in_the_folder(place: Path) -> None:
    (place / "shards").mkdir()
    for part in ("train", "test"):
        with tarfile.open(f"shards/{part}-0.tar", "w") as archive:
            for path in sorted((place / "digits" / part).rglob("*.png"))[::8]:
                for ending, content in (("png", path.read_bytes()), ("cls", path.parent.name[-1].encode())):
                    entry = tarfile.TarInfo(f"{path.stem}.{ending}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    result = run("init", "shards.yaml", "--images", "shards", *POINTED[2:], "--size", "8", "--mean", "0", "--std", "1")
    assert result.exception is None, result.output
    assert data_of("shards.yaml") == {
        "source": "webdataset", "root": "shards", "size": 8, "crop": 8, "channels": 1, "mean": [0.0], "std": [1.0],
    }  # fmt: skip
    needs.require("datasets")
    import datasets

    table = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    rows = {
        part: datasets.Dataset.from_dict(
            {"image": [str(path) for path in paths], "label": [int(path.parent.name[-1]) for path in paths]}, table
        )
        for part in ("train", "test")
        if (paths := sorted((place / "digits" / part).rglob("*.png"))[::8])
    }
    datasets.DatasetDict(rows).save_to_disk("table")
    result = run("init", "table.yaml", "--images", "table", *POINTED[2:], "--size", "8", "--mean", "0", "--std", "1")
    assert result.exception is None, result.output
    assert data_of("table.yaml") == {**data_of("shards.yaml"), "source": "huggingface", "root": "table"}


def test_with_all_every_key_is_there_and_says_the_same(place: Path) -> None:
    for name, more in (("few.yaml", ()), ("every.yaml", ("--all",))):
        assert run("init", name, *POINTED, *more).exception is None
    few, every = (recipe.resolved(recipe.load(Path(name))) for name in ("few.yaml", "every.yaml"))
    assert few.pop("name") == "few" and every.pop("name") == "every"
    assert few == every
    text = Path("every.yaml").read_text()
    assert all(f"{key}:" in text for section in every.values() if isinstance(section, dict) for key in section)
    assert "  # mean and std: normalization was not given" in text


def test_normalization_that_was_not_given_is_said_and_a_better_one_named(place: Path) -> None:
    result = run("init", "own.yaml", *POINTED[:3], "small:wave", *POINTED[4:])
    assert result.exception is None, result.output
    assert "  # mean and std: normalization was not given, so ImageNet's is used: mean [0.449], std [0.226]." in (
        Path("own.yaml").read_text().splitlines()
    )
    warning = next(line for line in result.stderr.splitlines() if line.startswith("warning: "))
    assert re.search(
        r"not given, and the float network classifies \d+% of 100 test images correctly; with --mean 0 --std 1 it",
        warning,
    )


def test_of_class_folders_half_of_each_class_tests(place: Path) -> None:
    (place / "flat").symlink_to(place / "digits" / "train")
    result = run("init", "flat.yaml", "--images", "flat", *POINTED[2:], "--mean", "0", "--std", "1")
    assert result.exception is None, result.output
    assert data_of("flat.yaml") == {
        "source": "imagelist", "root": "flat", "image_list": "flat.images.json", "size": 8, "crop": 8, "channels": 1,
        "mean": [0.0], "std": [1.0],
    }  # fmt: skip
    listed = json.loads(Path("flat.images.json").read_text())
    assert not listed["train"].keys() & listed["test"].keys() and len(listed["train"] | listed["test"]) == 1000
    for label in range(10):
        counts = [list(listed[part].values()).count(label) for part in ("train", "test")]
        assert 0 <= counts[0] - counts[1] <= 1
    assert run("train", "flat.yaml", "--set", "compile=never").exception is None


def test_without_weights_the_network_is_trained(place: Path) -> None:
    assert run("init", "new.yaml", *POINTED[:4]).exception is None
    section = recipe.load(Path("new.yaml")).float_training
    assert section is not None and section.epochs == 10
    assert run("init", "published.yaml", "--images", "digits", "--model", "resnet18").exception is None
    config = recipe.load(Path("published.yaml"))
    assert (config.model.name, config.model.weights, config.data.size) == ("torchvision/resnet18", "pretrained", None)
    assert config.float_training is not None and config.float_training.lr == 0.01  # of a thousand other classes


def folder_of(place: Path, modes: Sequence[str], sides: Sequence[tuple[int, int]]) -> str:
    for label in range(2):
        for index in range(12):
            path = place / "mixed" / f"class{label}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new(modes[index % len(modes)], sides[index % len(sides)], 128 if index % 2 else 30).save(path)
    return "mixed"


@pytest.mark.parametrize(
    ("modes", "sides", "expected"),
    [
        (["RGB"], [(40, 40)], {"size": 40, "crop": 40}),
        (["RGB", "L"], [(64, 48)], {"size": 48, "crop": 48, "convert": True}),
        (["L"], [(300, 300), (500, 400)], {"channels": 1}),
    ],
)
def test_channels_and_sizes_are_those_of_the_images(
    place: Path, modes: list[str], sides: list[tuple[int, int]], expected: dict[str, Any]
) -> None:
    folder = folder_of(place, modes, sides)
    result = run("init", "mixed.yaml", "--images", folder, "--model", "cifar/resnet20")
    assert result.exception is None, result.output
    found = data_of("mixed.yaml")
    assert {key: found[key] for key in found if key not in ("source", "root", "image_list")} == expected
    text = Path("mixed.yaml").read_text()
    assert ("cropped from the center" in text) == (len(sides) > 1)


def test_grey_images_of_a_network_for_colours_are_converted(place: Path) -> None:
    (place / "colour.py").write_text(
        NETWORK.replace("channels: int = 1) ->", "channels: int = 3) ->").replace("(channels,", "(3,")
    )
    result = run("init", "own.yaml", "--images", "digits", "--model", "colour:network")
    assert result.exception is None, result.output
    assert data_of("own.yaml") == {
        "source": "imagefolder", "root": "digits", "size": 8, "crop": 8, "convert": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "none", *POINTED[2:]], r"--images: none is not a folder"),
        (
            ["--images", "digits/train", *POINTED[2:]],
            r"--images: digits/train is only one part of a data set; give the folder of all parts, \S+digits$",
        ),
        ([*POINTED[:3], "smal:network"], r"--model: cannot import 'smal'"),
        ([*POINTED[:3], "small:netwok"], r"--model: module 'small' .* has no function or class 'netwok'"),
        ([*POINTED[:3], "small:twelve"], r"--model: the network gives 12 logits, the data has 10 classes"),
        ([*POINTED[:5], "none.pt"], r"--weights: no file none\.pt"),
        ([*POINTED[:5], "small.py"], r"--weights: small\.py is not one of "),
        ([*POINTED, "--mean", "0.1,0.2,0.3"], r"--mean: has 3 numbers for 1 channels; give one number"),
        ([*POINTED, "--mean", "bright"], r"--mean: bright is not a list of numbers"),
        ([*POINTED, "--size", "8", "--crop", "9"], r"--crop: 9 is larger than --size 8"),
        (["--images", "digits"], r"--images: also needs --model"),
        (["--std", "0.1"], r"--std: also needs --images"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(place: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        CliRunner().invoke(crqat, ["init", "own.yaml", *arguments], standalone_mode=False, catch_exceptions=False)
    assert not list(place.glob("own*"))


def test_weights_that_are_no_numbers_are_refused(place: Path) -> None:
    state = torch.load("small.pt", weights_only=True)
    state["2.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, "nan.pt")
    message = r"^--weights: nan\.pt holds values that are infinite or NaN: 1 of 1728 in 2\.weight; the file is damaged$"
    with pytest.raises(UsageError, match=message):
        CliRunner().invoke(
            crqat, ["init", "own.yaml", *POINTED[:5], "nan.pt"], standalone_mode=False, catch_exceptions=False
        )


def test_weights_of_other_classes_are_said_with_the_number_of_folders(place: Path) -> None:
    space: dict[str, Any] = {}
    exec(NETWORK, space)  # noqa: S102 - the text above
    torch.save(space["network"](12).state_dict(), "twelve.pt")
    message = r"^--weights: twelve\.pt does not fit .*\(5\.weight \[12, 16\] instead of .*; digits has 10 classes$"
    with pytest.raises(UsageError, match=message):
        CliRunner().invoke(
            crqat, ["init", "own.yaml", *POINTED[:5], "twelve.pt"], standalone_mode=False, catch_exceptions=False
        )
