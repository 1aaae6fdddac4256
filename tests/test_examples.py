"""The examples, run on real images for a few steps; without their marked lines two of them train a float network."""

from __future__ import annotations

import importlib.util
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models  # type: ignore[import-untyped]

import crqat

EXAMPLES = Path(__file__).parents[1] / "examples"
TRAIN, VAL = 40, 8  # images of each class
CLASSES = 4


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def real_images(request: pytest.FixtureRequest) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """CIFAR-10 where it is at hand, else the digits that scikit-learn has; uint8 of shape [N, 32, 32, 3]."""
    try:
        root = request.getfixturevalue("cifar10_root")
    except pytest.skip.Exception:
        from sklearn.datasets import load_digits

        found = load_digits()
        grey = (found.images * 15).astype(np.uint8).repeat(4, 1).repeat(4, 2)
        return np.stack([grey] * 3, axis=3), found.target
    from torchvision.datasets import CIFAR10  # type: ignore[import-untyped]

    cifar = CIFAR10(root, train=True)
    return cifar.data[:2000], np.array(cifar.targets[:2000])


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/CLASS/* and val/CLASS/*, as ImageFolder reads them."""
    root = tmp_path_factory.mktemp("images")
    images, labels = real_images(request)
    for label in range(CLASSES):
        chosen = images[labels == label]
        for split, part in (("train", chosen[:TRAIN]), ("val", chosen[TRAIN : TRAIN + VAL])):
            (root / split / f"class{label}").mkdir(parents=True)
            for number, image in enumerate(part):
                Image.fromarray(image).save(root / split / f"class{label}" / f"{number:03}.png")
    return root


def weights(model: str, out: Path) -> str:
    """A state dict of one of torchvision's networks whose BN has seen images."""
    torch.manual_seed(0)
    net = models.get_model(model, num_classes=CLASSES).train()
    with torch.no_grad():
        for _ in range(10):
            net(torch.randn(16, 3, 32, 32))
    torch.save(net.state_dict(), out / "float.pth")
    return str(out / "float.pth")


def script(name: str) -> str:
    return (EXAMPLES / f"{name}.py").read_text()


def loaded(name: str, text: str | None = None) -> ModuleType:
    """An example as a module, or another text in its place."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if text is None:
        spec.loader.exec_module(module)
    else:
        exec(compile(text, f"{name}.py", "exec"), module.__dict__)  # noqa: S102
    return module


def without_quantization(text: str) -> tuple[str, int]:
    """The script with its marked lines taken out or put back, and how many these are."""
    marked = [line for line in text.splitlines() if re.search(r"  # crqat(, was: .*)?$", line)]
    text = re.sub(r"^( *)[^\n]*  # crqat, was: ([^\n]*)$", r"\1\2", text, flags=re.M)
    return re.sub(r"^[^\n]*  # crqat\n", "", text, flags=re.M), len(marked)


def all_passed(directory: Path) -> None:
    """The files are there, and say of themselves that they were verified."""
    from crqat.core.run_directory import verify_stage

    entries = [entry for entry in verify_stage(directory).payload["models"] if "verification" in entry]
    assert [entry["target"] for entry in entries] == ["onnxruntime", "tensorrt"]
    assert {entry["verification"]["status"] for entry in entries} == {"passed"}


def test_own_loop(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(folder), "--model", "squeezenet1_1", "--weights", weights("squeezenet1_1", tmp_path)]
    arguments += ["--out", str(tmp_path / "int8"), "--epochs", "1"]
    measured = loaded("own_loop").main([*arguments, "--batch-size", "32", "--latency-seconds", "0.1"])
    assert {file.status for file in measured.files.values()} == {"measured"}
    assert measured.results.dataset.n == CLASSES * VAL
    said = capsys.readouterr().out
    assert "onnxruntime.onnx" in said and re.search(r"^gate: ", said, flags=re.M)


def test_post_training(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(folder / "train"), "--model", "squeezenet1_1", "--weights", weights("squeezenet1_1", tmp_path)]
    arguments += ["--out", str(tmp_path / "int8"), "--size", "32"]
    files = loaded("post_training").main(arguments)
    assert all(verified.passed and verified.images == 32 for verified in files.verification.values())
    assert capsys.readouterr().out.count("verification passed") == 2
    lines = script("post_training").partition("    torch.manual_seed(0)\n")[2].partition("    return files\n")[0]
    assert len(lines.strip().splitlines()) <= 5


def small_network() -> nn.Module:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return nn.Sequential(*layers, nn.Linear(8, CLASSES))


def float_and_bytes(folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.v2.functional import pil_to_tensor  # type: ignore[import-untyped]

    images, labels = zip(*ImageFolder(str(folder / "train"), pil_to_tensor), strict=True)
    pixels = torch.stack(images)
    normalized = torch.from_numpy(crqat.Preprocessing((0.5,) * 3, (0.25,) * 3)(pixels.numpy()))
    return normalized, pixels, torch.tensor(labels)


@pytest.mark.needs("lightning")
def test_lightning_module(folder: Path, tmp_path: Path) -> None:
    from lightning import Trainer

    images, pixels, labels = float_and_bytes(folder)
    batches = DataLoader(TensorDataset(images.flip(3), images, labels), batch_size=40, shuffle=True)
    module = loaded("lightning_module").QuantizedClassifier(small_network(), calibration=batches, steps=4)
    before = {name: value.clone() for name, value in module.model.named_parameters()}
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, batches)
    assert all(not torch.equal(value, before[name]) for name, value in module.model.named_parameters())
    assert module.teacher.steps == len(batches) == 4
    preprocessing = crqat.Preprocessing((0.5,) * 3, (0.25,) * 3)
    files = crqat.export(module.teacher.model, tmp_path / "int8", images=pixels[:16], preprocessing=preprocessing)
    assert all(verified.passed for verified in files.verification.values())


def quick(name: str, folder: Path, out: Path) -> list[str]:
    """A script's arguments for one epoch of a few steps."""
    if name == "timm_train":
        small = ["--model", "test_resnet", "--num-classes", str(CLASSES), "--img-size", "32", "--workers", "0"]
        return ["--data-dir", str(folder), *small, "--output", str(out / "int8"), "--epochs", "1", "--device", "cpu"]
    out.mkdir(exist_ok=True)
    small = ["--model", "resnet18", "--resume", weights("resnet18", out), "--size", "32"]
    return ["--data-path", str(folder), *small, "--output-dir", str(out), "--epochs", "1"]


@pytest.mark.parametrize("name", ["torchvision_reference", "timm_train"])
def test_a_training_script_with_five_lines_changed(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - timm's Mixup draws from it
    random.seed(0)
    loaded(name).main(quick(name, folder, tmp_path))
    all_passed(tmp_path / "int8")
    plain, lines = without_quantization(script(name))
    assert lines <= 5
    assert re.search(r"\bcrqat\.", plain) is None and "import crqat" not in plain
    sys.modules.pop(name, None)
    loaded(name, plain).main(quick(name, folder, tmp_path / "float"))
    assert not (tmp_path / "float" / "int8").exists()
    assert len(re.findall(r"^epoch 0: loss \d", capsys.readouterr().out, flags=re.M)) == 2
