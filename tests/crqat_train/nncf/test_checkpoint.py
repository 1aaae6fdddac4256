from __future__ import annotations

import json
import math
import pickle
import re
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from crqat.core.errors import ToolError, UsageError
from crqat.core.grid import Grid
from crqat.train.config import QuantizationConfig, Target
from crqat.train.data import sources
from crqat.train.data.batches import evaluation_batches
from crqat.train.models import build as models
from crqat.train.nncf import checkpoint as nncf_checkpoint
from crqat.train.nncf.checkpoint import Checkpoint, NNCFQuantizer, of_grid, read, write
from crqat.train.placement import nncf_layout
from crqat.train.placement.nncf_layout import ask_layout
from crqat.train.placement.quantizer_spec import QuantizerSpec
from crqat.train.quantized_model import quantize_model
from crqat.train.quantizers import MinMaxQuantizer, quantizer_of
from crqat.train.quantizers.calibration import calibrate
from tests.crqat_train import stock_nncf

IMAGES = 64
# NNCF rounds (y - low) s - round(-low s), ours y / step: float32 places a tie differently by this part of a code.
TIE = 2.0**-14

Stock = Callable[[str, int], tuple[dict[str, Tensor], dict[str, Any]]]


@pytest.fixture(scope="module")
def images(cifar10_root: Path) -> Tensor:
    dataset = sources.load("cifar10", str(cifar10_root), False)
    return next(iter(evaluation_batches(dataset.train_images[:IMAGES], dataset.preprocessing, IMAGES)))


@pytest.fixture(scope="module")
def network(shared_data: Path) -> nn.Module:
    model = models.build("cifar/resnet20", 10, 3)
    models.load_weights(model, shared_data / "weights" / "resnet20-12fca82f.th")
    return model.eval()


def fresh() -> nn.Module:
    return models.build("cifar/resnet20", 10, 3).eval()


@pytest.fixture(scope="module")
def stock(network: nn.Module, images: Tensor) -> Stock:
    """ResNet-20 with real weights, quantized by stock NNCF on real images."""
    nncf_layout.without_extension()
    made = {preset: stock_nncf.quantize(network, images, preset) for preset in ("performance", "mixed")}
    return lambda preset, bits: stock_nncf.with_bits(*made[preset], bits)


def through_grids(checkpoint: Checkpoint) -> Checkpoint:
    again = [of_grid(quantizer.hooks, quantizer.grid(), len(quantizer.shape)) for quantizer in checkpoint.quantizers]
    return Checkpoint(checkpoint.weights, again)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("preset", ["performance", "mixed"])
def test_parameters_survive_the_way_from_nncf_and_back(
    stock: Stock, images: Tensor, tmp_path: Path, preset: str, bits: int
) -> None:
    state, config = stock(preset, bits)
    path = tmp_path / "checkpoint.pt"
    torch.save({"state_dict": state, "config": config}, path)  # the enum in the configuration included
    before = read(path)
    write(through_grids(before), tmp_path / "back", "cifar/resnet20")
    after = read(tmp_path / "back")

    assert {name for name in state if not name.startswith("__nncf_hooks.")} == set(after.weights)
    assert all(torch.equal(tensor, state[name]) for name, tensor in after.weights.items())
    assert [quantizer.hooks for quantizer in before.quantizers] == [quantizer.hooks for quantizer in after.quantizers]
    asymmetric = [quantizer for quantizer in before.quantizers if not quantizer.symmetric]
    assert len(asymmetric) == (0 if preset == "performance" else 30)
    # An asymmetric quantizer whose zero point is 0 is a symmetric unsigned one.
    moved = [quantizer for quantizer in asymmetric if quantizer.grid().zero_point != 0]
    assert len([quantizer for quantizer in after.quantizers if not quantizer.symmetric]) == len(moved)
    scales = identical = 0
    for old, new in zip(before.quantizers, after.quantizers, strict=True):
        ours, theirs = old.grid(), new.grid()
        assert (ours.zero_point, ours.qmin, ours.qmax) == (theirs.zero_point, theirs.qmin, theirs.qmax)
        if old.symmetric or new.symmetric:
            np.testing.assert_array_equal(ours.scale, theirs.scale)  # bit for bit
        else:  # not every float32 is a quotient by 15 or 255, and NNCF stores the largest value
            np.testing.assert_allclose(ours.scale, theirs.scale, rtol=2.0**-23, atol=0)
        assert old.bits == new.bits == bits
        if old.symmetric:
            assert (old.signed, old.narrow, old.shape) == (new.signed, new.narrow, new.shape)
            # float32 cannot hold every quotient by 127: where two ranges share a step, it may be the other one.
            torch.testing.assert_close(new.parameters["scale"], old.parameters["scale"], rtol=2.0**-23, atol=0)
            scales += old.parameters["scale"].numel()
            identical += int((old.parameters["scale"] == new.parameters["scale"]).sum())
        elif not new.symmetric and bits == 8:  # a range for 8 bits has no code at 0.0 at 4, so that NNCF moves it too
            torch.testing.assert_close(new.parameters["input_range"], old.parameters["input_range"], rtol=0, atol=0)
            torch.testing.assert_close(new.parameters["input_low"], old.parameters["input_low"], rtol=2.0**-22, atol=0)
    assert identical >= (0.99 if bits == 8 else 0.9) * scales

    with torch.no_grad():
        expected = stock_nncf.load(fresh(), state, config)(images[:16])
        actual = stock_nncf.load_folder(fresh(), tmp_path / "back")(images[:16])
    assert torch.equal(actual.argmax(dim=1), expected.argmax(dim=1))
    # Logits go up to 41. Steps that differ in their last bit flip a few codes at ties.
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.5)


