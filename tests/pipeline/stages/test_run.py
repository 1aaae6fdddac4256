"""When a stage runs, when it does not, and what it refuses to build on."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from crqat.core.errors import CrqatError, UsageError
from crqat.core.progress import quiet
from crqat.core.results.benchmark import Results, Settings, read_results
from crqat.core.results.engine import BuildError
from crqat.core.results.training import TrainingPayload
from crqat.core.run_directory import manifest_hash, read_manifest, verify_stage
from crqat.core.typed_json import from_json, to_json
from crqat.pipeline.commands.check import check
from crqat.pipeline.recipe import recipe
from crqat.pipeline.stages import boards, staleness
from crqat.pipeline.stages import run as stages
from crqat.runtime_eval.board import bundle, ssh
from crqat.runtime_eval.board.ssh import Board
from crqat.runtime_eval.trt import versions as tensorrt_api
from crqat.runtime_eval.trt.engine import EngineOptions, Found, report_of

if TYPE_CHECKING:
    from tests.pipeline.conftest import Fakes

RUNS = Path("runs")
RUN = RUNS / "run1"


def go(fakes: Fakes, *overrides: str, only: Sequence[str] = staleness.STAGES, force: bool = False) -> list[str]:
    """Run stages and return the names of those that were not up to date."""
    fakes.calls.clear()
    config = recipe.load(fakes.recipe, overrides)
    for stage in only:
        assert getattr(stages, stage)(config, RUNS, force, quiet) == RUN / stage
    return list(fakes.calls)


def gate(fakes: Fakes, *overrides: str) -> list[str]:
    return [verdict.status for verdict in stages.gate(recipe.load(fakes.recipe, overrides), RUNS)]


def test_stages_follow_each_other_and_run_once(fakes: Fakes, capsys: pytest.CaptureFixture[str]) -> None:
    assert go(fakes) == ["train", "export", "benchmark"]
    assert capsys.readouterr().err == ""
    hashes = [manifest_hash(RUN / stage) for stage in staleness.STAGES]
    assert go(fakes) == []
    assert capsys.readouterr().err == "train is up to date\nexport is up to date\nbenchmark is up to date\n"
    assert hashes == [manifest_hash(RUN / stage) for stage in staleness.STAGES]
    assert [read_manifest(RUN / stage).parent for stage in staleness.STAGES] == [None, *hashes[:2]]


def test_manifest_says_what_the_result_depends_on(fakes: Fakes) -> None:
    go(fakes, "seed=7")
    for stage in staleness.STAGES:
        manifest = verify_stage(RUN / stage)
        assert manifest.config == recipe.resolved(recipe.load(fakes.recipe, ["seed=7"]))
        assert manifest.environment["seed"] == 7
        assert {"crqat-edge", "torch", "onnx", "nncf", "numpy", "python"} <= manifest.environment["versions"].keys()
        assert manifest.environment["git_revision"] == "unknown"
        assert "device" in manifest.environment
    assert (RUN / "benchmark" / "junit.xml").read_text().startswith("<testsuite")
    assert read_results(RUN / "benchmark" / "results.json") == from_json(Results, fakes.results)


@pytest.mark.parametrize(
    ("override", "rebuilt"),
    [
        ("seed=1", ["train", "export", "benchmark"]),
        ("qat.epochs=1", ["train", "export", "benchmark"]),
        ("float.epochs=2", ["train", "export", "benchmark"]),
        ("export.verify_images=2", ["export", "benchmark"]),
        ("benchmark.threads=2", ["benchmark"]),
        ("gate.max_accuracy_drop=2", []),
    ],
)
def test_change_rebuilds_what_depends_on_it(fakes: Fakes, override: str, rebuilt: list[str]) -> None:
    go(fakes)
    assert go(fakes, override) == rebuilt
    assert go(fakes, override) == []


def test_an_unsafe_export_is_another_one_than_a_safe_one(fakes: Fakes) -> None:
    config = recipe.load(fakes.recipe, [])

    def unsafe() -> list[str]:
        fakes.calls.clear()
        stages.export(config, RUNS, False, quiet, unsafe=True)
        return list(fakes.calls)

    go(fakes)
    assert unsafe() == ["export"]
    assert unsafe() == []
    assert go(fakes, only=["benchmark"]) == ["benchmark"]
    assert read_manifest(RUN / "export").payload["models"][1]["findings"] == ["conv1: a rule; a fix"]
    assert go(fakes) == ["export", "benchmark"]


def test_engines_go_into_a_file_of_their_own(fakes: Fakes) -> None:
    go(fakes)
    assert not (RUN / "benchmark" / "engine.json").exists()
    before = (RUN / "benchmark" / "results.json").read_text()
    report = report_of(fakes.recipe, EngineOptions(), "tensorrt", Found(failure=BuildError("parse")))
    fakes.results["engines"] = {"tensorrt.onnx": to_json(report)}
    go(fakes, only=["benchmark"], force=True)
    assert (RUN / "benchmark" / "results.json").read_text() == before
    engines = json.loads((RUN / "benchmark" / "engine.json").read_text())
    assert engines == {"schema_version": 1, "engines": {"tensorrt.onnx": to_json(report)}}
    assert "engine.json" in read_manifest(RUN / "benchmark").files


def test_a_builder_that_has_come_makes_export_and_benchmark_stale(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_api, "choose", lambda: None)
    go(fakes)
    assert go(fakes) == []
    monkeypatch.setattr(tensorrt_api, "choose", lambda: "tensorrt_rtx")
    monkeypatch.setattr(tensorrt_api, "installed", lambda name: "1.7")
    assert go(fakes) == ["export", "benchmark"]
    assert go(fakes) == []


def test_every_key_of_a_recipe_belongs_to_a_stage_or_to_the_gate(fakes: Fakes) -> None:
    owned = {key for keys in staleness.KEYS.values() for key in keys}
    assert owned | {"gate", "tracker"} == set(recipe.top_level_keys())  # the tracker only shows what stages make


def test_force_rebuilds(fakes: Fakes) -> None:
    go(fakes)
    assert go(fakes, only=["train"], force=True) == ["train"]


def test_benchmark_of_another_machine_is_not_up_to_date(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    go(fakes)
    monkeypatch.setattr("platform.node", lambda: "another")
    assert go(fakes) == ["benchmark"]


def test_changed_input_files_rebuild(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("w.pth").write_text("1")
    Path("mine").mkdir()
    Path("mine/nets.py").write_text("raise SystemExit('must not be imported to be hashed')\n")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    overrides = ["model.weights=w.pth", "model.name=mine.nets:build"]
    assert go(fakes, *overrides, only=["train"]) == ["train"]
    assert go(fakes, *overrides, only=["train"]) == []
    Path("w.pth").write_text("2")
    assert go(fakes, *overrides, only=["train"]) == ["train"]
    Path("mine/nets.py").write_text("# another\n")
    assert go(fakes, *overrides, only=["train"]) == ["train"]


def test_a_changed_checkpoint_of_nncf_trains_anew(fakes: Fakes) -> None:
    with pytest.raises(UsageError, match=r"start: no such folder, or nothing in it \(model\.nncf\)"):
        go(fakes, "model.nncf=start", only=["train"])
    Path("start").mkdir()
    Path("start/model.safetensors").write_text("1")
    assert go(fakes, "model.nncf=start", only=["train"]) == ["train"]
    assert go(fakes, "model.nncf=start", only=["train"]) == []
    Path("start/nncf_config.json").write_text("{}")
    assert go(fakes, "model.nncf=start", only=["train"]) == ["train"]


def test_openvino_that_was_installed_since_measures_anew(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = metadata.version

    def version(name: str) -> str:
        if name == "openvino":
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    with monkeypatch.context() as without:
        without.setattr(metadata, "version", version)
        go(fakes, "benchmark.openvino=true")
        assert go(fakes, "benchmark.openvino=true") == []
    with_it = {"openvino": "2026.4.1"}
    monkeypatch.setattr(metadata, "version", lambda name: with_it.get(name) or installed(name))
    assert go(fakes, "benchmark.openvino=true") == ["benchmark"]


def test_missing_weights_are_named(fakes: Fakes) -> None:
    with pytest.raises(UsageError, match=r"none\.pth: no such weights file \(model\.weights"):
        go(fakes, "model.weights=none.pth", only=["train"])
    assert not RUNS.exists()


@pytest.mark.parametrize("trouble", [CrqatError("loss is NaN"), KeyboardInterrupt(), RuntimeError("a bug")])
def test_trouble_leaves_what_was_current(fakes: Fakes, trouble: BaseException) -> None:
    go(fakes)
    before = {path.name for path in RUN.iterdir()}
    fakes.trouble["train"] = trouble
    with pytest.raises(type(trouble)):
        go(fakes, "seed=1")
    assert fakes.calls == ["train"]
    assert {path.name for path in RUN.iterdir()} == before
    assert read_manifest(RUN / "train").environment["seed"] == 0


def test_stages_need_the_one_before(fakes: Fakes) -> None:
    for stage, parent in (("export", "train"), ("benchmark", "export")):
        with pytest.raises(UsageError, match=rf"run1/{parent}: no such stage yet; run it first \(crqat {parent}"):
            go(fakes, only=[stage])
    with pytest.raises(UsageError, match="run1/benchmark: no such stage yet"):
        gate(fakes)


def test_stage_of_another_recipe_is_not_built_on(fakes: Fakes) -> None:
    go(fakes)
    message = "run1/train: made with another `qat` than this recipe's; run `crqat train RECIPE` first"
    with pytest.raises(UsageError, match=message):
        go(fakes, "qat.epochs=1", only=["export"])
    with pytest.raises(UsageError, match=message):
        go(fakes, "qat.epochs=1", only=["benchmark"])
    with pytest.raises(UsageError, match=message):
        gate(fakes, "qat.epochs=1")
    with pytest.raises(UsageError, match="run1/benchmark: made with another `benchmark`"):
        gate(fakes, "benchmark.threads=2")


def test_a_run_from_before_a_key_was_added_is_built_on_where_the_key_is_at_its_default(fakes: Fakes) -> None:
    go(fakes)
    manifest = Path("runs") / "run1" / "train" / "manifest.json"
    values = json.loads(manifest.read_text())
    del values["config"]["qat"]["damping"]
    manifest.write_text(json.dumps(values))
    go(fakes, only=["export"])
    with pytest.raises(UsageError, match="run1/train: made with another `qat` than this recipe's"):
        go(fakes, "qat.damping=0.1", only=["export"])


def test_gate_refuses_results_of_an_older_export(fakes: Fakes) -> None:
    go(fakes)
    go(fakes, only=["export"], force=True)
    assert "fail" not in gate(fakes), "the same files again are not another export"
    fakes.content = "other bits"
    go(fakes, only=["export"], force=True)
    with pytest.raises(UsageError, match="run1/benchmark: stale, made from an older export"):
        gate(fakes)
    go(fakes)
    assert "fail" not in gate(fakes)
    fakes.content = "still other bits"
    go(fakes, only=["train"], force=True)
    with pytest.raises(UsageError, match="run1/export: stale, made from an older train"):
        gate(fakes)


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        ("train", "teacher.grids.json"),
        ("export", "float.onnx"),
        ("benchmark", "results.json"),
        ("benchmark", "manifest.json"),
    ],
)
def test_damage_is_named_and_force_repairs_it(fakes: Fakes, stage: str, file: str) -> None:
    go(fakes)
    path = RUN / stage / file
    path.write_text(path.read_text()[:-1])
    with pytest.raises(UsageError, match=rf"{file}: (altered or )?damaged.*--force"):
        go(fakes)
    with pytest.raises(UsageError, match=rf"{file}: (altered or )?damaged"):
        gate(fakes)
    assert go(fakes, only=[stage], force=True) == [stage]
    go(fakes)
    assert "fail" not in gate(fakes)


def test_gate_judges_anew_after_a_limit_changed(fakes: Fakes) -> None:
    go(fakes)
    assert "fail" not in gate(fakes)
    untouched = manifest_hash(RUN / "benchmark")
    gate(fakes)
    assert manifest_hash(RUN / "benchmark") == untouched
    assert "fail" in gate(fakes, "gate.max_accuracy_drop=0.01")
    assert "<failure" in (RUN / "benchmark" / "junit.xml").read_text()
    assert verify_stage(RUN / "benchmark").key
    assert "fail" not in gate(fakes)
    assert "<failure" not in (RUN / "benchmark" / "junit.xml").read_text()
    assert go(fakes) == []


def test_run_copied_without_links_still_works(fakes: Fakes, tmp_path: Path) -> None:
    go(fakes)
    shutil.copytree(RUN, tmp_path / "copy")
    for path in (tmp_path / "copy").iterdir():
        if path.name.startswith("."):
            shutil.rmtree(path)
    shutil.rmtree(RUN)
    shutil.copytree(tmp_path / "copy", RUN)
    assert go(fakes) == []
    assert "fail" not in gate(fakes)
    assert go(fakes, "seed=1") == ["train", "export", "benchmark"]


def test_numbers_that_json_does_not_know_are_not_written(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    go(fakes)
    before = manifest_hash(RUN / "benchmark")
    results = replace(from_json(Results, fakes.results), config=Settings(1, warm_up_seconds=float("nan")))
    monkeypatch.setattr(sys.modules["crqat.runtime_eval.benchmark"], "benchmark", lambda *_: results)
    with pytest.raises(ValueError, match="not JSON compliant"):
        go(fakes, only=["benchmark"], force=True)
    assert manifest_hash(RUN / "benchmark") == before


@dataclass
class FakeBoard:
    """What `crqat.runtime_eval.board.ssh` was asked for, and the results that it has."""

    results: dict[str, Any]
    calls: list[Any] = field(default_factory=list)

    def measure(self, board: Any, bundle: Any, paths: Any, anew: bool, progress: Any) -> Results:
        self.calls.append(("measure", bundle.benchmark["threads"], anew))
        return from_json(Results, {**self.results, "bundle": bundle.sha256})

    def clean(self, board: Any, bundle: Any, progress: Any) -> None:
        self.calls.append(("clean", bundle.benchmark["threads"]))


def test_boards_have_stages_of_their_own(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    go(fakes)
    untouched = manifest_hash(RUN / "benchmark")
    fake = FakeBoard(fakes.results)
    monkeypatch.setattr(ssh, "measure", fake.measure)
    monkeypatch.setattr(ssh, "clean", fake.clean)
    orin, other = Board.parse("ssh://me@orin"), Board.parse("ssh://orin:2222")

    def measured(board: Board, *overrides: str, force: bool = False, clean: bool = False) -> list[Any]:
        fake.calls.clear()
        config = recipe.load(fakes.recipe, overrides)
        directory = boards.benchmark_on(board, config, RUNS, force, quiet, clean)
        assert directory == RUN / boards.stage_of(board)
        return list(fake.calls)

    assert measured(orin) == [("measure", 1, False)]
    assert measured(orin) == []
    assert measured(other) == [("measure", 1, False)]
    assert measured(orin, "benchmark.threads=2") == [("measure", 2, False)]
    assert measured(orin, force=True, clean=True) == [("measure", 1, True), ("clean", 1)]
    assert measured(orin, clean=True) == [("clean", 1)]
    assert measured(Board.parse("ssh://orin", python="venv/bin/python")) == [("measure", 1, False)]
    assert [boards.stage_of(board) for board in (None, orin, other)] == [
        "benchmark",
        "benchmark@orin",
        "benchmark@orin_2222",
    ]
    manifest = verify_stage(RUN / "benchmark@orin")
    assert (manifest.payload["on"], manifest.parent) == ("ssh://orin", manifest_hash(RUN / "export"))
    assert (RUN / "benchmark@orin" / "junit.xml").read_text().startswith("<testsuite")
    assert manifest_hash(RUN / "benchmark") == untouched
    # The report has this machine and the other board beside it.
    assert "2 other devices" in (RUN / "benchmark@orin" / "report.html").read_text()

    config = recipe.load(fakes.recipe, ["gate.max_accuracy_drop=0.01"])
    assert "fail" in {verdict.status for verdict in stages.gate(config, RUNS, "benchmark@orin")}
    assert "<failure" in (RUN / "benchmark@orin" / "junit.xml").read_text()
    assert "<failure" not in (RUN / "benchmark" / "junit.xml").read_text()
    go(fakes, "export.verify_images=2", only=["export"])
    changed = recipe.load(fakes.recipe, ["export.verify_images=2"])
    with pytest.raises(UsageError, match=r"benchmark@orin: stale, .*`crqat benchmark RECIPE --on ssh://HOST` again"):
        stages.gate(changed, RUNS, "benchmark@orin")


def test_a_bundle_is_of_the_export_as_it_was_made(fakes: Fakes) -> None:
    go(fakes, "benchmark.threads=3", only=["train", "export"])
    archive, digest, how = boards.bundle(RUN, None)
    assert how["threads"] == 3
    assert archive == Path("run1-bundle.tar.gz")
    Path("out").mkdir()
    made = bundle.unpack(archive, Path("out"))
    assert (made.sha256, made.run, made.benchmark["threads"]) == (digest, "run1", 3)
    assert verify_stage(Path("out/export")) == verify_stage(RUN / "export")
    fakes.content = "other bits"
    go(fakes, only=["train"], force=True)
    with pytest.raises(UsageError, match="run1/export: stale"):
        boards.bundle(RUN, None)


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Have other versions of distributions than are installed."""
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name) or installed(name))


