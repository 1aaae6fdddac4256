"""Damaged and hostile files as a user meets them: the command ends in one line that names the file."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from crqat.core import run_directory
from crqat.pipeline import cli
from crqat.pipeline.stages import staleness
from crqat.runtime_eval.trt import versions as tensorrt_api
from tests.hostile_pickle import Hostile

ROOT = Path(__file__).parent.parent
FROZEN = sorted((ROOT / "tests" / "frozen").glob("v*"))
# Every command that reads a finished run.
READING = (
    ("check", "frozen"),
    ("gate", "recipe.yaml", "--runs", "."),
    ("report", "frozen"),
    ("bundle", "frozen"),
)


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    errors: list[str]


Crqat = Callable[..., Ended]


@pytest.fixture
def crqat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Crqat:
    """The command in this process: importing torch a hundred times would take minutes."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["crqat", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, out, [line for line in err.splitlines() if "error" in line])

    return run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a copy of the newest frozen run: recipe.yaml and frozen/{train,export,benchmark}."""
    copy = tmp_path / "copy"
    shutil.copytree(FROZEN[-1], copy)
    monkeypatch.chdir(copy)
    monkeypatch.syspath_prepend(ROOT)  # the recipe's functions
    return copy


def left_in(folder: str) -> list[Path]:
    """Files below a folder but for the lock, which stays in a run's directory."""
    return [path for path in Path(folder).rglob("*.*") if path.name != ".lock"]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refusal(ended: Ended) -> str:
    """The one line with which a command refuses what it was given, by exit code 2."""
    assert ended.code == 2, ended
    assert len(ended.errors) == 1, ended
    return ended.errors[0]


def sealed(stage: Path, name: str, content: bytes) -> None:
    """Replace a file of a stage as whoever made the stage could: its hash in the manifest is right."""
    (stage / name).write_bytes(content)
    path = stage / run_directory.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"][name] = run_directory.sha256_file(stage / name)
    path.write_text(json.dumps(manifest))