def test_nncf_moves_a_border_as_we_do() -> None:
    from nncf.torch.quantization.quantize_functions import TuneRange

    generator = torch.Generator().manual_seed(0)
    for bits in (2, 4, 8):
        low = torch.randn(200, generator=generator)
        spread = torch.rand(200, generator=generator) * 4 + 0.01
        tuned_low, tuned_range = TuneRange.apply(low.clone(), spread.clone(), 2**bits)
        for number in range(len(low)):
            one = {"input_low": low[number : number + 1], "input_range": spread[number : number + 1]}
            if float(low[number] + spread[number]) <= 0:
                continue  # all negative: no activation is
            grid = NNCFQuantizer(("post_hooks.x__0.0",), bits, True, False, one).grid()
            assert (grid.qmin, grid.qmax) == (0, 2**bits - 1)
            np.testing.assert_allclose(grid.scale[0] * grid.qmax, float(tuned_range[number]), rtol=1e-5)
            # NNCF leaves a border that rounds to code 0 where it is: 0.0 is then a fraction of a code beside its own.
            beside = float(tuned_low[number]) + grid.zero_point * grid.scale[0]
            assert abs(beside) <= (0.501 if grid.zero_point in (0, grid.qmax) else 1e-4) * grid.scale[0]


def quantized(
    network: nn.Module, images: Tensor, bits: int, targets: tuple[Target, ...]
) -> tuple[fx.GraphModule, list[QuantizerSpec]]:
    config = QuantizationConfig(weights=bits, activations=bits, first_layer=bits, last_layer=bits)
    model = quantize_model(network, images[:2], config, targets, MinMaxQuantizer)
    specs = model.specs
    calibrate(model, [images])
    return model.eval(), specs


def exported(model: fx.GraphModule, specs: list[QuantizerSpec], folder: Path) -> None:
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("quantizers.")}
    made = [of_grid(spec.hooks, quantizer_of(model, spec).grid(), spec.ndim) for spec in specs]
    write(Checkpoint(weights, made), folder, "a network")


