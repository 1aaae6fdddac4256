from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from crqat.core.errors import UsageError
from crqat.core.grid import Grid, load_grids
from crqat.core.progress import quiet
from crqat.core.run_directory import Manifest, write_stage
from crqat.core.typed_json import to_json
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
from crqat.train.data.batches import evaluation_batches
from crqat.train.nncf import checkpoint as nncf_checkpoint
from crqat.train.nncf import start_from
from crqat.train.nncf.checkpoint import Checkpoint, of_grid, read
from crqat.train.placement import nncf_layout
from crqat.train.quantized_model import quantize_model
from crqat.train.quantizers import LSQQuantizer, quantizer_maker, quantizer_of
from crqat.train.training.stage import train
from tests.crqat_train import stock_nncf

NETWORK = "tests.crqat_train.nncf.test_start_from:small"


class Small(nn.Module):
    """Two convolutions around an Add: NNCF quantizes both of its inputs."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.linear = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        x = torch.relu(self.second(x) + x)
        return self.linear(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def small(classes: int, channels: int) -> nn.Module:
    torch.manual_seed(3)
    return Small(classes, channels)


def config(targets: tuple[Target, ...], nncf: Path | None, epochs: int = 0) -> TrainConfig:
    return TrainConfig(
        seed=0,
        targets=targets,
        data=DataConfig("digits"),
        model=ModelConfig(NETWORK, None, None if nncf is None else str(nncf)),
        float_training=FloatConfig(epochs=0),
        quantization=QuantizationConfig(),
        qat=QATConfig(epochs=epochs),
        consistency=ConsistencyConfig(),
        device="cpu",
        compile="never",
    )


@pytest.fixture(scope="module")
def images() -> Tensor:
    dataset = sources.load("digits", None, False)
    return next(iter(evaluation_batches(dataset.train_images[:64], dataset.preprocessing, 64)))


def stock(images: Tensor, preset: str, path: Path) -> Path:
    nncf_layout.without_extension()
    state, configuration = stock_nncf.quantize(small(10, 1), images, preset)
    torch.save({"model": state, "nncf_config": configuration}, path)
    return path


def imported(images: Tensor, preset: str, folder: Path) -> Path:
    nncf_checkpoint.write(read(stock(images, preset, folder / "stock.pt")), folder / "start", "a network")
    return folder / "start"


def trained(configuration: TrainConfig, run: Path) -> Path:
    manifest = Manifest("train", "key", None, {}, {})
    with write_stage(run, manifest) as out:
        manifest.payload = to_json(train(configuration, out, quiet))
    return run / "train"


def test_a_training_starts_from_nncfs_weights_and_ranges_and_goes_back(images: Tensor, tmp_path: Path) -> None:
    start = imported(images, "performance", tmp_path)
    directory = trained(config(("onnxruntime",), start), tmp_path / "run")
    notes = json.loads((directory / "manifest.json").read_text())["payload"]["notes"]
    assert f"{start}: edges: 5 kept, 3 rescaled, 0 calibrated, 0 dropped" in notes
    before = read(start)
    nncf_checkpoint.export(directory, "best", tmp_path / "back", "a network")
    after = {quantizer.hooks: quantizer for quantizer in read(tmp_path / "back").quantizers}
    assert set(after) == {quantizer.hooks for quantizer in before.quantizers}
    same = 0
    for quantizer in before.quantizers:
        again = after[quantizer.hooks]
        # 8 bits behind an unsigned input become 7 for ONNX Runtime, in the same range.
        torch.testing.assert_close(again.parameters["scale"], quantizer.parameters["scale"], rtol=2.0**-22, atol=0)
        same += (again.bits, again.signed) == (quantizer.bits, quantizer.signed)
    assert same == 5
    written = stock_nncf.load_folder(small(10, 1), tmp_path / "back")
    with torch.no_grad():
        assert bool(torch.isfinite(written(images)).all())
    namespace: dict[str, object] = {"__file__": str(tmp_path / "back" / "load_in_nncf.py")}
    exec((tmp_path / "back" / "load_in_nncf.py").read_text(), namespace)  # noqa: S102 - what a user runs
    shown = namespace["load"](small(10, 1))  # type: ignore[operator]
    with torch.no_grad():
        assert torch.equal(shown(images), written(images))


def test_training_goes_on_from_there(images: Tensor, tmp_path: Path) -> None:
    start = imported(images, "performance", tmp_path)
    directory = trained(config(("onnxruntime", "tensorrt"), start, epochs=1), tmp_path / "run")
    ranges = {q.hooks[0]: q.grid() for q in read(start).quantizers}
    for edge, grid in load_grids(directory / "teacher.grids.json").items():
        if grid.qmax == ranges[edge].qmax:
            np.testing.assert_allclose(grid.scale, ranges[edge].scale, rtol=0.5)
    nncf_checkpoint.export(directory, "teacher", tmp_path / "back", "a network")
    exported = read(tmp_path / "back")
    edges = {quantizer.hooks[0]: quantizer for quantizer in exported.quantizers}
    # TensorRT's half range has the values of signed 8 bits on a tensor without negative ones.
    assert (edges["post_hooks.relu/relu/0__0.0"].levels, edges["post_hooks.relu/relu/0__0.0"].bits) == ((-128, 127), 8)
    weight = exported.weights["second.weight"]
    largest = edges["pre_hooks.second/conv2d/0__1.0"].parameters["scale"]
    assert bool((weight.abs() <= largest * (1 + 2.0**-20)).all())
    with pytest.raises(UsageError, match="--candidate nobody: the training has only calibrated, student, teacher"):
        nncf_checkpoint.export(directory, "nobody", tmp_path / "none", "a network")


def test_what_differs_is_named(images: Tensor, tmp_path: Path) -> None:
    path = stock(images, "performance", tmp_path / "stock.pt")
    _, edges = start_from.check(path, config(("tensorrt",), None), quiet)
    assert {edge.name: (edge.outcome, edge.note) for edge in edges if edge.note} == {
        "post_hooks.relu/relu/0__0.0": ("rescaled", "codes 0 to 255 in the checkpoint, 0 to 127 here"),
        "post_hooks./relu/0__0.0": ("rescaled", "codes 0 to 255 in the checkpoint, 0 to 127 here"),
        "post_hooks./mean/0__0.0": ("rescaled", "codes 0 to 255 in the checkpoint, 0 to 127 here"),
        "post_hooks.second/conv2d/0__0.0": ("dropped", "the targets leave it in float"),
    }
    checkpoint = read(path)
    del checkpoint.quantizers[0]
    edges = take(checkpoint, images, ("onnxruntime", "tensorrt"))
    assert [edge.note for edge in edges if edge.outcome == "calibrated"] == ["the checkpoint has no quantizer here"]


def take(checkpoint: Checkpoint, images: Tensor, targets: tuple[Target, ...]) -> list[start_from.Edge]:
    model = quantize_model(small(10, 1).eval(), images[:2], QuantizationConfig(), targets, LSQQuantizer)
    return start_from.take_ranges(model, checkpoint, targets)


def test_zero_points_are_refused_for_tensorrt(images: Tensor, tmp_path: Path) -> None:
    checkpoint = read(stock(images, "mixed", tmp_path / "stock.pt"))
    moved = [q.hooks[0] for q in checkpoint.quantizers if q.grid().zero_point != 0]
    assert moved
    with pytest.raises(UsageError, match=r"zero point \d+, and TensorRT supports only 0.*preset PERFORMANCE"):
        take(checkpoint, images, ("onnxruntime", "tensorrt"))
    edges = {edge.name: edge for edge in take(checkpoint, images, ("onnxruntime",))}
    assert all(edges[name].outcome == "rescaled" and "in the checkpoint, 0 here" in edges[name].note for name in moved)


def test_a_method_with_a_zero_point_keeps_it(images: Tensor, tmp_path: Path) -> None:
    checkpoint = read(stock(images, "mixed", tmp_path / "stock.pt"))
    section = QuantizationConfig(activation_method="lsq+")
    model = quantize_model(small(10, 1).eval(), images[:2], section, ("onnxruntime",), quantizer_maker(section))
    specs = model.specs
    edges = {edge.name: edge for edge in start_from.take_ranges(model, checkpoint, ("onnxruntime",))}
    grids = {q.hooks[0]: q.grid() for q in checkpoint.quantizers}
    moved = [spec for spec in specs if grids[spec.edge].zero_point != 0]
    assert moved
    for spec in moved:
        quantizer, grid = quantizer_of(model, spec), grids[spec.edge]
        assert edges[spec.edge].outcome == "kept"
        assert quantizer.zero_point() == grid.zero_point + spec.qmin
        assert quantizer.scale.tolist() == grid.scale.tolist()
        back = of_grid(spec.hooks, quantizer.grid(), 4).grid()
        assert (back.scale.tolist(), back.zero_point - back.qmin) == (grid.scale.tolist(), grid.zero_point - grid.qmin)


def test_a_zero_points_range_is_covered_without_one(images: Tensor) -> None:
    grid = Grid(np.array([0.1], np.float32), 200, 0, 255)  # -20 to 5.5
    model = quantize_model(small(10, 1).eval(), images[:2], QuantizationConfig(), ("onnxruntime",), LSQQuantizer)
    specs = model.specs
    spec = next(spec for spec in specs if spec.qmin < 0 and spec.kind == "activation")
    start_from.take_ranges(model, Checkpoint({}, [of_grid([spec.edge], grid, 4)]), ("onnxruntime",))
    assert quantizer_of(model, spec).scale.item() * 128 == pytest.approx(20.0)


def test_a_checkpoint_of_another_network_is_refused(images: Tensor, tmp_path: Path) -> None:
    path = stock(images, "performance", tmp_path / "stock.pt")
    other = replace(config(("onnxruntime",), None), model=ModelConfig("cifar/resnet20"))
    with pytest.raises(UsageError, match=r"stock.pt does not fit the network in model.name"):
        start_from.check(path, other, quiet)


def test_usual_bits() -> None:
    quantizers = [
        of_grid([f"pre_hooks.{name}/conv2d/0__1.0"], Grid(np.ones(2, np.float32), 0, *codes, 0), 4)
        for name, codes in {"a": (-127, 127), "b": (-8, 7), "c": (-8, 7)}.items()
    ]
    quantizers += [of_grid(["post_hooks.x__0.0"], Grid(np.ones(1, np.float32), 0, 0, 15), 4)]
    assert start_from.usual_bits(Checkpoint({}, quantizers)) == (4, 4)
    assert start_from.usual_bits(Checkpoint({}, quantizers[:3])) == (4, 8)
