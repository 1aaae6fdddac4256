"""Quantized networks that the tests of the export share, from a few layers to the real ResNet-20, and their files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from crqat.core.grid import load_grids
from crqat.core.progress import quiet
from crqat.core.results.training import TrainingPayload
from crqat.core.run_directory import Manifest, payload_of, read_manifest, write_stage
from crqat.core.typed_json import to_json
from crqat.export.qdq.write import QDQModel
from crqat.export.to_onnx import Quantized as Quantized
from crqat.export.to_onnx import quantize_network
from crqat.train.config import (
    ConsistencyConfig,
    DataConfig,
    FloatConfig,
    ModelConfig,
    QATConfig,
    QuantizationConfig,
    Target,
    TrainConfig,
)
from crqat.train.data import sources
from crqat.train.data.split import split as split_images
from crqat.train.load_trained import rebuild
from crqat.train.models import build as models
from crqat.train.training.stage import train
from crqat.train.untrained import sane_bn as sane_bn
from tests.conftest import made_once

BOTH: tuple[Target, ...] = ("onnxruntime", "tensorrt")


def quantize(
    network: nn.Module,
    images: Tensor,
    bits: int = 8,
    targets: tuple[Target, ...] = BOTH,
    config: QuantizationConfig | None = None,
) -> Quantized:
    """Quantize a network after training, from the images that it is then checked on."""
    config = config or QuantizationConfig(weights=bits, activations=bits)
    return quantize_network(network, [images], targets, config)


def with_ties(quantized: Quantized) -> Quantized:
    """The same network with powers of two as the activations' scales: many sums of codes then lie at a tie."""
    grids = {
        edge: grid if grid.axis is not None else replace(grid, scale=np.exp2(np.rint(np.log2(grid.scale))))
        for edge, grid in quantized.grids.items()
    }
    return replace(quantized, grids=grids)


def random_images(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def session(
    model: onnx.ModelProto, level: str = "ORT_ENABLE_ALL", outputs: tuple[str, ...] = ()
) -> onnxruntime.InferenceSession:
    """ONNX Runtime on the CPU; `outputs` are further tensors of codes, UINT8, to look at."""
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    for name in outputs:
        tapped.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    return onnxruntime.InferenceSession(tapped.SerializeToString(), options, providers=["CPUExecutionProvider"])


def initializer(model: onnx.ModelProto, name: str) -> npt.NDArray[Any]:
    """A constant of a file."""
    return onnx.numpy_helper.to_array(next(tensor for tensor in model.graph.initializer if tensor.name == name))


def edited(model: onnx.ModelProto, name: str, value: npt.NDArray[Any] | np.generic) -> onnx.ModelProto:
    """A copy with another constant under the same name."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    tensor = next(tensor for tensor in copied.graph.initializer if tensor.name == name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(value), name))
    return copied


def edited_file(file: QDQModel, name: str, value: npt.NDArray[Any] | np.generic) -> QDQModel:
    """The same for a QDQModel."""
    return replace(file, model=edited(file.model, name, value))


def nodes(model: onnx.ModelProto, op_type: str) -> list[onnx.NodeProto]:
    """All nodes of a kind."""
    return [node for node in model.graph.node if node.op_type == op_type]


DIGITS = TrainConfig(
    seed=0,
    targets=BOTH,
    data=DataConfig("digits", crop_padding=0, flip=False),
    model=ModelConfig("cifar/resnet20"),
    float_training=FloatConfig(epochs=3, batch_size=64, lr=0.05),
    quantization=QuantizationConfig(calibration_images=128),
    qat=QATConfig(epochs=1, batch_size=64, lr=0.005),
    consistency=ConsistencyConfig(teacher="none"),
    device="cpu",
    compile="never",
)


def write_train_stage(run: Path, config: TrainConfig) -> Path:
    """A complete train directory, as the pipeline writes it."""
    manifest = Manifest("train", "a key", None, {}, {})
    with write_stage(run, manifest) as out:
        manifest.payload = to_json(train(config, out, quiet))
    return run / "train"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing from a second thread, and lose much where the CPU is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, TrainConfig]]:
    """Train ResNet-20 on the digits, once for each set of changes to DIGITS; gives the directory and its recipe."""
    made: dict[str, tuple[Path, TrainConfig]] = {}

    def of(**changes: Any) -> tuple[Path, TrainConfig]:
        config = replace(DIGITS, **changes)
        if made:  # the float network is the same in all of them
            weights = str(made[repr(DIGITS)][0] / "float.safetensors")
            config = replace(config, model=replace(config.model, weights=weights))
        key = repr(replace(config, model=DIGITS.model))  # without the weights' path
        if key not in made:
            name = hashlib.sha256(key.encode()).hexdigest()[:16]
            with made_once(tmp_path_factory, f"trained-{name}") as (run, filled):
                made[key] = (run / "train" if filled else write_train_stage(run, config), config)
        return made[key]

    of()
    return of


@pytest.fixture(scope="session")
def digits(trained: Callable[..., tuple[Path, TrainConfig]]) -> Callable[[int], Quantized]:
    """The trained network of a width, with 32 images of the validation split."""
    made: dict[int, Quantized] = {}

    def of(bits: int) -> Quantized:
        if bits not in made:
            quantization = replace(DIGITS.quantization, weights=bits, activations=bits)
            directory, config = trained(quantization=quantization)
            payload = payload_of(TrainingPayload, directory, read_manifest(directory))
            model = rebuild(directory, config, payload, payload.best)
            images = sources.load("digits", None, False).train_images
            chosen = split_images(len(images), config.data.validation, config.seed).validation[:32]
            preprocessing = payload.preprocessing
            grids = load_grids(directory / f"{payload.best}.grids.json")
            made[bits] = Quantized(model, grids, preprocessing(images[chosen].numpy()))
        return made[bits]

    return of


@pytest.fixture(scope="session")
def published_resnet20(shared_data: Path, cifar10_root: Path) -> Callable[[int], Quantized]:
    """The published CIFAR-10 ResNet-20, quantized after training from 128 training images; the last 32 to check on."""
    images = sources.load("cifar10", str(cifar10_root), False)
    batch = torch.from_numpy(images.preprocessing(images.train_images[:128].numpy()))

    made: dict[int, Quantized] = {}

    def of(bits: int) -> Quantized:
        if bits not in made:
            network = models.build("cifar/resnet20", 10, 3)
            models.load_weights(network, shared_data / "weights" / "resnet20-12fca82f.th")
            quantized = quantize(network, batch, bits)
            made[bits] = replace(quantized, images=quantized.images[-32:])
        return made[bits]

    return of
