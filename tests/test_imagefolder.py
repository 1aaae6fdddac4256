"""Real images in class folders, from recipe to verdict, and one of them through the script of docs/."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from crqat.core.image_file import load_image
from crqat.core.preprocessing import Preprocessing
from crqat.core.run_directory import read_manifest
from crqat.train.data import sources
from tests.own_process import run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TRAIN, TEST = 40, 20  # of each class
RECIPE = """
name: folder
compile: never
data: {{source: imagefolder, root: images, size: 32, crop: 32, crop_padding: 2}}
model: {{name: cifar/resnet20, weights: {weights}}}
quantization: {{calibration_images: 200}}
qat: {{epochs: 1, batch_size: 64, lr: 0.0005}}
export: {{verify_images: 8}}
benchmark: {{latency_rounds: 6, latency_seconds: 0.3, warm_up_seconds: 0.0}}
gate: {{max_accuracy_drop: 6.0, min_agreement: 0.85, max_size_ratio: 0.8}}
"""


@pytest.fixture(scope="module")
def folder(cifar10_root: Path, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10 images as PNG and JPEG files of several shapes, a recipe, and its finished run."""
    folder = tmp_path_factory.mktemp("folder")
    cifar = sources.load("cifar10", str(cifar10_root), False)
    for part, images, labels, count in (
        ("train", cifar.train_images[:], cifar.train_labels, TRAIN),
        ("test", cifar.test_images[:], cifar.test_labels, TEST),
    ):
        for label, name in enumerate(cifar.class_names):
            place = folder / "images" / part / name
            place.mkdir(parents=True)
            for index in (labels == label).nonzero().ravel()[:count].tolist():
                image = Image.fromarray(images[index].permute(1, 2, 0).numpy())
                if index % 3 == 0:
                    image.resize((64, 80)).save(place / f"{index}.jpg", quality=95)
                else:
                    image.save(place / f"{index}.png")
    (folder / "recipe.yaml").write_text(RECIPE.format(weights=shared_data / "weights" / "resnet20-12fca82f.th"))
    process = run(folder, "-m", "crqat", "run", "recipe.yaml")
    assert process.returncode == 0, process.stdout + process.stderr
    return folder


def test_a_folder_of_images_runs_to_its_verdict(folder: Path) -> None:
    results: dict[str, Any] = json.loads((folder / "runs/folder/benchmark/results.json").read_text())
    assert results["dataset"] == {"n": 10 * TEST, "classes": 10}
    for file in ("float.onnx", "float16.onnx", "onnxruntime.onnx", "tensorrt.onnx"):
        assert results["models"][file]["accuracy"]["top1"] > 0.8
    assert results["models"]["onnxruntime.onnx"]["verification"]["differing_codes"] == 0


@pytest.mark.parametrize("kind", ["*.jpg", "*.png"])
def test_the_script_sees_the_bits_that_were_evaluated(folder: Path, kind: str) -> None:
    model = folder / "runs/folder/export/onnxruntime.onnx"
    images = np.load(folder / "runs/folder/export/images.npy")
    files = sorted((folder / "images/test").glob("*/*"), key=lambda path: (path.parent.name, str(path)))
    path = next(path for path in files[30:] if path.match(kind))
    row = images[files.index(path)]
    preprocessing = Preprocessing.from_json(
        json.loads(onnxruntime.InferenceSession(model).get_modelmeta().custom_metadata_map["crqat.preprocessing"])
    )
    assert (preprocessing.size, preprocessing.crop) == (32, 32)
    np.testing.assert_array_equal(load_image(path, 32, 32), row)
    (logits,) = onnxruntime.InferenceSession(model).run(["logits"], {"input": preprocessing(row[None])})
    process = run(folder, str(ROOT / "docs/classify_jpeg.py"), str(model), str(path))
    assert process.returncode == 0, process.stderr
    names = sorted({path.parent.name for path in files})
    best = logits[0].argsort()[::-1][:5]
    assert process.stdout.splitlines() == [f"{names[index]}: {logits[0, index]:.3f}" for index in best]


def test_a_changed_folder_trains_anew_and_a_broken_image_ends_in_one_line(folder: Path) -> None:
    before = read_manifest(folder / "runs/folder/train").key
    again = run(folder, "-m", "crqat", "train", "recipe.yaml")
    assert "train is up to date" in again.stdout + again.stderr
    broken = folder / "images" / "train" / "cat" / "broken.jpg"
    broken.write_bytes(b"no image")
    process = run(folder, "-m", "crqat", "train", "recipe.yaml")
    assert process.returncode == 2
    lines = process.stderr.strip().splitlines()
    assert lines[-1].startswith("crqat: error: images/train/cat/broken.jpg: cannot be decoded as an image")
    assert "Traceback" not in process.stderr
    assert read_manifest(folder / "runs/folder/train").key == before  # what was there is untouched
    broken.unlink()
    shutil.copy(next((folder / "images/train/cat").glob("*.png")), folder / "images/test/cat/copied.png")
    process = run(folder, "-m", "crqat", "train", "recipe.yaml", "--set", "qat.epochs=0")
    assert process.returncode == 0
    assert "1 of 201 test images are training images too" in process.stdout + process.stderr
    assert "1 of 201 test images" in read_manifest(folder / "runs/folder/train").payload["notes"][0]
