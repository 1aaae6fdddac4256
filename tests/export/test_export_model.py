"""`crqat.export` and `crqat.verify`: what is written, what is refused, and that nothing is left half-done."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import crqat
from crqat.core.run_directory import read_manifest, verify_stage
from crqat.export import write_models
from crqat.export.qdq.lint import Finding, lint
from tests.export.conftest import edited, nodes, session

PREPROCESSING = crqat.Preprocessing((0.5, 0.4), (0.2, 0.25))
BYTES = torch.randint(0, 256, (24, 2, 9, 9), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
IMAGES = torch.from_numpy(PREPROCESSING(BYTES.numpy()))
BOTH = ("onnxruntime", "tensorrt")


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(8, 4)).eval()


@pytest.fixture(scope="module")
def model() -> crqat.QuantizedModel:
    """A network whose weights training has moved; not to be changed."""
    quantized = crqat.quantize(network(), calibration=[IMAGES], weights=4, activations=4).train()
    optimizer = torch.optim.SGD(crqat.parameter_groups(quantized, weight_decay=0.0), lr=0.1)
    nn.functional.cross_entropy(quantized(IMAGES), torch.arange(24) % 4).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return quantized


def export(model: nn.Module, out: Path, **options: Any) -> crqat.Export:
    return crqat.export(model, out, **{"images": BYTES, "preprocessing": PREPROCESSING, **options})


def test_it_gives_back_what_it_wrote(model: crqat.QuantizedModel, tmp_path: Path) -> None:
    before = copy.deepcopy(model.state_dict())
    made = export(model, tmp_path / "deep" / "out", class_names=["a", "b", "c", "d"])
    assert made.directory == tmp_path / "deep" / "out" and not made.directory.is_symlink()
    assert list(made.files) == ["float", "float16", *BOTH]
    assert {path.name for path in made.directory.iterdir()} == {
        "float.onnx", "float16.onnx", "onnxruntime.onnx", "tensorrt.onnx", "onnxruntime.codes.npz", "manifest.json",
    }  # fmt: skip
    assert [path.name for path in made.directory.parent.iterdir()] == ["out"]
    manifest = verify_stage(made.directory)
    assert manifest.stage == "export" and manifest.payload["class_names"] == ["a", "b", "c", "d"]
    assert set(made.verification) == set(made.findings) == set(made.claims) == set(BOTH)
    for target in BOTH:
        assert made.verification[target].passed and made.verification[target].images == 24
        assert made.findings[target] == () and lint(onnx.load(made.files[target]), target) == []
        assert made.claims[target].keys() == made.model.grids().keys()
    assert list(made.macs.values()) == [7 * 7 * 8 * 2 * 9, 8 * 4]
    assert "0 of" in str(made) and len(str(made).splitlines()) == 4
    # The user's own network is as it was, in training mode and with its own scales.
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_files_carry_preprocessing_and_metadata(model: crqat.QuantizedModel, tmp_path: Path) -> None:
    made = export(model, tmp_path / "out")
    for target, path in made.files.items():
        metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        assert json.loads(metadata["crqat.preprocessing"])["mean"] == [0.5, 0.4]
        assert json.loads(metadata["crqat.class_names"]) == ["0", "1", "2", "3"]
        assert (metadata["crqat.target"], metadata["crqat.run"]) == (target, "out")


def test_the_baseline_is_the_network_before_quantization_and_training(
    model: crqat.QuantizedModel, tmp_path: Path
) -> None:
    made = export(model, tmp_path / "out")
    (logits,) = session(onnx.load(made.files["float"])).run(["logits"], {"input": IMAGES.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(logits, network()(IMAGES).numpy(), rtol=1e-4, atol=1e-5)
    (quantized,) = session(onnx.load(made.files["onnxruntime"])).run(["logits"], {"input": IMAGES.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(quantized, made.model(IMAGES).numpy(), atol=0.01)  # ties


def test_some_of_the_targets_and_other_types(model: crqat.QuantizedModel, tmp_path: Path) -> None:
    made = export(model, tmp_path / "out", targets=["tensorrt"], tensorrt_precision="float32", tensorrt_weights="float")
    assert list(made.files) == ["float", "tensorrt"] and made.verification["tensorrt"].passed
    file = onnx.load(made.files["tensorrt"])
    assert {t.data_type for t in file.graph.initializer} & {onnx.TensorProto.FLOAT16} == set()
    constants = {tensor.name for tensor in file.graph.initializer}
    assert [node for node in nodes(file, "QuantizeLinear") if node.input[0] in constants]
    assert crqat.verify(made, BYTES[:4])["tensorrt"].passed  # made again with the same types
    assert list(export(model, tmp_path / "other", targets="onnxruntime").files) == ["float", "onnxruntime"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": IMAGES},
            r"^images: float32 of shape \[24, 2, 9, 9\]; expected bytes before normalization, uint8 of",
        ),
        ({"images": BYTES[0]}, r"^images: uint8 of shape \[2, 9, 9\]; expected"),
        ({"images": BYTES[:0]}, r"^images: uint8 of shape \[0, 2, 9, 9\]; expected"),
        (
            {"images": BYTES[:, :, :8]},
            r"^images: shape \[24, 2, 8, 9\]; the network was quantized with images of shape \[",
        ),
        (
            {"images": BYTES.permute(0, 2, 3, 1)},
            r"^preprocessing: 2 means and 2 stds; the images of shape \[9, 9, 2\] ",
        ),
        ({"preprocessing": crqat.Preprocessing((0.5,), (0.2,))}, r"^preprocessing: 1 means and 1 stds; the images of"),
        ({"preprocessing": crqat.Preprocessing((0.5, 0.5), (0.2, 0.0))}, r"^preprocessing: .*positive stds$"),
        ({"class_names": ["a"]}, r"^class_names: 1 names for the 4 logits of the network; give one for each$"),
        ({"targets": ["tensort"]}, r"^targets: no runtime is called 'tensort'; did you mean `tensorrt`\?$"),
        ({"tensorrt_precision": "fp16"}, r"^tensorrt_precision: Input should be 'float16' or 'float32', not 'fp16'$"),
    ],
)
def test_what_does_not_fit_is_named(
    model: crqat.QuantizedModel, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(crqat.UsageError, match=message):
        export(model, tmp_path / "out", **changes)
    assert not list(tmp_path.iterdir())


def test_a_target_that_the_network_was_not_quantized_for(tmp_path: Path) -> None:
    model = crqat.quantize(network(), calibration=[IMAGES], targets=("tensorrt",))
    with pytest.raises(
        crqat.UsageError, match=r"^targets: the network was quantized for tensorrt; add onnxruntime to "
    ):
        export(model, tmp_path / "out", targets=BOTH)


def test_a_network_that_is_not_quantized_is_refused(model: crqat.QuantizedModel, tmp_path: Path) -> None:
    with pytest.raises(
        crqat.UsageError, match=r"^model: a Sequential; expected what crqat\.quantize or crqat\.load made$"
    ):
        export(network(), tmp_path / "out")
    with pytest.raises(crqat.UsageError, match=r"^model: a EMATeacher; .*; of a teacher give teacher\.model$"):
        export(crqat.EMATeacher(model), tmp_path / "out")  # type: ignore[arg-type]


def wrong_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files whose weights are not the network's."""
    right = write_models.make_file

    def wrong(*arguments: Any) -> Any:
        file = right(*arguments)
        name = next(
            t.name for t in file.model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1
        )
        constant = onnx.numpy_helper.to_array(next(t for t in file.model.graph.initializer if t.name == name))
        return replace(file, model=edited(file.model, name, -constant))

    monkeypatch.setattr(write_models, "make_file", wrong)