# --- What earlier versions wrote -------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", FROZEN, ids=lambda path: path.name)
def test_every_reader_reads_a_frozen_run(
    version: Path, tmp_path: Path, crqat: Crqat, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crqat.runtime_eval.board import bundle
    from crqat.runtime_eval.runners.onnxruntime import OnnxRuntimeRunner
    from crqat.runtime_eval.trt import plan_file

    shutil.copytree(version, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.syspath_prepend(ROOT)
    checked = crqat("check", "frozen")
    assert checked.code == 0 and checked.out.count("files intact") == 3
    files = ["recipe.yaml", "frozen/train/teacher.grids.json", "frozen/benchmark/results.json"]
    files += [str(path) for path in Path("frozen/export").glob("*.onnx")]
    assert len(files) == 7
    for path in files:
        assert crqat("check", path).code == 0
    verdict = crqat("gate", "recipe.yaml", "--runs", ".")
    assert verdict.code == 0 and verdict.out.endswith("gate: PASS\n")
    assert crqat("compare", "frozen/benchmark/results.json").code == 0
    assert crqat("inspect", "frozen/benchmark/engine.json").code == 0
    assert crqat("report", "frozen", "--out", "report.html").code == 0
    assert crqat("bundle", "frozen", "--out", "new.tar.gz").code == 0
    (tmp_path / "unpacked").mkdir()
    assert bundle.unpack(Path("bundle.tar.gz"), tmp_path / "unpacked").run == "frozen"
    assert plan_file.load(Path("model.plan"), "tensorrt", "10.3.0", (8, 7))[0] == b"no real plan"
    images = np.load("frozen/export/images.npy").astype(np.float32)
    with OnnxRuntimeRunner(Path("frozen/export/onnxruntime.onnx"), "CPUExecutionProvider", 1) as runner:
        assert runner.infer(images).shape == (32, 10)
    again = crqat("export", "recipe.yaml", "--runs", ".", "--force")  # weights and Grids of then, exported now
    assert again.code == 0 and again.out.count("passed") == 2


# --- Damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def swap(path: Path) -> None:
    others = sorted(other.read_bytes() for other in path.parent.iterdir() if other.name != run_directory.MANIFEST)
    path.write_bytes(next(content for content in others if content != path.read_bytes()))


@pytest.mark.parametrize("damage", [flip, truncate, swap, Path.unlink])
def test_a_damaged_file_is_named_whichever_it_is(folder: Path, crqat: Crqat, damage: Callable[[Path], None]) -> None:
    files = [path for path in Path("frozen").rglob("*") if path.is_file() and path.name != run_directory.MANIFEST]
    assert len(files) == 18
    for path in files:
        content = path.read_bytes()
        damage(path)
        line = refusal(crqat("check", "frozen"))
        assert f"{path}: {'missing' if damage is Path.unlink else 'altered or damaged'}" in line
        path.write_bytes(content)
    assert crqat("check", "frozen").code == 0


@pytest.mark.parametrize("command", READING, ids=lambda command: command[0])
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_no_command_uses_a_damaged_file_or_leaves_one(
    folder: Path, crqat: Crqat, command: tuple[str, ...], damage: Callable[[Path], None]
) -> None:
    path = Path("frozen/export/onnxruntime.onnx")
    damage(path)
    before = tree(folder)
    assert str(path) in refusal(crqat(*command))
    assert tree(folder) == before


@pytest.mark.parametrize("command", READING, ids=lambda command: command[0])
def test_a_foreign_parent_is_named(folder: Path, crqat: Crqat, command: tuple[str, ...]) -> None:
    stage = "benchmark" if command[0] == "gate" else "export"
    path = Path("frozen", stage, "manifest.json")
    manifest = json.loads(path.read_text())
    manifest["parent"] = "0" * 64  # of another run
    path.write_text(json.dumps(manifest))
    before = tree(folder)
    assert f"frozen/{stage}: stale, made from an older" in refusal(crqat(*command))
    assert tree(folder) == before


@pytest.mark.parametrize("command", READING, ids=lambda command: command[0])
@pytest.mark.parametrize("change", [{"schema_version": 2}, {"stage": "\x1b[2J\nno stage"}, {"stage": 3}, {"files": 0}])
def test_a_manifest_of_another_version_or_of_nonsense_is_named(
    folder: Path, crqat: Crqat, command: tuple[str, ...], change: dict[str, Any]
) -> None:
    path = Path("frozen/export/manifest.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    before = tree(folder)
    assert ("frozen/export" if "stage" not in change else "frozen") in refusal(crqat(*command))
    assert tree(folder) == before


def test_results_and_engines_of_another_version_are_named(folder: Path, crqat: Crqat) -> None:
    for name, command in (("results.json", "compare"), ("results.json", "check"), ("engine.json", "inspect")):
        data = json.loads(Path("frozen/benchmark", name).read_text())
        data["schema_version"] = 2
        data.update({"engines": {"a": {"schema_version": 2}}} if name == "engine.json" else {})
        Path(name).write_text(json.dumps(data))
        line = refusal(crqat(command, name))
        assert name in line and "newer crqat with schema version 2" in line


# --- JSON ------------------------------------------------------------------------------------------------------------

BAD_JSON: dict[str, bytes] = {
    "deep": b"[" * 1_000_000,
    "deep objects": b'{"models":' * 200_000,
    "NaN": b'{"schema_version": 1, "models": NaN}',
    "infinite": b'{"schema_version": 1, "models": 1e999}',
    "a long number": b'{"schema_version": ' + b"9" * 100_000 + b"}",
    "half a surrogate": b'{"schema_version": "\\ud800"}',
    "not UTF-8": b'{"schema_version": "\xff"}',
    "nothing": b"",
    "zeros": b"\0" * 1000,
}


@pytest.mark.parametrize("kind", BAD_JSON)
def test_json_that_nobody_should_have_written(folder: Path, crqat: Crqat, kind: str) -> None:
    for name, command in (
        ("results.json", "check"),
        ("results.json", "compare"),
        ("a.grids.json", "check"),
        ("engine.json", "inspect"),
    ):
        Path(name).write_bytes(BAD_JSON[kind])
        assert name in refusal(crqat(command, name))
    Path("frozen/train/manifest.json").write_bytes(BAD_JSON[kind])
    assert "frozen/train/manifest.json" in refusal(crqat("check", "frozen"))


def test_a_large_json_file_is_refused_by_its_size(folder: Path, crqat: Crqat) -> None:
    with Path("results.json").open("wb") as file:
        file.truncate(2**33)  # sparse
    start = time.monotonic()
    line = refusal(crqat("compare", "results.json"))
    assert "results.json" in line and "larger than 64 MiB" in line
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("device",), "a text"),
        (("device", "jetson"), "a text"),
        (("models", "float.onnx", "accuracy", "top1"), "a text"),
        (("models", "float.onnx", "latency", "p50_ms"), [1]),
        (("models", "onnxruntime.onnx", "size_bytes"), {}),
        (("models", "onnxruntime.onnx", "versus_float", "drop_interval_points"), {}),
        (("models", "tensorrt.onnx", "engine", "counts"), 3),
        (("models", "tensorrt.onnx", "engine", "builder"), 3),
        (("models",), []),
    ],
)
def test_results_with_a_value_of_another_kind(folder: Path, crqat: Crqat, path: tuple[str, ...], value: object) -> None:
    file = folder / "frozen" / "benchmark" / "results.json"
    data = json.loads(file.read_text())
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    sealed(file.parent, "results.json", json.dumps(data).encode())
    for command in (("report", "frozen"), ("gate", "recipe.yaml", "--runs", "."), ("compare", file)):
        ended = crqat(*command)
        # What a command does not look at cannot disturb it; nothing ends in a traceback.
        assert ended.code == 0 or (ended.code == 2 and len(ended.errors) == 1 and "frozen" in ended.errors[0]), ended
    assert crqat("report", "frozen").code == 2