@pytest.mark.parametrize(
    ("library", "first"),
    [
        ("torch", "train"),
        ("nncf", "train"),
        ("scikit-learn", "train"),
        ("onnx", "export"),
        ("onnxruntime", "export"),
        ("timm", None),
        ("torchvision", None),
    ],
)
def test_another_version_makes_the_stages_that_use_it_again(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], library: str, first: str | None
) -> None:
    go(fakes)
    change = f"{library} {metadata.version(library)} -> 0.0.1"
    pretend(monkeypatch, **{library: "0.0.1"})
    if first is None:
        assert go(fakes) == []
    else:
        with pytest.raises(UsageError, match=f": stale, since {change}; run `crqat"):
            gate(fakes)
        capsys.readouterr()
        assert go(fakes) == list(staleness.STAGES[staleness.STAGES.index(first) :])
        assert f"{first}: runs again, since {change}\n" in capsys.readouterr().err
    assert "fail" not in gate(fakes)


def test_another_runtime_makes_a_benchmark_again(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    go(fakes)
    change = f"onnxruntime {metadata.version('onnxruntime')} -> 1.23.2"
    pretend(monkeypatch, onnxruntime="1.23.2")
    go(fakes)
    assert capsys.readouterr().err.splitlines() == [
        "train is up to date",
        f"export: runs again, since {change}",
        f"benchmark: runs again, since export was made again, {change}",
    ]


@pytest.mark.parametrize(
    ("network", "library"), [("timm/resnet18", "timm"), ("torchvision/resnet18", "torchvision"), ("own:build", "timm")]
)
def test_libraries_that_a_recipe_brings_in_count(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, network: str, library: str
) -> None:
    Path("own.py").write_text("import timm\n")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    train = partial(go, fakes, f"model.name={network}", only=["train"])
    assert train() == ["train"]
    pretend(monkeypatch, **{library: "0.0.1"})
    assert train() == ["train"]
    assert train() == []


def test_versions_of_another_machine_are_not_this_ones(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    go(fakes)
    monkeypatch.setattr("platform.node", lambda: "another")
    pretend(monkeypatch, torch="0.0.1", onnxruntime="0.0.1")
    assert "fail" not in gate(fakes)


def test_a_run_that_does_not_say_what_it_depends_on_is_made_again(
    fakes: Fakes, capsys: pytest.CaptureFixture[str]
) -> None:
    go(fakes)
    manifest = RUN / "train" / "manifest.json"
    values = json.loads(manifest.read_text())
    del values["inputs"]
    manifest.write_text(json.dumps({**values, "key": "of the older version"}))
    capsys.readouterr()
    go(fakes, only=["export", "benchmark"])
    assert f"{RUN / 'train'}: made by an older crqat that did not record the versions" in capsys.readouterr().err
    assert check(RUN)[1].startswith(f"{RUN / 'train'}: made by an older crqat that did not record the versions")
    assert go(fakes, only=["train"]) == ["train"]
    said = capsys.readouterr().err
    assert said.startswith("train: runs again, since it was made by an older crqat that did not record")


def test_what_changed_is_said_before_anything_begins(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    go(fakes)
    capsys.readouterr()
    said: list[str] = []
    config = recipe.load(fakes.recipe, ["qat.epochs=3", "model.accuracy=0.9"])
    stages.train(config, RUNS, False, quiet, begin=lambda: said.append(capsys.readouterr().err))
    assert said == ["train: runs again, since qat.epochs 10 -> 3\n"]
    go(fakes, "qat.epochs=3", only=["train"], force=True)
    assert capsys.readouterr().err == "train: runs again, since --force was given\n"


def images(root: Path) -> None:
    for part in ("train", "test"):
        (root / part / "cat").mkdir(parents=True)
        (root / part / "cat" / "1.png").write_bytes(b"first")


@pytest.mark.parametrize("source", ["imagefolder", "own:data"])
def test_data_counts_by_its_content_and_never_by_its_times(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    Path("own.py").write_text("")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    images(Path("pictures"))
    image = Path("pictures/train/cat/1.png")
    overrides = [f"data.source={source}", "data.root=pictures"]
    go(fakes, *overrides)
    os.utime(image, ns=(1, 1))
    Path("pictures/.DS_Store").touch()
    assert go(fakes, *overrides) == []
    image.write_bytes(b"other")
    os.utime(image, ns=(1, 1))  # as a tool does that keeps times
    with pytest.raises(UsageError, match="run1/train: stale, since pictures changed; run `crqat train RECIPE` again"):
        gate(fakes, *overrides)
    with pytest.raises(UsageError, match="run1/train: stale, since pictures changed"):
        check(RUN)
    capsys.readouterr()
    assert go(fakes, *overrides, only=["train"]) == ["train"]
    image.rename(image.with_name("2.png"))
    assert go(fakes, *overrides, only=["train"]) == ["train"]
    image.write_bytes(b"first")
    assert go(fakes, *overrides, only=["train"]) == ["train"]
    assert capsys.readouterr().err.splitlines() == [
        "train: runs again, since pictures changed",
        "train: runs again, since pictures changed",
        "train: runs again, since pictures changed (2 -> 3 files)",
    ]
    go(fakes, *overrides)
    shutil.rmtree("pictures")
    assert "fail" not in gate(fakes, *overrides), "what is not here cannot be compared"


def test_data_that_its_function_fetched_is_what_was_trained_on(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("own.py").write_text("")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    train = partial(go, fakes, "data.source=own:data", "data.root=pictures", only=["train"])

    def fetch(*arguments: Any, **further: Any) -> TrainingPayload:
        if not Path("pictures").exists():
            images(Path("pictures"))
        return made(*arguments, **further)

    made = fakes.train
    monkeypatch.setattr(sys.modules["crqat.train.training.stage"], "train", fetch)
    assert train() == ["train"]
    assert train() == []
    Path("pictures/test/cat/1.png").write_bytes(b"other")
    assert train() == ["train"]


def test_modules_that_a_function_imports_count_and_are_not_run(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("own").mkdir()
    Path("own/net.py").write_text("from . import blocks\nraise SystemExit('must not run')\n")
    Path("own/blocks.py").write_text("def block():\n    import norms\n")
    Path("norms.py").write_text("eps = 1\n")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    go(fakes, "model.name=own.net:build")
    Path("norms.py").write_text("eps = 2\n")
    with pytest.raises(UsageError, match="run1/train: stale, since norms changed"):
        gate(fakes, "model.name=own.net:build")
    capsys.readouterr()
    assert go(fakes, "model.name=own.net:build", only=["train"]) == ["train"]
    assert capsys.readouterr().err == "train: runs again, since norms changed\n"


def brought(fakes: Fakes, name: str = "orin.json", **changes: Any) -> Path:
    """What a board measured of the export that is here, as a file."""
    how = {**json.loads(json.dumps(asdict(recipe.load(fakes.recipe, []).benchmark))), **changes.pop("config", {})}
    results = {**fakes.results, "parent": manifest_hash(RUN / "export"), "bundle": "b" * 64, "config": how, **changes}
    Path(name).write_text(json.dumps(results))
    return Path(name)


def test_results_that_were_carried_from_a_board_are_judged_as_a_stage(fakes: Fakes) -> None:
    go(fakes)
    config = recipe.load(fakes.recipe, [])
    stage = boards.carried(config, RUNS, brought(fakes))
    assert stage == "benchmark@orin"
    manifest = verify_stage(RUN / stage)
    assert (manifest.payload["on"], manifest.payload["bundle"]) == ("orin", "b" * 64)
    expected = [verdict.status for verdict in stages.gate(config, RUNS)]
    assert [verdict.status for verdict in stages.gate(config, RUNS, stage)] == expected
    counted = {"status": "failed: 3 of 9 codes differ, first in x", "images": 2, "codes": 9, "differing": 3}
    fakes.results["models"]["onnxruntime.onnx"]["codes_on_this_cpu"] = counted
    # The same name again is another file, and takes the stage's place.
    verdicts = stages.gate(config, RUNS, boards.carried(config, RUNS, brought(fakes)))
    assert [(v.rule, v.file) for v in verdicts if v.status == "fail"] == [("codes_on_this_cpu", "onnxruntime.onnx")]
    assert (
        boards.carried(config, RUNS, brought(fakes, "my board/../x y.json".replace("/", "_")))
        == "benchmark@my_board_.._x_y"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"parent": "0" * 64},
            r"orin\.json: parent: the results are of another export than runs/run1/export; make the bundle again and",
        ),
        (
            {"config": {"threads": 4}},
            r"config\.threads: measured with 4, but the recipe says 1; set benchmark\.threads",
        ),
        (
            {"config": {"require": ["openvino"]}},
            r"config\.require: measured with \['openvino'\], but the recipe says \[\]",
        ),
        ({"models": []}, r"orin\.json: damaged: models is not an object; bring it from the board again"),
    ],
)
def test_carried_results_of_another_export_or_another_way_are_refused(
    fakes: Fakes, changes: dict[str, Any], message: str
) -> None:
    go(fakes)
    with pytest.raises(UsageError, match=message):
        boards.carried(recipe.load(fakes.recipe, []), RUNS, brought(fakes, **changes))
    assert not list(RUN.glob("benchmark@*"))