@pytest.mark.parametrize(
    ("bits", "targets"), [(8, ("onnxruntime", "tensorrt")), (8, ("onnxruntime",)), (4, ("tensorrt",))]
)
def test_stock_nncf_computes_what_we_do(
    network: nn.Module, images: Tensor, tmp_path: Path, bits: int, targets: tuple[Target, ...]
) -> None:
    nncf_layout.without_extension()
    model, specs = quantized(network, images, bits, targets)
    exported(model, specs, tmp_path)
    theirs = stock_nncf.load_folder(fresh(), tmp_path)
    seen: dict[str, Tensor] = {}
    for spec in specs:
        quantizer_of(model, spec).register_forward_pre_hook(
            lambda _, inputs, edge=spec.edge: seen.setdefault(edge, inputs[0])
        )
    with torch.no_grad():
        ours, other = model(images[:16]), theirs(images[:16])
    assert torch.equal(ours.argmax(dim=1), other.argmax(dim=1))
    differing = total = 0
    for spec in specs:
        quantizer = quantizer_of(model, spec)
        count, from_tie = stock_nncf.differing_codes(
            quantizer, stock_nncf.hook(theirs, spec.hooks[0]), seen[spec.edge], quantizer.scale
        )
        assert from_tie <= TIE, spec.edge
        differing, total = differing + count, total + seen[spec.edge].numel()
    assert total > 3_000_000
    assert differing <= total * 1e-4