@pytest.mark.parametrize("stage", ["train", "export"])
def test_a_manifest_without_what_the_report_shows(folder: Path, crqat: Crqat, stage: str) -> None:
    for changed in staleness.STAGES:
        path = Path("frozen", changed, "manifest.json")
        manifest = json.loads(path.read_text())
        manifest["payload"] = {} if changed == stage else manifest["payload"]
        parent = staleness.PARENTS[changed]
        manifest["parent"] = parent and run_directory.manifest_hash(Path("frozen", parent))
        path.write_text(json.dumps(manifest))
    line = refusal(crqat("report", "frozen"))
    assert "frozen" in line and "damaged" in line
    assert not Path("report.html").exists()


# --- Recipes ---------------------------------------------------------------------------------------------------------

LAUGHS = "a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("command", ["run", "train", "gate", "check"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, "aliases are not allowed"),
        ("name: &x a\n<<: *x\n", "aliases are not allowed"),
        ("name: !!python/object/apply:os.system ['touch ran']\n", "is not allowed"),
        ("name: !!python/name:os.system\n", "is not allowed"),
        ("name: !own a\n", "is not allowed"),
        ("{" * 60_000, "nested too deeply"),
        (
            'name: "<script>\\n\\x1b[2J"\ndata: {source: digits}\nmodel: {name: cifar/resnet20}\nfloat: {}\n',
            "cannot name",
        ),
    ],
    ids=["bomb", "merge", "apply", "name", "own tag", "deep", "hostile name"],
)
def test_hostile_recipes(
    tmp_path: Path, crqat: Crqat, monkeypatch: pytest.MonkeyPatch, command: str, text: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bomb.yaml").write_text(text)
    start = time.monotonic()
    line = refusal(crqat(command, "bomb.yaml"))
    assert "bomb.yaml" in line and words in line
    assert time.monotonic() - start < 10
    assert list(Path().iterdir()) == [Path("bomb.yaml")]


def test_a_tag_in_an_option(folder: Path, crqat: Crqat) -> None:
    assert "--set qat" in refusal(
        crqat("train", "recipe.yaml", "--set", "qat=!!python/object/apply:os.system [touch ran]")
    )
    assert not Path("ran").exists()


def test_a_recipe_of_100_mb_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_bytes(b"name: a\n" * (100 * 2**20 // 8))
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_DATA, (2**29, 2**29))\n"
    code += "sys.argv = ['crqat', 'run', sys.argv[1]]; from crqat.pipeline.cli import main; main()"
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", code, path], cwd=ROOT / "src", capture_output=True, text=True, check=False
    )
    error = f"crqat: error: {path}: larger than 64 KiB, too large for a recipe\n"
    assert (result.returncode, result.stderr) == (2, error)
    assert time.monotonic() - start < 20


# --- Weights ---------------------------------------------------------------------------------------------------------


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin: int, end: int, shape: list[int]) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}}


