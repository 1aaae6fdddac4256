from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from crqat.core.progress import quiet
from crqat.pipeline.study import worker
from crqat.train.checkpoint import read_tensors
from crqat.train.data import sources
from tests.pipeline.study.test_study import NETWORK, RECIPE


def test_every_network_of_a_training_is_measured_on_all_test_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("qat: {epochs: 6", "qat: {epochs: 1").replace("tiny_network", "another_network"))
    (tmp_path / "another_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    result = worker.run(path, (), tmp_path / "runs", quiet)
    assert result["networks"].keys() == {"float", "calibrated", "student", "teacher"}
    digits = sources.load("digits", None, False)
    assert result["n"] == len(digits.test_labels)
    own = importlib.import_module("another_network").network(10, 1).eval()
    own.load_state_dict(read_tensors(tmp_path / "runs" / "tiny" / "train" / "float.safetensors"))
    images = torch.from_numpy(digits.preprocessing(digits.test_images[:].numpy()))
    with torch.no_grad():
        right = own(images).argmax(1) == digits.test_labels
    assert result["networks"]["float"]["correct"] == worker.packed(right)
    again = worker.run(path, (), tmp_path / "runs", quiet)  # it is there already
    assert again == result
