"""`crqat quantize`: from a folder of images to verified files, and what it says of wrong ones."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from crqat.core.errors import UsageError
from crqat.pipeline.cli import crqat
from crqat.pipeline.recipe import recipe as recipes
from crqat.pipeline.stages import staleness
from crqat.train.data import sources

NETWORK = """
from torch import nn


def network(classes: int, channels: int) -> nn.Module:
    first, second = nn.Conv2d(channels, 8, 3), nn.Conv2d(8, 16, 3, 2)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(64, classes))
"""
NAMES = tuple(f"digit{label}" for label in range(10))
HOW = ("--size", "8", "--crop", "8", "--mean", "0.3,0.3,0.3", "--std", "0.35,0.35,0.35")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that knows digits, 300 of them in class folders, and 120 of them in a flat one."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "known_network.py").write_text(NETWORK)
    found = sources.load("digits", None, False)
    images = found.test_images[:300]
    for index, (image, label) in enumerate(zip(images, found.test_labels[:300].tolist(), strict=True)):
        (folder / "images" / NAMES[label]).mkdir(parents=True, exist_ok=True)
        (folder / "flat").mkdir(exist_ok=True)
        picture = Image.fromarray(image[0].numpy()).convert("RGB")
        picture.save(folder / "images" / NAMES[label] / f"{index}.png")
        if index < 120:
            picture.save(folder / "flat" / f"{index}.png")
    scope: dict[str, Any] = {}
    exec(NETWORK, scope)  # noqa: S102 - the text above
    torch.manual_seed(0)
    network: nn.Module = scope["network"](10, 3)
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    pixels = (found.train_images[:].float() / 255 - 0.3) / 0.35
    for _ in range(60):
        loss = functional.cross_entropy(network(pixels.expand(-1, 3, -1, -1)), found.train_labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    save_file(network.state_dict(), folder / "known.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for file, channels in (("known.onnx", 3), ("four.onnx", 4)):
            example = torch.randn(1, channels, 8, 8)
            exported = network if channels == 3 else nn.Sequential(nn.Conv2d(4, 3, 1), network)
            torch.onnx.export(exported, (example,), str(folder / file), opset_version=17, dynamo=False)
    return folder


def quantize(folder: Path, tmp_path: Path, *arguments: str, how: tuple[str, ...] = HOW) -> Result:
    out = ("--out", str(tmp_path / "runs" / "digits"))
    weights = ("--weights", str(folder / "known.safetensors"))
    given = ["quantize", "known_network:network", *weights, *how, *out, *arguments]
    return CliRunner().invoke(crqat, given, standalone_mode=False)


@pytest.fixture(autouse=True)
def findable(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(digits)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(digits), os.environ["PYTHONPATH"]]))


def test_class_folders_become_verified_files_a_report_and_the_recipe(digits: Path, tmp_path: Path) -> None:
    result = quantize(digits, tmp_path, "--images", str(digits / "images"))
    assert result.exception is None, result.output
    assert result.return_value == 0
    run = tmp_path / "runs" / "digits"
    results = json.loads((run / "benchmark" / "results.json").read_text())
    assert results["dataset"]["n"] == 200  # 100 of 300 calibrate
    assert results["models"]["float.onnx"]["accuracy"]["top1"] > 0.8
    for file in ("onnxruntime.onnx", "tensorrt.onnx"):
        assert results["models"][file]["verification"]["status"] == "passed"
        assert abs(results["models"][file]["versus_float"]["drop_points"]) < 10
    assert (run / "benchmark" / "report.html").is_file()
    listed = json.loads((run / "images.json").read_text())
    assert (len(listed["train"]), len(listed["test"]), listed["labels_of"]) == (100, 200, "")
    assert not listed["train"].keys() & listed["test"].keys()
    assert all(NAMES[label] == Path(path).parts[0] for path, label in listed["test"].items())
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["gate"] == {"max_accuracy_drop": None}
    judged = json.loads((run / "benchmark" / "verdict.json").read_text())
    assert not any(rule["rule"] == "accuracy_drop" for rule in judged["rules"])


def test_one_number_of_mean_and_std_is_that_of_grey_images(digits: Path, tmp_path: Path) -> None:
    """Size and crop are those of the images, which are all alike."""
    grey = ("--mean", "0.3", "--std", "0.35")
    result = quantize(digits, tmp_path, "--images", str(digits / "images"), how=grey)
    assert isinstance(result.exception, UsageError)
    assert "RGB, not grey" in str(result.exception)
    data = yaml.safe_load((tmp_path / "runs" / "digits" / "recipe.yaml").read_text())["data"]
    assert (data["channels"], data["mean"], data["std"]) == (1, [0.3], [0.35])


def test_advice_needs_no_labels_and_no_recipe(digits: Path, tmp_path: Path) -> None:
    """Half of the images choose, the others judge what was chosen; nothing trains on the hundred that calibrate."""
    arguments = ("--images", str(digits / "images"), "--bits", "3,8", "--advise")
    missing = quantize(digits, tmp_path, *arguments)
    assert str(missing.exception).startswith("--advise: needs --max-drop POINTS, the accuracy drop")
    result = quantize(digits, tmp_path, *arguments, "--max-drop", "12")
    assert result.exception is None, result.output
    listed = json.loads((tmp_path / "runs" / "digits" / "images.json").read_text())
    parts = [listed[part] for part in ("train", "judging", "test")]
    assert [len(part) for part in parts] == [100, 100, 100]
    assert len(set().union(*parts)) == 300
    advice = json.loads((tmp_path / "runs" / "digits-advise" / "advice.json").read_text())
    assert advice["images"] == 100
    assert advice["chosen"] in [step["name"] for step in advice["steps"]]
    assert advice["understated"] == ""
    assert "over 100 test images, allowed 12" in result.output


def test_without_labels_the_float_networks_answers_judge(digits: Path, tmp_path: Path) -> None:
    missing = quantize(digits, tmp_path, "--images", str(digits / "flat"))
    assert str(missing.exception).startswith("--classes: give the number of classes of known_network:network")
    arguments = ("--images", str(digits / "flat"), "--test", str(digits / "images"), "--no-labels")
    result = quantize(digits, tmp_path, *arguments, "--classes", "10", "--max-drop", "50")
    assert result.exception is None, result.output
    assert result.return_value == 0
    run = tmp_path / "runs" / "digits"
    models = json.loads((run / "benchmark" / "results.json").read_text())["models"]
    assert models["float.onnx"]["accuracy"]["top1"] == 1.0
    versus = models["onnxruntime.onnx"]["versus_float"]
    assert versus["drop_points"] == pytest.approx(100 * (1 - versus["agreement"]))
    listed = json.loads((run / "images.json").read_text())
    assert listed["labels_of"] == "known_network:network"
    head, _, _ = (run / "benchmark" / "report.html").read_text().partition("<h2>")
    assert "Nobody labeled these images: the labels are the answers of known_network:network" in head
    assert (len(listed["train"]), len(listed["test"])) == (100, 300)
    # Mostly what is written on the folders, though nobody looked.
    assert sum(NAMES[label] == Path(path).parts[-2] for path, label in listed["test"].items()) > 240


@pytest.mark.parametrize(
    ("arguments", "how", "message"),
    [
        (["--images", "nowhere"], HOW, "--images: nowhere is not a folder"),
        (["--images", "{digits}/images/digit3"], HOW, "--classes: give the number of classes"),
        (["--images", "{digits}/images", "--classes", "7"], HOW, "--classes: 7, but "),
        (["--images", "{digits}/images", "--test", "{digits}/flat"], HOW, "--test: "),
        (["--images", "{digits}/images", "--bits", "8"], HOW, "--bits: 8 is not a pair"),
        (["--images", "{digits}/images"], (*HOW[:4], "--mean", "0.3"), "--std: known_network:network needs"),
        (["--images", "{digits}/images"], (*HOW[:4], "--mean", "x", "--std", "1"), "--mean: x is not a list"),
        (["--images", "{digits}/images"], (*HOW[:4], "--mean", "123", "--std", "58"), "--mean: 123 is not in units"),
        (["--images", "{digits}/images"], (*HOW[:4], "--mean", "0.3", "--std", "0,0,0"), "--std: should be greater"),
        (["--images", "{digits}/images", "--bits", "1,8"], HOW, "--bits: should be greater than or equal to 2"),
        (["--images", "{digits}/images", "--weights", "gone.pt"], HOW, "--weights: no file gone.pt (relative to "),
        (["--images", "{digits}/images", "--test", "{digits}/images"], HOW, "--test: 100 of its images are among"),
        (["--images", "{digits}/same", "--classes", "10"], HOW, "MODEL: the float network predicts class "),
        (["--images", "{digits}/few"], HOW, "--images: "),
        (["--images", "{digits}/one"], HOW, "--images: "),
    ],
)
def test_what_is_wrong_is_one_line_that_names_the_option(
    digits: Path, tmp_path: Path, arguments: list[str], how: tuple[str, ...], message: str
) -> None:
    one = sorted((digits / "images" / "digit1").glob("*.png"))
    (digits / "same").mkdir(exist_ok=True)
    for number in range(20):
        (digits / "same" / f"{number}.png").write_bytes(one[0].read_bytes())
    for path, count in ((digits / "few", 10), (digits / "one" / "digit1", 20)):
        path.mkdir(parents=True, exist_ok=True)
        for file in one[:count]:
            (path / file.name).write_bytes(file.read_bytes())
    result = quantize(digits, tmp_path, *(part.format(digits=digits) for part in arguments), how=how)
    assert getattr(result.exception, "exit_code", None) == 2, result.output
    assert str(result.exception).startswith(message) and "\n" not in str(result.exception)
    assert not (tmp_path / "runs" / "digits" / "train").exists()


def test_published_weights_need_no_word_of_preprocessing_and_names_are_found(tmp_path: Path, digits: Path) -> None:
    arguments = ["quantize", "resnett18", "--images", str(digits / "images"), "--out", str(tmp_path / "runs" / "x")]
    result = CliRunner().invoke(crqat, arguments, standalone_mode=False)
    assert 'did you mean "timm/resnet18"?' in str(result.exception)
    arguments[1] = "known_network:network"
    result = CliRunner().invoke(crqat, arguments, standalone_mode=False)
    assert str(result.exception).startswith("--weights: known_network:network has no published weights")


def of_file(folder: Path, tmp_path: Path, *arguments: str, model: str = "known.onnx") -> Result:
    out = ("--out", str(tmp_path / "runs" / "file"))
    return CliRunner().invoke(crqat, ["quantize", str(folder / model), *out, *arguments], standalone_mode=False)


def test_a_float_onnx_file_becomes_verified_files(digits: Path, tmp_path: Path) -> None:
    result = of_file(digits, tmp_path, "--images", str(digits / "images"), "--size", "8", *HOW[4:])
    assert result.exception is None, result.output
    run = tmp_path / "runs" / "file"
    models = json.loads((run / "benchmark" / "results.json").read_text())["models"]
    assert models["float.onnx"]["accuracy"]["top1"] > 0.8
    for file in ("onnxruntime.onnx", "tensorrt.onnx"):
        assert models[file]["verification"]["status"] == "passed"
        assert abs(models[file]["versus_float"]["drop_points"]) < 10
    written = yaml.safe_load((run / "recipe.yaml").read_text())
    assert written["model"] == {"name": str(digits / "known.onnx")} and written["data"]["crop"] == 8
    manifest = json.loads((run / "train" / "manifest.json").read_text())
    assert f"file {digits / 'known.onnx'}" in manifest["inputs"]
    assert "known.onnx: on 8 images the converted network" in "".join(manifest["payload"]["preparation"])
    # A file that has changed is another network, and the run says so.
    config = recipes.load(run / "recipe.yaml")
    content = (digits / "known.onnx").read_bytes()
    try:
        (digits / "known.onnx").write_bytes(content + bytes([0x30, 0x01]))  # another model_version
        with pytest.raises(UsageError, match=r"train: stale, since .*known\.onnx changed"):
            staleness.current(config, tmp_path / "runs", "train")
    finally:
        (digits / "known.onnx").write_bytes(content)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("known.onnx", ["--images", "{digits}/images", "--size", "8"], "--mean: {digits}/known.onnx needs the norm"),
        ("known.onnx", ["--images", "{digits}/images", *HOW[4:]], "--size: give the shorter side"),
        ("known.onnx", ["--images", "{digits}/images", "--size", "8", "--crop", "6", *HOW[4:]], "--crop: 6, but "),
        ("known.onnx", ["--images", "{digits}/flat", "--size", "8", *HOW[4:], "--classes", "7"], "--classes: 7, but "),
        ("known.onnx", ["--images", "{digits}/two", "--size", "8", *HOW[4:]], "--images: "),
        ("four.onnx", ["--images", "{digits}/images", "--size", "8", *HOW[4:]], "MODEL: "),
        (
            "nan.onnx",
            ["--images", "{digits}/images", "--size", "8", *HOW[4:]],
            "MODEL: {digits}/nan.onnx holds values ",
        ),
        ("gone.onnx", ["--images", "{digits}/images", "--size", "8", *HOW[4:]], "MODEL: no file "),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(
    digits: Path, tmp_path: Path, model: str, arguments: list[str], message: str
) -> None:
    for name in NAMES[:2]:
        (digits / "two" / name).mkdir(parents=True, exist_ok=True)
        for file in sorted((digits / "images" / name).glob("*.png"))[:15]:
            (digits / "two" / name / file.name).write_bytes(file.read_bytes())
    wrong = onnx.load(digits / "known.onnx")
    weight = next(tensor for tensor in wrong.graph.initializer if len(tensor.dims) == 4)
    weight.CopyFrom(onnx.numpy_helper.from_array(np.nan * onnx.numpy_helper.to_array(weight), weight.name))
    onnx.save(wrong, digits / "nan.onnx")
    result = of_file(digits, tmp_path, *(part.format(digits=digits) for part in arguments), model=model)
    assert getattr(result.exception, "exit_code", None) == 2, result.output
    assert str(result.exception).startswith(message.format(digits=digits)) and "\n" not in str(result.exception)
    assert not (tmp_path / "runs" / "file" / "train").exists()