LYING: dict[str, bytes] = {
    "header of 2^63 bytes": safetensors(tensor(0, 4, [1]), b"1234", 2**63),
    "header of 2^64 - 1 bytes": safetensors(tensor(0, 4, [1]), b"1234", 2**64 - 1),
    "header longer than the file": safetensors(tensor(0, 4, [1]), b"1234", 1000),
    "header shorter than it is": safetensors(tensor(0, 4, [1]), b"1234", 5),
    "tensor beyond the end": safetensors(tensor(0, 2**40, [2**38]), b"1234"),
    "shape larger than its bytes": safetensors(tensor(0, 4, [2**40]), b"1234"),
    "shape that overflows": safetensors(tensor(0, 4, [2**62, 4, 4]), b"1234"),
    "end before its beginning": safetensors(tensor(4, 0, [1]), b"1234"),
    "bytes that no tensor has": safetensors(tensor(0, 4, [1]), b"12345678"),
    "tensors over each other": safetensors({**tensor(0, 4, [1]), "v": tensor(0, 4, [1])["w"]}, b"1234"),
    "deep header": safetensors(b"[" * 1_000_000),
    "empty header": safetensors(b""),
}


def train_with(crqat: Crqat, weights: str) -> Ended:
    return crqat("train", "recipe.yaml", "--runs", "new", "--set", f"model.weights={weights}")


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "bare.pth"])
def test_weights_that_call_a_function_end_the_training(folder: Path, crqat: Crqat, name: str) -> None:
    import torch

    if name == "bare.pth":
        Path(name).write_bytes(pickle.dumps(Hostile("ran")))
    else:
        torch.save({"state_dict": Hostile("ran")}, name)
    line = refusal(train_with(crqat, name))
    assert name in line and "needs code to load" in line
    assert not Path("ran").exists()
    assert left_in("new") == []


@pytest.mark.parametrize("kind", LYING)
def test_safetensors_that_lie_end_the_training(folder: Path, crqat: Crqat, kind: str) -> None:
    Path("w.safetensors").write_bytes(LYING[kind])
    line = refusal(train_with(crqat, "w.safetensors"))
    assert "w.safetensors" in line and "is damaged or not a file of tensors" in line
    assert left_in("new") == []


# --- ONNX ------------------------------------------------------------------------------------------------------------