def test_a_failed_verification_raises_and_leaves_what_was_there(
    model: crqat.QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in export(model, tmp_path / "out").directory.iterdir()}
    wrong_weights(monkeypatch)
    with pytest.raises(crqat.VerificationError, match=r"^onnxruntime\.onnx: verification on 24 images failed: torch: "):
        export(model, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    made = export(model, tmp_path / "unsafe", unsafe=True)
    assert not made.verification["onnxruntime"].passed and made.files["onnxruntime"].is_file()


def test_a_broken_rule_raises_and_writes_nothing(
    model: crqat.QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_models, "lint", lambda model, target: [Finding("conv1", "a rule", "a fix")])
    with pytest.raises(
        crqat.UsageError, match=r"^onnxruntime\.onnx breaks 1 rules, first: conv1: a rule; a fix; unsafe"
    ):
        export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert export(model, tmp_path / "out", unsafe=True).findings["tensorrt"] == ("conv1: a rule; a fix",)


def test_other_files_at_the_place_are_never_touched(model: crqat.QuantizedModel, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("notes", "file"):
        with pytest.raises(crqat.UsageError, match=r"that crqat did not write; choose an empty directory$"):
            export(model, tmp_path / name)
    assert (tmp_path / "notes" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert read_manifest(export(model, tmp_path / "empty").directory).payload["run"] == "empty"


def test_verify_a_network_on_normalized_images_or_on_bytes(model: crqat.QuantizedModel) -> None:
    for found in (crqat.verify(model, IMAGES), crqat.verify(model, BYTES, PREPROCESSING)):
        assert [found[target].status for target in BOTH] == ["passed", "passed"]
        assert found["onnxruntime"].codes > 24 * 100 and set(found["tensorrt"].checks or {}) == {
            "torch",
            "runtime",
            "onnxruntime",
        }
    for wrong in (BYTES, IMAGES.double(), IMAGES[0], IMAGES[:0]):
        with pytest.raises(crqat.UsageError, match=r"^images: \w+ of shape \[.*\]; expected normalized images, float"):
            crqat.verify(model, wrong)


def test_verify_reads_the_files_from_the_disk(model: crqat.QuantizedModel, tmp_path: Path) -> None:
    made = export(model, tmp_path / "out")
    assert all(found.passed for found in crqat.verify(made, BYTES[:5]).values())
    file = onnx.load(made.files["onnxruntime"])
    name = next(t.name for t in file.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1)
    weight = onnx.numpy_helper.to_array(next(t for t in file.graph.initializer if t.name == name))
    onnx.save(edited(file, name, -weight), made.files["onnxruntime"])
    found = crqat.verify(made, BYTES[:5])
    assert found["onnxruntime"].status.startswith("failed: torch: ")
