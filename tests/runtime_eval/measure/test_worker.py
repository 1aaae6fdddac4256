from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest

from crqat.core.errors import ToolError
from crqat.runtime_eval.config import Provider
from crqat.runtime_eval.measure.worker import latency, preprocessing
from crqat.runtime_eval.measure.worker_client import Worker
from crqat.runtime_eval.runners.onnxruntime import OnnxRuntimeRunner
from tests.runtime_eval.conftest import PREPROCESSING, QUICK, Digits, WriteExport, metadata


def test_the_protocol_survives_what_libraries_print(write_export: WriteExport) -> None:
    export = write_export()
    code = (
        "import os, sys\n"
        "import crqat.runtime_eval.measure.worker as worker\n"
        "serve = worker.serve\n"
        "def noisy(*arguments):\n"
        "    os.write(1, b'from a library\\n'); print('from python', flush=True)\n"
        "    serve(*arguments)\n"
        "worker.serve = noisy\n"
        "sys.exit(worker.main())\n"
    )
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            export / "float.onnx",
            export / "images.npy",
            "onnxruntime",
            "CPUExecutionProvider",
            "1",
            "0",
        ],
        input='{"command": "memory"}\n',
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line[:10] for line in result.stdout.splitlines()] == ['{"result":', '{"result":']
    assert "from a library" in result.stderr
    assert "from python" in result.stderr


class CountingRunner(OnnxRuntimeRunner):
    calls = 0

    def infer(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        self.calls += 1
        return super().infer(images)


def test_latency_measures_at_least_once_and_not_the_warm_up(write_export: WriteExport, digits: Digits) -> None:
    image = PREPROCESSING(digits.images[:1])
    runner = CountingRunner(write_export() / "float.onnx", "CPUExecutionProvider", 1)
    with runner:
        samples, computed = latency(runner, image, warm_up_seconds=0.05, seconds=0.0)
        assert runner.calls > len(samples) == 1
        assert 0 < samples[0] < 0.05
        assert computed == []


def test_the_runner_says_what_it_is_and_computes_the_networks_logits(write_export: WriteExport, digits: Digits) -> None:
    with OnnxRuntimeRunner(write_export() / "float.onnx", "CPUExecutionProvider", 1) as runner:
        assert runner.describe().metadata == metadata("float")
        logits = runner.infer(PREPROCESSING(digits.images[:7]))
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, digits.logits()[:7], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("provider", [name for name in get_args(Provider) if name not in ort.get_available_providers()])
def test_a_provider_that_silently_becomes_another_is_an_error(
    write_export: WriteExport, monkeypatch: pytest.MonkeyPatch, provider: str
) -> None:
    # What a build with CUDA does on a machine whose driver does not start: the provider is listed, the CPU runs.
    export = write_export()
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [provider, "CPUExecutionProvider"])
    with pytest.raises(ToolError, match=rf"float.onnx.* on CPUExecutionProvider, not on {provider}"):
        OnnxRuntimeRunner(export / "float.onnx", provider, 1)


def test_an_unexpected_exit_is_told_with_its_code_and_last_words(
    write_export: WriteExport, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = write_export()
    # The interpreter refuses to start: nothing of the worker's own code gets to run.
    monkeypatch.setenv("PYTHONHASHSEED", "nonsense")
    words = r"float.onnx in onnxruntime: its process exited with 1, last output: \S"
    with pytest.raises(ToolError, match=words), Worker(export / "float.onnx", export / "images.npy", QUICK):
        pass


def test_half_an_answer_is_a_death(write_export: WriteExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "fake" / "crqat" / "runtime_eval" / "measure"
    package.mkdir(parents=True)
    (tmp_path / "fake" / "crqat" / "__init__.py").touch()
    (package / "worker.py").write_text("import sys\nprint('{\"resu', end='')\nsys.exit('out of luck')\n")
    monkeypatch.setattr("crqat.runtime_eval.measure.worker_client.PACKAGES", tmp_path / "fake")
    export = write_export()
    words = r"float.onnx in onnxruntime: its process exited with 1, last output: out of luck"
    with pytest.raises(ToolError, match=words), Worker(export / "float.onnx", export / "images.npy", QUICK):
        pass


def test_nothing_in_the_users_directory_gets_into_the_worker(
    write_export: WriteExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = write_export()
    (tmp_path / "queue.py").write_text("raise SystemExit('the wrong module')")
    (tmp_path / "numpy.py").write_text("raise SystemExit('the wrong module')")
    monkeypatch.chdir(tmp_path)
    with Worker(export.relative_to(tmp_path) / "float.onnx", export / "images.npy", QUICK) as worker:
        assert worker.classes == 10


@pytest.mark.parametrize("text", ["", "{", "[]", '{"mean": [0.5]}', '{"mean": 0.5, "std": 0.5}'])
def test_preprocessing_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ToolError, match=r"crqat\.preprocessing"):
        preprocessing({"crqat.preprocessing": text})