def network(weight: onnx.TensorProto, *nodes: onnx.NodeProto, shape: Sequence[str | int] = ("batch", 1, 8, 8)) -> bytes:
    """A network that loads but for what is wrong with `weight`, [64, 10], or with `nodes` in front of the last."""
    graph = helper.make_graph(
        [
            *nodes,
            helper.make_node("Flatten", ["input"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["logits"]),
        ],
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    preprocessing = json.dumps({"mean": [0.3], "std": [0.4]})
    helper.set_model_props(model, {"crqat.preprocessing": preprocessing, "crqat.target": "onnxruntime"})
    content: bytes = model.SerializeToString()
    return content


def weight() -> onnx.TensorProto:
    return numpy_helper.from_array(np.ones((64, 10), np.float32), "w")


def external(location: str) -> bytes:
    made = weight()
    made.ClearField("raw_data")
    made.data_location = TensorProto.EXTERNAL
    made.external_data.add(key="location", value=location)
    return network(made)


def lying(shape: list[int]) -> bytes:
    made = weight()
    made.dims[:] = shape
    return network(made)


def filled(*shape: int) -> bytes:
    """Makes a tensor of `shape` at run time; the file has a few hundred bytes."""
    dims = helper.make_node("Constant", [], ["dims"], value=numpy_helper.from_array(np.array(shape, np.int64)))
    fill = helper.make_node("ConstantOfShape", ["dims"], ["large"])
    total = helper.make_node("ReduceSum", ["large"], ["total"], keepdims=0)
    return network(weight(), dims, fill, total)


TERABYTES = 2**20, 2**20, 4


def hostile_onnx() -> dict[str, tuple[bytes, str]]:
    return {
        "external": (external("weights.bin"), "external data is refused"),
        "external, up": (external("../../secret"), "external data is refused"),
        "external, absolute": (external("/etc/hostname"), "external data is refused"),
        "terabytes claimed": (lying([2**20, 2**21]), "claims 1048576 x 2097152 and has 2560 bytes"),
        "a little more claimed": (lying([64, 11]), "claims 64 x 11 and has 2560 bytes"),
        "terabytes filled": (filled(*TERABYTES), "the tensor large has the shape 1048576 x 1048576 x 4"),
        "terabytes in": (network(weight(), shape=(1, 1, 2**21, 2**21)), "the tensor input has the shape"),
        "truncated": (network(weight())[:-9], "not an ONNX file, or a truncated one"),
    }


@pytest.mark.parametrize("kind", hostile_onnx())
def test_hostile_onnx_files_are_refused_before_a_runtime_sees_them(folder: Path, crqat: Crqat, kind: str) -> None:
    content, words = hostile_onnx()[kind]
    Path("weights.bin").write_bytes(np.ones((64, 10), np.float32).tobytes())
    shutil.copy("weights.bin", "../secret")
    Path("hostile.onnx").write_bytes(content)
    before = tree(folder)
    for command in (("check",), ("inspect", "--bisect", "--out", "engine.json")):
        line = refusal(crqat(*command, "hostile.onnx"))
        assert "hostile.onnx" in line and words in line
    assert tree(folder) == before


@pytest.mark.parametrize("kind", ["external", "external, up", "external, absolute"])
def test_external_data_is_refused_by_the_benchmark(folder: Path, crqat: Crqat, kind: str) -> None:
    export = folder / "frozen" / "export"
    (export / "weights.bin").write_bytes(np.ones((64, 10), np.float32).tobytes())
    sealed(export, "onnxruntime.onnx", hostile_onnx()[kind][0])
    line = refusal(crqat("benchmark", "recipe.yaml", "--runs", ".", "--force"))
    assert "onnxruntime.onnx" in line and "external data is refused" in line
    board = [sys.executable, "-m", "crqat.runtime_eval", str(export)]
    result = subprocess.run(board, cwd=ROOT / "src", capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "onnxruntime.onnx: the tensor w is stored in another file" in result.stderr


@pytest.fixture
def _no_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines are not what these tests are about, and take seconds."""
    monkeypatch.setattr(tensorrt_api, "choose", lambda: None)


@pytest.mark.usefixtures("_no_builder")
def test_a_shape_of_terabytes_costs_its_own_process_alone(folder: Path, crqat: Crqat) -> None:
    sealed(folder / "frozen" / "export", "onnxruntime.onnx", filled(*TERABYTES))
    benchmark = crqat("benchmark", "recipe.yaml", "--runs", ".", "--force")
    assert benchmark.code == 0
    models = json.loads(Path("frozen/benchmark/results.json").read_text())["models"]
    assert models["onnxruntime.onnx"]["status"].startswith("failed: onnxruntime.onnx in onnxruntime: ")
    assert {models[name]["status"] for name in ("float.onnx", "tensorrt.onnx")} == {"measured"}
    gate = crqat("gate", "recipe.yaml", "--runs", ".")
    assert gate.code == 3
    assert "onnxruntime.onnx" in gate.out


# --- A runtime that dies or hangs ------------------------------------------------------------------------------------

TROUBLE = """
import os, sys, time
words = sys.orig_argv
if "crqat.runtime_eval.measure.worker" in words and any(word.endswith("/onnxruntime.onnx") for word in words):
    import onnxruntime
    onnxruntime.InferenceSession.run = lambda *_, **__: {action}
"""


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("os.abort()", "its process was ended by SIGABRT"),
        ("time.sleep(1000)", "no answer for 3 s, considered hung and killed"),
    ],
    ids=["aborts", "hangs"],
)
@pytest.mark.usefixtures("_no_builder")
def test_a_runtime_that_aborts_or_hangs_costs_one_model_and_the_gate_ends_with_3(
    folder: Path, tmp_path: Path, crqat: Crqat, monkeypatch: pytest.MonkeyPatch, action: str, words: str
) -> None:
    (tmp_path / "trouble").mkdir()
    (tmp_path / "trouble" / "sitecustomize.py").write_text(TROUBLE.format(action=action))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "trouble"))
    limited = ("recipe.yaml", "--runs", ".", "--set", "benchmark.time_limit_seconds=3")
    start = time.monotonic()
    benchmark = crqat("benchmark", *limited)
    assert benchmark.code == 0
    assert time.monotonic() - start < 60
    models = json.loads(Path("frozen/benchmark/results.json").read_text())["models"]
    assert models["onnxruntime.onnx"]["status"].startswith(f"failed: onnxruntime.onnx in onnxruntime: {words}")
    assert {models[name]["status"] for name in ("float.onnx", "tensorrt.onnx")} == {"measured"}
    gate = crqat("gate", *limited)
    assert gate.code == 3
    assert f"onnxruntime.onnx  measurement: failed: onnxruntime.onnx in onnxruntime: {words}" in gate.out


# --- Images ----------------------------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """A real PNG of black pixels, one bit each, compressed a thousandfold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    line = b"\0" * (1 + -(-width // 8))
    rows = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def bomb() -> bytes:
    made = png(12_000, 12_000)
    assert len(made) < 50_000
    return made


def test_an_image_bomb_in_a_folder_ends_the_training(
    tmp_path: Path, crqat: Crqat, monkeypatch: pytest.MonkeyPatch, bomb: bytes
) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    for part in ("train", "test"):
        for number, name in enumerate(("<b>a</b>\n", "b'\"\x1b[2J")):
            path = Path("images", part, name, "ok.png")
            path.parent.mkdir(parents=True)
            Image.new("RGB", (16, 16), (number, len(part), 0)).save(path)
    path = Path("images", "train", "<b>a</b>\n", "bomb.png")
    path.write_bytes(bomb)
    Path("recipe.yaml").write_text(
        "name: bomb\ndata: {source: imagefolder, root: images, size: 16, crop: 16, convert: true}\n"
        "model: {name: cifar/resnet20}\nfloat: {epochs: 1}\n"
    )
    assert "bomb.png: 12000 x 12000 pixels; images above 64 megapixels are refused" in refusal(
        crqat("train", "recipe.yaml")
    )
    assert left_in("runs") == []


def test_an_image_bomb_ends_the_example(folder: Path, bomb: bytes) -> None:
    Path("bomb.png").write_bytes(bomb)
    example = [sys.executable, str(ROOT / "docs" / "classify_jpeg.py"), "frozen/export/onnxruntime.onnx", "bomb.png"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(example, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "bomb.png: 12000 x 12000 pixels; images above 64 megapixels are refused\n"
