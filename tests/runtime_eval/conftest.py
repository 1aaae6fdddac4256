"""A real export in small: handwritten digits, a network that reads them, and its INT8 version."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

from crqat.core.preprocessing import Preprocessing
from crqat.core.run_directory import Manifest, write_stage
from crqat.runtime_eval.config import BenchmarkConfig
from tests.needs import missing

TRAINING_IMAGES = 1000
PREPROCESSING = Preprocessing(mean=(0.3,), std=(0.4,))
VERIFICATION = {"status": "passed", "codes": 1280, "differing_codes": 0, "images": 32}
FUSION = {"expected": {"QGemm": 2}, "operations": {"Gemm": 2}, "float": [], "complete": False}
# Short, because no test looks at how fast anything is.
QUICK = BenchmarkConfig(warm_up_seconds=0.0, latency_rounds=6, latency_seconds=0.06, accuracy_batch=100)
# An export's payload for a test that has no use for a third file.
WITHOUT_TENSORRT = {
    "models": [
        {"file": "float.onnx", "target": "float"},
        {"file": "onnxruntime.onnx", "target": "onnxruntime", "verification": VERIFICATION},
    ]
}

Layers = list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]


@dataclass(frozen=True)
class Digits:
    """Test images uint8 [797, 1, 8, 8], labels int64 [797], and a network's weights [in, out] and biases [out]."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    layers: Layers

    def logits(self) -> npt.NDArray[np.float32]:
        """The float network's logits, computed without ONNX."""
        values = PREPROCESSING(self.images).reshape(len(self.images), -1)
        for index, (weight, bias) in enumerate(self.layers):
            values = (values if index == 0 else np.maximum(values, 0)) @ weight + bias
        return values


def metadata(target: str) -> dict[str, str]:
    return {
        "crqat.preprocessing": json.dumps({"mean": PREPROCESSING.mean, "std": PREPROCESSING.std}),
        "crqat.class_names": json.dumps([str(digit) for digit in range(10)]),
        "crqat.grids_sha256": "0" * 64,
        "crqat.target": target,
    }


def onnx_bytes(layers: Layers, target: str, weight_bits: int | None, meta: dict[str, str] | None = None) -> bytes:
    """An ONNX file of the network: float, or with INT8 activations and weights of few enough bits to make mistakes."""
    nodes = [helper.make_node("Flatten", ["input"], ["x0"])]
    constants: dict[str, npt.NDArray[Any]] = {}

    def through_int8(name: str, scale: float, codes: npt.NDArray[np.int8] | None = None) -> str:
        constants[f"{name}_scale"], constants[f"{name}_zero"] = np.float32(scale), np.int8(0)  # type: ignore[assignment]
        pair = [f"{name}_scale", f"{name}_zero"]
        if codes is None:
            nodes.append(helper.make_node("QuantizeLinear", [name, *pair], [f"{name}_codes"]))
        else:
            constants[f"{name}_codes"] = codes
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_codes", *pair], [f"{name}_values"]))
        return f"{name}_values"

    value = "x0"
    for index, (weight, bias) in enumerate(layers):
        constants[f"b{index}"], constants[f"w{index}"] = bias, weight
        operand, weights = value, f"w{index}"
        if weight_bits is not None:
            scale = float(np.abs(weight).max()) / (2 ** (weight_bits - 1) - 1)
            weights = through_int8(f"w{index}", scale, np.rint(weight / scale).astype(np.int8))
            del constants[f"w{index}"]
            operand = through_int8(value, 0.05)
        last = index == len(layers) - 1
        nodes.append(helper.make_node("Gemm", [operand, weights, f"b{index}"], ["logits" if last else f"y{index}"]))
        if not last:
            value = f"x{index + 1}"
            nodes.append(helper.make_node("Relu", [f"y{index}"], [value]))
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", layers[-1][1].size])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, metadata(target) if meta is None else meta)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


