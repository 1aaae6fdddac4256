"""`crqat check`: what it recognizes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from crqat.core import run_directory
from crqat.core.errors import UsageError
from crqat.core.grid import Grid, grids_hash, save_grids
from crqat.core.progress import quiet
from crqat.pipeline.commands.check import check
from crqat.pipeline.recipe import recipe
from crqat.pipeline.stages import run as stages
from crqat.pipeline.stages import staleness

if TYPE_CHECKING:
    from tests.pipeline.conftest import Fakes

RUN = Path("runs/run1")


def make_run(fakes: Fakes) -> None:
    config = recipe.load(fakes.recipe)
    for stage in (stages.train, stages.export, stages.benchmark):
        stage(config, Path("runs"), False, quiet)


def model(weight: onnx.TensorProto | None = None) -> onnx.ModelProto:
    weight = weight or numpy_helper.from_array(np.ones(4, dtype=np.float32), "w")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", value[:1], value[1:], [weight])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(made, {"crqat.run": "run1", "escape": "\x1b[2J"})
    return made


def test_run_directory(fakes: Fakes) -> None:
    make_run(fakes)
    lines = check(RUN)
    assert [line.split(",")[0] for line in lines] == [f"{RUN / stage}: stage {stage}" for stage in staleness.STAGES]
    assert check(RUN / "export") == [lines[1]]


def test_boards_are_part_of_a_run(fakes: Fakes) -> None:
    make_run(fakes)
    with run_directory.write_stage(
        RUN, run_directory.Manifest("benchmark@orin", "k", run_directory.manifest_hash(RUN / "export"), {}, {})
    ):
        pass
    assert check(RUN)[-2].startswith(f"{RUN / 'benchmark@orin'}: stage benchmark@orin, ")
    assert check(RUN)[-1].startswith(f"{RUN / 'benchmark@orin'}: made by an older crqat that did not record")


def test_altered_run_directory(fakes: Fakes) -> None:
    make_run(fakes)
    (RUN / "export" / "float.onnx").write_text("altered")
    with pytest.raises(UsageError, match=r"float\.onnx: altered"):
        check(RUN)


def test_stale_run_directory(fakes: Fakes) -> None:
    make_run(fakes)
    fakes.content = "other bits"
    stages.train(recipe.load(fakes.recipe), Path("runs"), True, quiet)
    with pytest.raises(UsageError, match="run1/export: stale"):
        check(RUN)


def test_stage_under_another_name(fakes: Fakes) -> None:
    make_run(fakes)
    (RUN / "benchmark").unlink()
    (RUN / "benchmark").symlink_to((RUN / "train").resolve())
    with pytest.raises(UsageError, match="its manifest is of the stage train"):
        check(RUN)


def test_files_that_are_fine(tmp_path: Path, fakes: Fakes) -> None:
    grids = {"x": Grid(np.array([0.5], dtype=np.float32), 0, -127, 127)}
    save_grids(tmp_path / "grids.json", grids)
    assert check(tmp_path / "grids.json") == [f"{tmp_path}/grids.json: 1 Grids, hash {grids_hash(grids)}"]
    (tmp_path / "results.json").write_text(json.dumps(fakes.results))
    assert check(tmp_path / "results.json")[1].endswith("float.onnx: float, measured")
    assert check(fakes.recipe, syntax=True) == ["recipe.yaml: recipe run1 is valid, for onnxruntime, tensorrt"]
    path = tmp_path / "m.onnx"
    onnx.save(model(), path)
    assert check(path) == [
        f"{path}: ONNX opset 17, 1 nodes, 0 QuantizeLinear, 0 DequantizeLinear",
        f"{path}: crqat.run: run1",
        f"{path}: escape: ?[2J",
    ]


def test_file_of_a_stage_is_compared_with_its_manifest(fakes: Fakes) -> None:
    make_run(fakes)
    path = RUN / "benchmark" / "results.json"
    assert check(path)[-1] == f"{path}: matches the manifest next to it"
    path.write_text(json.dumps(fakes.results))
    with pytest.raises(UsageError, match=r"results\.json: altered"):
        check(path)


@pytest.mark.parametrize("place", ["initializer", "constant"])
def test_external_data_is_refused(tmp_path: Path, place: str) -> None:
    weight = numpy_helper.from_array(np.ones(4, dtype=np.float32), "w")
    made = model()
    tensor = made.graph.initializer[0]
    if place == "constant":
        made.graph.ClearField("initializer")
        made.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=weight))
        tensor = made.graph.node[0].attribute[0].t
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    path = tmp_path / "m.onnx"
    path.write_bytes(made.SerializeToString())
    with pytest.raises(UsageError, match="the tensor w lies in another file; external data is refused"):
        check(path)


def test_broken_onnx_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(model().SerializeToString()[:-7])
    with pytest.raises(UsageError, match="truncated"):
        check(path)
    made = model()
    made.graph.node[0].input[1] = "nowhere"
    path.write_bytes(made.SerializeToString())
    with pytest.raises(UsageError, match="breaks ONNX's rules"):
        check(path)
    path.write_bytes(b"")
    with pytest.raises(UsageError, match="breaks ONNX's rules"):
        check(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.onnx", "no such file"), ("", "none of train"), ("a.txt", "not a run directory"), ("grids.json", "Grids")],
)
def test_what_it_does_not_know_is_refused(tmp_path: Path, name: str, message: str) -> None:
    for file in ("a.txt", "grids.json"):
        (tmp_path / file).touch()
    with pytest.raises(UsageError, match=message):
        check(tmp_path / name)


@pytest.mark.parametrize("place", ["node", "graph", "metadata"])
def test_names_that_are_no_text_are_refused(tmp_path: Path, place: str) -> None:
    made, name = model(), "a name to change"
    if place == "metadata":
        helper.set_model_props(made, {name: "x"})
    else:
        (made.graph.node[0] if place == "node" else made.graph).name = name
    path = tmp_path / "m.onnx"
    path.write_bytes(made.SerializeToString().replace(name.encode(), b"a name \xff\xff change"))
    with pytest.raises(UsageError, match=r"m\.onnx: a name in it is not UTF-8"):
        check(path)


def test_bytes_of_the_file_in_the_checkers_words(tmp_path: Path) -> None:
    made = model()
    made.graph.node[0].attribute.append(helper.make_attribute("a", b"x" * 4))
    path = tmp_path / "m.onnx"
    path.write_bytes(made.SerializeToString().replace(b"xxxx", b"\xff" * 4))
    with pytest.raises(UsageError, match="breaks ONNX's rules"):
        check(path)
