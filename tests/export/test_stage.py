"""The export stage from a train directory to a complete export directory, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from crqat.core.errors import UsageError
from crqat.core.grid import grids_hash, load_grids
from crqat.core.progress import quiet
from crqat.core.results.verification import Verification
from crqat.core.run_directory import MANIFEST, Manifest, read_manifest, verify_stage, write_stage
from crqat.core.typed_json import to_json
from crqat.export import stage, write_models
from crqat.export.config import ExportConfig
from crqat.export.qdq.lint import lint
from crqat.train.config import TrainConfig
from crqat.train.data import sources
from crqat.train.data.split import split as split_images
from tests.export.conftest import BOTH, nodes, session

Trained = Callable[..., tuple[Path, TrainConfig]]
CONFIG = ExportConfig(verify_images=8)


def export(trained: tuple[Path, TrainConfig], out: Path, config: ExportConfig = CONFIG, progress: Any = quiet) -> Any:
    """The stage into a directory."""
    out.mkdir(exist_ok=True)
    return to_json(stage.export(trained[0], trained[1], config, out, progress, "a run", "a revision"))


@pytest.fixture(scope="module")
def exported(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A complete export, not to be changed, and its payload."""
    out = tmp_path_factory.mktemp("export")
    return out, export(trained(), out)


def test_the_directory_is_complete(exported: tuple[Path, dict[str, Any]], trained: Trained) -> None:
    out, payload = exported
    names = {"float.onnx", "float16.onnx", "onnxruntime.onnx", "tensorrt.onnx"}
    data_files = {"images.npy", "labels.npy", "onnxruntime.codes.npz"}
    assert {path.name for path in out.iterdir()} == names | data_files
    targets = ["float", "float16", "onnxruntime", "tensorrt"]
    assert [entry["file"] for entry in payload["models"]] == [f"{target}.onnx" for target in targets]
    assert [entry["target"] for entry in payload["models"]] == targets
    test = sources.load("digits", None, False)
    images, labels = (np.load(out / payload[key], allow_pickle=False) for key in ("images", "labels"))
    np.testing.assert_array_equal(images, test.test_images[:].numpy())
    np.testing.assert_array_equal(labels, test.test_labels.numpy())
    assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
    for name in names:
        model = onnx.load(out / name, load_external_data=False)
        assert lint(model, name.removesuffix(".onnx")) == []


def test_the_payload_is_what_the_next_stages_read(exported: tuple[Path, dict[str, Any]], trained: Trained) -> None:
    out, payload = exported
    directory, _ = trained()
    grids = load_grids(directory / f"{payload['candidate']}.grids.json")
    assert payload["run"] == "a run"
    assert payload["class_names"] == [str(digit) for digit in range(10)]
    assert payload["grids_sha256"] == grids_hash(grids)
    assert payload["training"] == read_manifest(directory).payload
    assert json.loads(json.dumps(payload, allow_nan=False)) == payload
    _, _, runtime, engine = payload["models"]
    assert (runtime["precision"], engine["precision"]) == ("float32", "float16")
    for entry in (runtime, engine):
        assert entry["verification"]["status"] == "passed"
        assert entry["verification"]["images"] == 8
        assert entry["verification"]["codes"] > 0
        assert entry["claims"].keys() == grids.keys()
        assert entry["findings"] == []
        assert entry["float_layers"] == {"macs": {}, "share": 0.0}
        assert {claim["claim"] for claim in entry["claims"].values()} == {"exact"}
        model = onnx.load(out / entry["file"])
        operations = {node.name for node in model.graph.node if node.op_type in ("Conv", "Gemm")}
        assert entry["macs"].keys() == operations
        assert sum(entry["macs"].values()) == 2_516_608
    assert runtime["expected_codes"] == "onnxruntime.codes.npz"
    assert runtime["fusion"]["complete"]
    assert "fusion" not in engine


def test_metadata_say_how_to_use_a_file(exported: tuple[Path, dict[str, Any]], trained: Trained) -> None:
    out, payload = exported
    for target in ("float", "float16", *BOTH):
        model = onnx.load(out / f"{target}.onnx")
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        preprocessing = json.loads(metadata.pop("crqat.preprocessing"))
        assert preprocessing == read_manifest(trained()[0]).payload["preprocessing"]
        assert json.loads(metadata.pop("crqat.class_names")) == payload["class_names"]
        assert metadata == {
            "crqat.schema_version": "1",
            "crqat.run": "a run",
            "crqat.grids_sha256": payload["grids_sha256"],
            "crqat.git_revision": "a revision",
            "crqat.target": target,
        }