class Unfused(nn.Module):
    """A convolution before an activation that ONNX Runtime does not fuse: there we quantize where NNCF does not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.SiLU()
        self.last = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.bn(self.conv(x)))).mean(dim=(2, 3))  # type: ignore[no-any-return]


def test_stock_nncf_takes_quantizers_that_it_does_not_place(tmp_path: Path) -> None:
    nncf_layout.without_extension()
    torch.manual_seed(0)
    network, images = Unfused().eval(), torch.randn(8, 3, 12, 12)
    model, specs = quantized(network, images, 8, ("onnxruntime",))
    asked = {hook for names, _, _ in ask_layout(network, images).groups for hook in names}
    extra = [spec for spec in specs if not asked.intersection(spec.hooks)]
    assert [spec.edge for spec in extra] == ["post_hooks.bn/batch_norm/0__0.0"]
    exported(model, specs, tmp_path)
    theirs = stock_nncf.load_folder(Unfused().eval(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), model(images), rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("grid", "bits", "signed", "narrow", "largest"),
    [
        (Grid(np.array([0.5], np.float32), 0, -128, 127), 8, True, False, 63.5),
        (Grid(np.array([0.5], np.float32), 0, -127, 127), 8, True, True, 63.5),
        (Grid(np.array([0.5], np.float32), 0, 0, 127), 8, True, False, 63.5),  # TensorRT's half range
        (Grid(np.array([0.5], np.float32), 0, 0, 255), 8, False, False, 127.5),
        (Grid(np.array([0.5], np.float32), 0, -64, 63), 7, True, False, 31.5),
        (Grid(np.array([0.5], np.float32), 0, 0, 3), 2, False, False, 1.5),
        (Grid(np.array([0.5], np.float32), 0, -2, 1), 2, True, False, 0.5),
    ],
)
def test_our_grids_are_quantizers_of_nncfs(grid: Grid, bits: int, signed: bool, narrow: bool, largest: float) -> None:
    made = of_grid(["post_hooks.x__0.0"], grid, 4)
    assert (made.bits, made.signed, made.narrow, made.parameters["scale"].tolist()) == (bits, signed, narrow, [largest])
    assert made.grid().scale.tolist() == [0.5]


def test_a_grid_with_a_zero_point_is_asymmetric_there() -> None:
    grid = Grid(np.array([0.25], np.float32), -28, -128, 127)
    made = of_grid(["post_hooks.x__0.0"], grid, 4)
    assert {name: value.tolist() for name, value in made.parameters.items()} == {
        "input_low": [-25.0],
        "input_range": [63.75],
    }
    again = made.grid()
    assert (again.zero_point, again.qmin, again.qmax, again.scale.tolist()) == (100, 0, 255, [0.25])
    with pytest.raises(
        UsageError, match=r"post_hooks.x__0.0: NNCF has no quantizer with codes 0 to 99 and zero point 0"
    ):
        of_grid(["post_hooks.x__0.0"], Grid(np.array([1.0], np.float32), 0, 0, 99), 4)


def test_channels_with_zero_points_of_their_own_are_refused() -> None:
    parameters = {"input_low": torch.tensor([[-1.0], [-3.0]]), "input_range": torch.tensor([[4.0], [4.0]])}
    with pytest.raises(UsageError, match=r"pre_hooks.fc/linear/0__1.0: asymmetric per channel"):
        NNCFQuantizer(("pre_hooks.fc/linear/0__1.0",), 8, True, False, parameters).grid()


def small() -> Checkpoint:
    quantizers = [
        of_grid(["post_hooks.x__0.0"], Grid(np.array([0.5], np.float32), 0, 0, 255), 4),
        of_grid(["pre_hooks.fc/linear/0__1.0"], Grid(np.array([0.5, 1], np.float32), 0, -127, 127, 0), 2),
    ]
    return Checkpoint({"fc.weight": torch.ones(2, 3)}, quantizers)


def test_a_quantizer_that_is_switched_off_is_none(tmp_path: Path) -> None:
    write(small(), tmp_path, "a network")
    state = load_file(tmp_path / nncf_checkpoint.STATE)
    state["__nncf_hooks.post_hooks.x__0.0.enabled"].fill_(0)
    save_file(state, tmp_path / nncf_checkpoint.STATE)
    assert [quantizer.hooks for quantizer in read(tmp_path).quantizers] == [("pre_hooks.fc/linear/0__1.0",)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_place_that_cannot_take_a_checkpoint_keeps_the_one_that_it_has(tmp_path: Path) -> None:
    """A file may not grow beyond 64 KiB here, which ends a write in the middle as a full disk does."""
    write(small(), tmp_path, "a network")
    before = contents(tmp_path)
    assert before.keys() == {nncf_checkpoint.STATE, nncf_checkpoint.CONFIG, nncf_checkpoint.HOWTO}
    large = Checkpoint({"fc.weight": torch.ones(2, 2**16)}, small().quantizers)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(ToolError) as caught:
            write(large, tmp_path, "a network")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == f"{tmp_path}: cannot be written: File too large; choose another place with --out"
    assert contents(tmp_path) == before


def test_a_file_is_no_folder_for_a_checkpoint(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("something else")
    with pytest.raises(ToolError, match=rf"^{re.escape(str(place))}: cannot be written: File exists; choose another"):
        write(small(), place, "a network")
    assert contents(tmp_path) == {"file": b"something else"}


class Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return print, ("code ran",)


def test_damaged_checkpoints_are_named_and_no_code_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(small(), tmp_path / "good", "a network")
    config = json.loads((tmp_path / "good" / nncf_checkpoint.CONFIG).read_text())

    def folder(name: str, change: Callable[[Any], None]) -> Path:
        write(small(), tmp_path / name, "a network")
        changed = json.loads(json.dumps(config))
        change(changed)
        (tmp_path / name / nncf_checkpoint.CONFIG).write_text(json.dumps(changed))
        return tmp_path / name

    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"state_dict": Evil(), "config": config}))
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "alone.pt")
    (tmp_path / "empty").mkdir()
    cases = {
        tmp_path / "nowhere.pt": "no such file or folder",
        tmp_path / "evil.pt": "damaged, or needs code to load",
        tmp_path / "alone.pt": "1 state dicts and 0 configurations",
        tmp_path / "empty": "0 .safetensors and 0 .json files",
        folder("kind", lambda c: c["compression_state"][0].update(module_cls_name="AsymmetricLoraQuantizer")): "Lora",
        folder("hook", lambda c: c["compression_state"][0].update(hook_names_in_model=["post_hooks.y__0.0"])): "fit",
        folder("nobody", lambda c: c["compression_state"][0].update(hook_names_in_model=[])): "fit",
        folder("none", lambda c: c.pop("compression_state")): "not a configuration of nncf.torch.get_config",
        folder("odd", lambda c: c["compression_state"].append(3)): "fit",
        folder(
            "nan", lambda c: c["compression_state"][0]["module_config"].update(num_bits=math.nan)
        ): "NaN is not a number in JSON",
        folder("deep", lambda c: None): "nested too deeply",
    }
    (tmp_path / "deep" / nncf_checkpoint.CONFIG).write_bytes(b"[" * 100_000)
    for path, words in cases.items():
        with pytest.raises(UsageError, match=words) as caught:
            read(path)
        assert str(path) in str(caught.value)
    assert "code ran" not in capsys.readouterr().out
    wide = small()
    wide.quantizers[0] = replace(wide.quantizers[0], bits=16)
    write(wide, tmp_path / "wide", "a network")
    with pytest.raises(UsageError, match="16 bits"):
        read(tmp_path / "wide")
