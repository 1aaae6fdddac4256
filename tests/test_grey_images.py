"""Grey image files, from recipe to verdict, with paths in the home directory, and one of them through docs/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from crqat.core.preprocessing import Preprocessing
from crqat.core.run_directory import read_manifest
from tests.own_process import run

ROOT = Path(__file__).parent.parent
RECIPE = """
name: grey
compile: never
data: {source: imagefolder, root: ~/images, channels: 1, size: 16, crop: 16, crop_padding: 0, flip: false}
model: {name: "net:Net", weights: ~/net.ckpt, weights_key: ema}
quantization: {calibration_images: 64}
qat: {epochs: 0}
export: {verify_images: 4}
benchmark: {latency_rounds: 6, latency_seconds: 0.06, warm_up_seconds: 0.0}
gate: {max_accuracy_drop: 30.0}
"""
NETWORK = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, in_chans=3, num_classes=1000):
        super().__init__(
            nn.Conv2d(in_chans, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
        )
"""


@pytest.mark.slow
def test_a_folder_of_grey_images_runs_to_its_verdict(tmp_path: Path) -> None:
    pixels, labels = load_digits(n_class=3, return_X_y=True)
    for index, (image, label) in enumerate(zip(pixels[:180], labels[:180], strict=True)):
        place = tmp_path / "images" / ("train" if index < 120 else "test") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        drawn = Image.fromarray((image * 15.9).astype(np.uint8).reshape(8, 8))
        drawn.resize((16, 16)).save(place / f"{index}.{'jfif' if index % 2 else 'png'}")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "net.py").write_text(NETWORK)
    module: dict[str, Any] = {"__name__": "net"}
    exec(NETWORK, module)  # noqa: S102 - the text above
    torch.manual_seed(0)
    last, average = (module["Net"](1, 3).state_dict() for _ in range(2))
    torch.save({"last": last, "ema": average}, tmp_path / "net.ckpt")
    ended = run(tmp_path, "-m", "crqat", "run", "recipe.yaml", HOME=str(tmp_path))
    said = ended.stdout + ended.stderr
    # The gate does not let an untrained network, at chance, pass; everything else passes.
    assert ended.returncode in (1, 4), said
    assert f"{tmp_path}/net.ckpt: `ema`, not last" in said
    judged = json.loads((tmp_path / "runs/grey/benchmark/verdict.json").read_text())
    assert {rule["rule"] for rule in judged["rules"] if rule["status"] != "pass"} == {"float_accuracy"}
    payload = read_manifest(tmp_path / "runs/grey/train").payload
    assert payload["input_shape"] == [1, 16, 16] and payload["preprocessing"]["mean"] == [0.449]
    model = tmp_path / "runs/grey/export/onnxruntime.onnx"
    photo = tmp_path / "photo.png"
    Image.new("RGB", (32, 24), (90, 120, 10)).save(photo)
    session = onnxruntime.InferenceSession(model)
    prepare = Preprocessing.from_json(json.loads(session.get_modelmeta().custom_metadata_map["crqat.preprocessing"]))
    with Image.open(photo) as image:
        grey = np.full((1, 1, 16, 16), image.convert("L").getpixel((0, 0)), np.uint8)
    (logits,) = session.run(["logits"], {"input": prepare(grey)})
    best = logits[0].argsort()[::-1]
    shown = run(tmp_path, str(ROOT / "docs/classify_jpeg.py"), str(model), str(photo), HOME=str(tmp_path))
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.splitlines() == [f"{index}: {logits[0, index]:.3f}" for index in best]