@pytest.fixture(scope="session")
def digits() -> Digits:
    data = load_digits()
    images = (data.images * 15).astype(np.uint8)[:, None]
    train, labels = images[:TRAINING_IMAGES], data.target[:TRAINING_IMAGES]
    network = MLPClassifier((32,), max_iter=400, random_state=0, early_stopping=True)
    network.fit(PREPROCESSING(train).reshape(len(train), -1), labels)
    layers = [
        (np.asarray(weight, np.float32), np.asarray(bias, np.float32))
        for weight, bias in zip(network.coefs_, network.intercepts_, strict=True)
    ]
    return Digits(images[TRAINING_IMAGES:], data.target[TRAINING_IMAGES:].astype(np.int64), layers)


def expected_codes(images: npt.NDArray[np.uint8], wrong: int = 0) -> bytes:
    """The codes of the network's input as an .npz file, computed without ONNX Runtime; `wrong` of them are wrong."""
    normalized = PREPROCESSING(images)
    codes = np.clip(np.rint(normalized.reshape(-1) / np.float32(0.05)), -128, 127).astype(np.int8)
    codes[:wrong] ^= 1
    shown = onnx.ModelProto()
    shown.graph.output.append(helper.make_tensor_value_info("x0_codes", TensorProto.INT8, None))
    buffer = io.BytesIO()
    np.savez(
        buffer,
        images=normalized,
        names=np.array(["x0_codes"]),
        codes=codes.view(np.uint8),
        families=np.array(["x86", "arm"]),
        changes=np.zeros((1, codes.size), np.uint8),
        left_out=np.array(0),
        outputs=np.frombuffer(shown.SerializeToString(), np.uint8),
    )
    return buffer.getvalue()


WriteExport = Callable[..., Path]


def export_writer(digits: Digits, folder: Path) -> WriteExport:
    """A function that writes an export of the digits; keyword arguments replace files' contents or payload entries."""

    def write(files: dict[str, Any] | None = None, payload: dict[str, Any] | None = None) -> Path:
        contents: dict[str, Any] = {
            "images.npy": digits.images,
            "labels.npy": digits.labels,
            "float.onnx": onnx_bytes(digits.layers, "float", None),
            "onnxruntime.onnx": onnx_bytes(digits.layers, "onnxruntime", 3),
            "tensorrt.onnx": onnx_bytes(digits.layers, "tensorrt", 4),
            "onnxruntime.codes.npz": expected_codes(digits.images[:2]),
        } | (files or {})
        models = [
            {"file": "float.onnx", "target": "float"},
            {
                "file": "onnxruntime.onnx",
                "target": "onnxruntime",
                "verification": VERIFICATION,
                "fusion": FUSION,
                "expected_codes": "onnxruntime.codes.npz",
            },
            {"file": "tensorrt.onnx", "target": "tensorrt", "verification": VERIFICATION},
        ]
        manifest = Manifest("export", "key", None, {}, {})
        manifest.payload = {"run": "digits", "images": "images.npy", "labels": "labels.npy", "models": models}
        manifest.payload |= payload or {}
        run = folder / "digits"
        with write_stage(run, manifest) as directory:
            for name, content in contents.items():
                if isinstance(content, bytes):
                    (directory / name).write_bytes(content)
                else:
                    np.save(directory / name, content)
        return run / "export"

    return write


@pytest.fixture
def write_export(digits: Digits, tmp_path: Path) -> WriteExport:
    """See `export_writer`."""
    return export_writer(digits, tmp_path)


def pythons(version: str) -> str | None:
    """An interpreter of a version, if this machine has one."""
    found = shutil.which(f"python{version}")
    # A version manager puts stand-ins on PATH that only work if the version is switched on.
    if found is not None and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0:
        return found
    return next((str(path) for path in Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}")), None)


@pytest.fixture(scope="session")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a Python 3.10 environment with numpy and ONNX Runtime only, as a JetPack 6 board has it."""
    python = pythons("3.10")
    if python is None:
        missing("python3.10")
    environment = tmp_path_factory.mktemp("board") / "venv"
    subprocess.run([python, "-m", "venv", environment], check=True)
    interpreter = environment / "bin" / "python"
    options = ["--quiet", "--disable-pip-version-check", "--no-compile"]
    install = [str(interpreter), "-m", "pip", "install", *options, "numpy", "onnxruntime"]
    result = subprocess.run(install, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        missing("python3.10", f"pip cannot install numpy and onnxruntime: {result.stderr.strip().splitlines()[-1]}")
    return interpreter
