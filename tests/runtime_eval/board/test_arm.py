"""A bundle on an emulated ARM board: the right file passes, and files that are wrong in one constant do not."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from bench import arm_codes
from crqat.runtime_eval.board.bundle import FOLDER, describe, write
from crqat.train.config import QuantizationConfig
from crqat.train.data import sources
from crqat.train.models import build as models
from tests.export.conftest import with_ties
from tests.needs import arm_python
from tests.runtime_eval.conftest import QUICK, VERIFICATION, WriteExport

pytestmark = pytest.mark.arm


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> arm_codes.Written:
    """A residual network for 8 x 8 grey pixels; ARM's kernels compute some of its codes otherwise than x86's."""
    dataset = sources.load("digits", None, False)
    torch.manual_seed(0)
    pictures = dataset.preprocessing(dataset.train_images[:64].numpy())
    folder = tmp_path_factory.mktemp("arm") / "right"
    network = models.build("cifar/resnet20", 10, 1)
    made = arm_codes.write(with_ties(arm_codes.quantized(network, QuantizationConfig(), pictures)), folder)
    assert np.load(folder / "onnxruntime.codes.npz")["changes"].any()
    return made


@pytest.mark.slow
def test_a_bundle_measures_itself(written: arm_codes.Written, write_export: WriteExport, tmp_path: Path) -> None:
    codes = "onnxruntime.codes.npz"
    files = {name: (written.folder / name).read_bytes() for name in ("onnxruntime.onnx", codes)}
    model = onnx.load(written.folder / "onnxruntime.onnx")
    described = {"preprocessing": json.dumps({"mean": [0.3], "std": [0.4]}), "target": "onnxruntime"}
    onnx.helper.set_model_props(model, {f"crqat.{key}": value for key, value in described.items()})
    entry = {"file": "onnxruntime.onnx", "target": "onnxruntime", "verification": VERIFICATION, "expected_codes": codes}
    models = [{"file": "float.onnx", "target": "float"}, entry]
    export = write_export({**files, "onnxruntime.onnx": model.SerializeToString()}, {"models": models})
    bundle, paths = describe(
        export, asdict(replace(QUICK, latency_rounds=1)), "1.2.3"
    )  # an emulated process starts slowly
    write(bundle, paths, tmp_path / "b.tar.gz")
    subprocess.run(["tar", "-xzf", "b.tar.gz"], cwd=tmp_path, check=True)
    command = [str(arm_python("cortex-a57")), "-m", "runtime_eval", "."]
    done = subprocess.run(command, cwd=tmp_path / FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / FOLDER / "results.json").read_text())
    assert results["device"]["architecture"] == "aarch64"
    counted = results["models"]["onnxruntime.onnx"]["codes_on_this_cpu"]
    assert (counted["status"], counted["family"], counted["differing"]) == ("passed", "arm", 0)
    assert counted["codes"] > 30_000


@pytest.mark.parametrize("cpu", ["cortex-a76", "max"])
def test_a_wrong_file_fails_there(cpu: str, written: arm_codes.Written, tmp_path: Path) -> None:
    folders = [written.folder]
    for number, model in enumerate(arm_codes.broken(onnx.load(written.folder / "onnxruntime.onnx")).values()):
        folders.append(tmp_path / str(number))
        folders[-1].mkdir()
        onnx.save(model, folders[-1] / "onnxruntime.onnx")
        (folders[-1] / "onnxruntime.codes.npz").write_bytes((written.folder / "onnxruntime.codes.npz").read_bytes())
    right, *wrong = arm_codes.counted(arm_python(cpu), folders)
    assert (right.status, right.family) == ("passed", "arm")
    assert len(wrong) == 3
    assert all(found.status.startswith("failed: ") and found.differing > 100 for found in wrong)