def test_the_baseline_is_the_float_network_before_quantization(
    exported: tuple[Path, dict[str, Any]], trained: Trained
) -> None:
    """Its accuracy is that of float.safetensors, and its weights are not the trained network's."""
    from safetensors.numpy import load_file

    out, _ = exported
    directory, _ = trained()
    model = onnx.load(out / "float.onnx")
    linear = next(t for t in model.graph.initializer if list(t.dims) == [10, 64])
    weight = onnx.numpy_helper.to_array(linear)
    np.testing.assert_array_equal(weight, load_file(directory / "float.safetensors")["linear.weight"])
    assert (weight != load_file(directory / "student.safetensors")["linear.weight"]).any()
    assert not [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    test = sources.load("digits", None, False)
    logits = session(model).run(["logits"], {"input": test.preprocessing(test.test_images[:].numpy())})[0]
    assert (logits.argmax(axis=1) == test.test_labels.numpy()).mean() > 0.8


def test_verification_does_not_see_test_images(trained: Trained, tmp_path: Path, monkeypatch: Any) -> None:
    """It takes those of the validation split, as many as the recipe says."""
    seen: list[np.ndarray] = []

    def verify(model: Any, grids: Any, files: dict[str, Any], images: np.ndarray) -> dict[str, Verification]:
        seen.append(images)
        return {target: Verification("passed", len(images), 1, 0) for target in files}

    monkeypatch.setattr(write_models, "verify", verify)
    training = trained()
    export(training, tmp_path, ExportConfig(verify_images=5))
    dataset = sources.load("digits", None, False)
    split = split_images(len(dataset.train_labels), training[1].data.validation, training[1].seed)
    expected = dataset.preprocessing(dataset.train_images[split.validation[:5]].numpy())
    np.testing.assert_array_equal(seen[0], expected)


def test_progress_tells_of_each_file(trained: Trained, tmp_path: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    export(trained(), tmp_path, progress=lambda task, done, total, note="": steps.append((done, total, note)))
    assert [done for done, _, _ in steps] == [1, 2, 3, 4]
    assert {total for _, total, _ in steps} == {4}
    assert [note for _, _, note in steps[:3]] == [
        "onnxruntime.onnx",
        "tensorrt.onnx",
        "onnxruntime: passed; tensorrt: passed",
    ]


def test_one_target_and_float32(trained: Trained, tmp_path: Path) -> None:
    payload = export(trained(), tmp_path, replace(CONFIG, targets=("tensorrt",), tensorrt_precision="float32"))
    assert {path.name for path in tmp_path.glob("*.onnx")} == {"float.onnx", "tensorrt.onnx"}
    assert payload["models"][1]["precision"] == "float32"
    assert payload["models"][1]["verification"]["status"] == "passed"


def test_the_same_bytes_twice(exported: tuple[Path, dict[str, Any]], trained: Trained, tmp_path: Path) -> None:
    export(trained(), tmp_path)
    for path in exported[0].iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_what_a_target_cannot_hold_is_refused_with_the_way_out(trained: Trained, tmp_path: Path) -> None:
    training = trained(targets=("tensorrt",))
    with pytest.raises(UsageError) as caught:
        export(training, tmp_path, replace(CONFIG, targets=("onnxruntime",)))
    message = str(caught.value)
    assert "onnxruntime cannot hold 1 trained Grids, first pre_hooks.conv1/conv2d/0__1.0" in message
    assert "with its input, larger ones saturate 16-bit sums" in message
    assert message.endswith("add onnxruntime to `targets` and train again, or set export.allow_lossy: true")
    assert not list(tmp_path.iterdir())


def test_float16_scales_are_refused_likewise(trained: Trained, tmp_path: Path) -> None:
    training = trained(targets=("onnxruntime",))
    with pytest.raises(UsageError, match=r"tensorrt cannot hold \d+ trained Grids, .*float16 does not hold its scale"):
        export(training, tmp_path, replace(CONFIG, targets=("tensorrt",)))
    config = replace(CONFIG, targets=("tensorrt",), tensorrt_precision="float32")
    # Trained for ONNX Runtime alone, the codes behind a ReLU go up to 255.
    with pytest.raises(UsageError, match=r"tensorrt cannot hold 20 trained Grids, .*TensorRT has no unsigned INT8"):
        export(training, tmp_path, config)
    payload = export(training, tmp_path, replace(config, allow_lossy=True))
    # Half as many codes are not torch's, and the verification says so.
    assert payload["models"][1]["verification"]["status"].startswith("failed: torch: ")


def test_allow_lossy_writes_the_file_and_says_what_differs(trained: Trained, tmp_path: Path) -> None:
    training = trained(targets=("tensorrt",))
    payload = export(training, tmp_path, ExportConfig(targets=("onnxruntime", "tensorrt"), allow_lossy=True))
    _, _, runtime, engine = payload["models"]
    lossy = [edge for edge, claim in runtime["claims"].items() if claim["claim"] == "lossy"]
    assert lossy == ["pre_hooks.conv1/conv2d/0__1.0"]
    assert "saturate" in runtime["claims"][lossy[0]]["note"]
    # The reduced first layer is not torch's. Nor are this layout's residual sums in integers: ONNX Runtime adds floats.
    links = runtime["verification"]["links"]
    assert runtime["verification"]["status"].startswith(f"failed: torch: {links['torch']['violations']} codes")
    assert links["torch"]["at"] == "post_hooks.relu/relu/0__0.0.codes"
    assert {entry["operation"] for entry in runtime["fusion"]["float"]} == {"Add", "Conv"}
    assert engine["verification"]["links"]["torch"]["violations"] == 0
    assert engine["verification"]["links"]["onnxruntime"]["violations"] > 0
    assert (tmp_path / "onnxruntime.onnx").is_file()


@pytest.mark.parametrize("name", ["student.safetensors", "float.safetensors", "student.grids.json"])
def test_a_damaged_train_directory_is_named_and_nothing_is_written(trained: Trained, tmp_path: Path, name: str) -> None:
    directory, config = trained()
    with write_stage(tmp_path / "run", replace(read_manifest(directory))) as out:
        for path in directory.iterdir():
            if path.name != MANIFEST:
                (out / path.name).write_bytes(path.read_bytes())
    copied = tmp_path / "run" / "train"
    (copied / name).write_bytes((copied / name).read_bytes()[:-100])
    with pytest.raises(UsageError, match=f"{name}: altered or damaged"):
        export((copied, config), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    (copied / name).unlink()
    with pytest.raises(UsageError, match=f"{name}: missing"):
        export((copied, config), tmp_path / "out")


def test_a_failed_export_leaves_the_one_before(trained: Trained, tmp_path: Path) -> None:
    """Also if it fails late, with files written already."""
    run = tmp_path / "run"

    def write(config: ExportConfig, training: tuple[Path, TrainConfig]) -> None:
        manifest = Manifest("export", "key", None, {}, {})
        with write_stage(run, manifest) as out:
            manifest.payload = export(training, out, config)

    write(CONFIG, trained())
    before = verify_stage(run / "export")
    with pytest.raises(UsageError, match="cannot hold"):
        write(replace(CONFIG, targets=("onnxruntime",)), trained(targets=("tensorrt",)))

    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("numpy.save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(CONFIG, trained())
    assert verify_stage(run / "export") == before
    assert len(list(run.iterdir())) == 2  # the link and its directory


def test_a_file_that_breaks_a_rule_is_not_written(trained: Trained, tmp_path: Path, monkeypatch: Any) -> None:
    from crqat.export.qdq.lint import Finding

    monkeypatch.setattr(write_models, "lint", lambda model, target: [Finding("conv1", "a rule", "a fix")] * 2)
    with pytest.raises(
        UsageError, match=r"^onnxruntime\.onnx breaks 2 rules, first: conv1: a rule; a fix; crqat export"
    ):
        export(trained(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_unsafe_writes_it_all_the_same_and_records_why(trained: Trained, tmp_path: Path, monkeypatch: Any) -> None:
    from crqat.export.qdq.lint import Finding

    monkeypatch.setattr(write_models, "lint", lambda model, target: [Finding(target, "a rule", "a fix")])
    directory, config = trained()
    payload = stage.export(directory, config, CONFIG, tmp_path, quiet, "a run", "a revision", unsafe=True)
    findings = {entry.file: entry.findings for entry in payload.models}
    assert findings == {
        "float.onnx": None,
        "float16.onnx": None,
        "onnxruntime.onnx": ["onnxruntime: a rule; a fix"],
        "tensorrt.onnx": ["tensorrt: a rule; a fix"],
    }
    assert all((tmp_path / file).is_file() for file in findings)


def test_weights_as_float_in_the_file_for_tensorrt_alone(
    trained: Trained, exported: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    payload = export(trained(), tmp_path, replace(CONFIG, weights="float"))
    for name in ("float.onnx", "float16.onnx", "onnxruntime.onnx"):
        assert (tmp_path / name).read_bytes() == (exported[0] / name).read_bytes()
    file = onnx.load(tmp_path / "tensorrt.onnx")
    constants = {tensor.name: tensor.data_type for tensor in file.graph.initializer}
    stored = {constants[node.input[0]] for node in nodes(file, "QuantizeLinear") if node.input[0] in constants}
    assert stored == {onnx.TensorProto.FLOAT16}
    assert lint(file, "tensorrt") == []
    assert payload["models"][-1]["verification"]["status"] == "passed"
    assert payload["models"][-1]["verification"] == exported[1]["models"][-1]["verification"]
