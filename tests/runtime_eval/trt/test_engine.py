"""Real engines, built on this machine without a GPU; the plan is what is tested, nothing runs."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch

from crqat.core.errors import ToolError, UsageError
from crqat.core.grid import Grid
from crqat.core.progress import quiet
from crqat.core.results.engine import Builder, BuilderMessage, EngineReport, Uncovered
from crqat.core.run_directory import Manifest, write_stage
from crqat.core.typed_json import to_json
from crqat.export import stage, to_onnx
from crqat.export.config import ExportConfig
from crqat.export.graph.macs import macs
from crqat.export.qdq import write as qdq
from crqat.export.qdq.write import QDQModel, float_model, qdq_model
from crqat.pipeline.gate.rules import GateConfig, exit_code, judge
from crqat.runtime_eval.benchmark import benchmark
from crqat.runtime_eval.machine import host
from crqat.runtime_eval.trt import builder as engine_build
from crqat.runtime_eval.trt import engine, plan_layers, timing_cache
from crqat.runtime_eval.trt import versions as tensorrt_api
from crqat.runtime_eval.trt.engine import EngineOptions
from crqat.runtime_eval.trt.engine import build as typed_build
from crqat.train.config import FloatConfig, QATConfig, QuantizationConfig, TrainConfig
from crqat.train.models import build as models
from crqat.train.quantized_model import quantize_model
from crqat.train.quantizers import LSQQuantizer
from tests.export.conftest import DIGITS, Quantized, edited, nodes, quantize, random_images, sane_bn, write_train_stage
from tests.needs import needs
from tests.runtime_eval.conftest import QUICK

rtx = needs("tensorrt_rtx")
DYNAMIC, STATIC = (1, 8, 64), (4, 4, 4)
# A test knows which of the parts that may be None are there.
build: Callable[..., Any] = typed_build


@dataclass
class Files:
    """A network's files in a directory; `qdq` tells them apart by their arguments to `qdq_model`."""

    network: Quantized
    directory: Path

    @cached_property
    def macs(self) -> dict[str, int]:
        return macs(self.network.graph)

    def qdq(self, precision: str = "float16", weights: str = "int8", target: str = "tensorrt") -> Path:
        path = self.directory / f"{target}-{precision}-{weights}.onnx"
        if not path.is_file():
            q = self.network
            file = qdq_model(q.graph, q.specs, q.grids, q.latent, target, precision, {}, weights)
            onnx.save(file.model, path)
        return path

    def write(self, name: str, model: onnx.ModelProto) -> Path:
        onnx.save(model, self.directory / name)
        return self.directory / name


def uncalibrated(network: torch.nn.Module, bits: int = 8) -> Quantized:
    """A network with Grids that fit its weights; those of the activations are made up: a plan does not depend on it."""
    images = random_images(2, 3, 32, 32)
    targets: tuple[Any, ...] = ("tensorrt",)
    config = QuantizationConfig(weights=bits, activations=bits)
    model = quantize_model(sane_bn(network, images), images, config, targets, LSQQuantizer)
    specs = model.specs
    result = Quantized(model.eval(), {}, images.numpy())
    weights = result.latent
    for spec in specs:
        scale = np.full(spec.channels or 1, 0.0625, np.float32)
        if spec.kind == "weight":
            weight = weights[spec.edge]
            scale = (np.abs(weight).reshape(len(weight), -1).max(axis=1) / spec.qmax).astype(np.float32)
        result.grids[spec.edge] = Grid(scale, 0, spec.qmin, spec.qmax, 0 if spec.kind == "weight" else None)
    return result


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Files]:
    """The files of a network by its name, made when they are asked for."""
    made: dict[str, Files] = {}

    def of(name: str) -> Files:
        if name not in made:
            torch.manual_seed(0)
            made[name] = Files(uncalibrated(models.build(name, 10, 3)), tmp_path_factory.mktemp("files"))
        return made[name]

    return of


def problems(report: EngineReport) -> list[BuilderMessage]:
    return [message for message in report.messages if message.severity != "harmless"]


@rtx
@pytest.mark.parametrize(
    ("name", "precision", "batch", "targets", "operations"),
    [
        ("cifar/resnet20", "float16", DYNAMIC, (), 20),
        ("cifar/resnet20", "float32", STATIC, (), 20),
        ("cifar/resnet20", "float32", DYNAMIC, ("SM80", "SM86", "SM89", "SM120"), 20),
        ("torchvision/resnet18", "float16", STATIC, ("SM80",), 21),
        ("torchvision/resnet18", "float32", DYNAMIC, ("SM86",), 21),
        ("torchvision/mobilenet_v2", "float16", DYNAMIC, ("SM89",), 53),
        ("torchvision/mobilenet_v2", "float32", STATIC, ("SM120",), 53),
        ("torchvision/resnet50", "float16", DYNAMIC, (), 54),
    ],
)
def test_everything_is_int8(
    files: Callable[[str], Files],
    name: str,
    precision: str,
    batch: tuple[int, int, int],
    targets: tuple[str, ...],
    operations: int,
) -> None:
    made = files(name)
    report = build(made.qdq(precision), EngineOptions(batch=batch, compute_capabilities=targets), made.macs)
    assert report.status == "built"
    assert report.source == "verbose log"
    assert problems(report) == []
    coverage = report.coverage
    assert (coverage.by_count, coverage.by_macs, coverage.uncovered) == (1.0, 1.0, [])
    assert coverage.nodes == coverage.int8_nodes == operations == report.counts.matmul
    assert coverage.macs == sum(made.macs.values())
    matmuls = [layer for layer in report.layers if layer.kind == "matmul"]
    assert all(layer.int8 and layer.inputs[0] == layer.weights == "Int8" for layer in matmuls)
    assert sum(layer.macs for layer in matmuls) == coverage.macs  # each is of one node
    assert (report.counts.reformat, report.counts.copy, report.counts.opaque) == (0, 0, 0)
    assert report.counts.pointwise >= operations - 3
    assert ("HALF" in report.precisions) == (precision == "float16")
    assert any("Half" in layer.outputs for layer in report.layers) == (precision == "float16")
    # The shape of a batch that is known when the engine is built needs no computing.
    assert (report.counts.shape is not None) == (batch == DYNAMIC)
    assert (report.batch, report.compute_capabilities) == (batch, list(targets) or ["default"])
    assert report.builder == Builder("tensorrt_rtx", tensorrt_api.installed("tensorrt_rtx"))
    assert report.flags == ["STRONGLY_TYPED"]
    assert "SM87" in report.notices[0]
    assert 0 < report.seconds < 600
    assert report.size_bytes > sum(a.size for a in made.network.latent.values())


@rtx
def test_weights_as_float_make_the_same_engine(files: Callable[[str], Files]) -> None:
    made = files("cifar/resnet20")
    report = build(made.qdq("float16", "float"), EngineOptions(), made.macs)
    assert report.status == "built"
    assert (report.coverage.by_macs, problems(report)) == (1.0, [])


@rtx
def test_four_bits_are_int8_in_the_plan(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = Files(uncalibrated(models.build("cifar/resnet20", 10, 3), bits=4), tmp_path)
    assert nodes(onnx.load(made.qdq()), "Clip")
    report = build(made.qdq(), EngineOptions(), made.macs)
    assert (report.status, report.coverage.by_macs, problems(report)) == ("built", 1.0, [])


@rtx
@pytest.mark.parametrize(("precision", "shown"), [("float32", "Float"), ("float16", "Half")])
def test_the_float_network_has_no_int8_and_what_a_plan_swallows_is_not_covered(
    files: Callable[[str], Files], precision: str, shown: str
) -> None:
    made = files("cifar/resnet20")
    path = made.write(f"{precision}.onnx", float_model(made.network.graph, {}, precision))
    report = build(path, EngineOptions(), made.macs)
    coverage = report.coverage
    assert (coverage.by_macs, coverage.by_count, coverage.int8_nodes) == (0.0, 0.0, 0)
    reasons = {entry.node: entry.reason for entry in coverage.uncovered}
    assert reasons.keys() == made.macs.keys()
    assert reasons.pop("linear") == "no layer of the plan is known to compute it"
    assert set(reasons.values()) == {f"multiplies {shown} by {shown}"}
    assert ("HALF" in report.precisions) == (precision == "float16")


def with_uint8(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every tensor behind a ReLU becomes UINT8 with zero point 0."""
    producer = {name: node for node in model.graph.node for name in node.output}
    for node in nodes(model, "QuantizeLinear"):
        if producer.get(node.input[0], node).op_type == "Relu":
            model = edited(model, node.input[2], np.uint8(0))
    return model


def with_a_float_layer(model: onnx.ModelProto, name: str = "layer2/1/conv1") -> onnx.ModelProto:
    """One Conv's weight loses its quantizer."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    conv = next(node for node in copied.graph.node if node.name == name)
    dequantize = next(node for node in copied.graph.node if node.output[0] == conv.input[1])
    codes, scale = (
        onnx.numpy_helper.to_array(next(t for t in copied.graph.initializer if t.name == tensor))
        for tensor in dequantize.input[:2]
    )
    weight = (codes * scale.reshape(-1, 1, 1, 1)).astype(scale.dtype)
    copied.graph.initializer.append(onnx.numpy_helper.from_array(weight, f"{name}.float"))
    conv.input[1] = f"{name}.float"
    copied.graph.node.remove(dequantize)
    return copied


@rtx
def test_reinterpreted_uint8_is_an_error_though_all_is_int8(files: Callable[[str], Files]) -> None:
    made = files("cifar/resnet20")
    report = build(made.write("uint8.onnx", with_uint8(onnx.load(made.qdq("float32")))), EngineOptions(), made.macs)
    assert report.coverage.by_macs == 1.0
    (message,) = problems(report)
    assert (message.kind, message.severity, message.count) == ("uint8_read_as_int8", "error", 38)
    assert message.nodes[0] == "post_hooks.relu/relu/0__0.0/QuantizeLinear"


@rtx
def test_a_layer_left_in_float_is_found_and_weighed(files: Callable[[str], Files]) -> None:
    made = files("cifar/resnet20")
    path = made.write("float_layer.onnx", with_a_float_layer(onnx.load(made.qdq("float16"))))
    coverage = build(path, EngineOptions(), made.macs).coverage
    lost = made.macs["layer2/1/conv1"]
    assert coverage.uncovered == [Uncovered("layer2/1/conv1", coverage.uncovered[0].reason, lost)]
    assert coverage.by_macs == 1 - lost / sum(made.macs.values())
    assert coverage.by_count == 0.95


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainConfig]:
    """A train stage that has hardly trained."""
    config = replace(DIGITS, float_training=FloatConfig(epochs=1, batch_size=128), qat=QATConfig(epochs=0))
    return write_train_stage(tmp_path_factory.mktemp("run"), config), config


@rtx
@pytest.mark.parametrize(
    ("damage", "failing"),
    [
        (None, {}),
        (with_uint8, {"findings": "clips half of the range", "engine": "all above 127 are clipped"}),
        (
            with_a_float_layer,
            {"findings": "its weight is not quantized though its input is", "int8_coverage": "19 of 20 Conv and Gemm"},
        ),
    ],
)
def test_an_unsafe_export_is_written_and_fails_the_gate(
    trained: tuple[Path, TrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[onnx.ModelProto], onnx.ModelProto] | None,
    failing: dict[str, str],
) -> None:
    def damaged(*arguments: Any) -> QDQModel:
        file = qdq.qdq_model(*arguments)
        return file if damage is None else replace(file, model=damage(file.model))

    monkeypatch.setattr(to_onnx, "qdq_model", damaged)
    config = ExportConfig(targets=("tensorrt",), tensorrt_precision="float32", verify_images=2)
    directory, train = trained
    if damage is not None:
        (tmp_path / "safe").mkdir()
        with pytest.raises(UsageError, match=r"tensorrt.onnx breaks \d+ rules, first: .*crqat export --unsafe"):
            stage.export(directory, train, config, tmp_path / "safe", quiet, "run", "revision")
    manifest = Manifest("export", "key", None, {}, {})
    with write_stage(tmp_path / "run", manifest) as out:
        payload = stage.export(directory, train, config, out, quiet, "run", "revision", unsafe=True)
        manifest.payload = to_json(payload)

    results = benchmark(tmp_path / "run" / "export", QUICK, quiet)

    assert results.engines["tensorrt.onnx"].layers
    assert "layers" not in to_json(results.models["tensorrt.onnx"].engine)
    ours = ("findings", "engine", "int8_coverage", "reformat_layers")
    verdicts = [v for v in judge(results, GateConfig(max_reformat_layers=0)) if v.rule in ours]
    assert {v.rule for v in verdicts if v.status != "fail"} == {"engine", "int8_coverage", "reformat_layers"} - set(
        failing
    )
    assert {v.status for v in verdicts} == ({"pass", "fail"} if failing else {"pass"})
    for verdict in verdicts:
        if verdict.rule in failing:
            assert verdict.status == "fail"
            assert failing[verdict.rule] in verdict.message
    assert exit_code(verdicts) == (1 if failing else 0)


@rtx
@pytest.mark.parametrize(
    ("change", "stage_name", "node", "words"),
    [
        (
            lambda m: edited(m, "pre_hooks.layer3/0/conv1/conv2d/0__1.0.scale", np.zeros(64, np.float32)),
            "parse",
            "pre_hooks.layer3/0/conv1/conv2d/0__1.0/DequantizeLinear",
            "Scale coefficients must all be positive",
        ),
        (
            lambda m: edited(m, "post_hooks.x__0.0.zero_point", np.int8(3)),
            "parse",
            "post_hooks.x__0.0/QuantizeLinear",
            "Non-zero zero point is not supported",
        ),
        (lambda m: onnx.ModelProto(), "parse", None, "no network with an output"),
    ],
)
def test_a_refused_file_names_node_and_rule(
    files: Callable[[str], Files],
    change: Callable[[onnx.ModelProto], onnx.ModelProto],
    stage_name: str,
    node: str | None,
    words: str,
) -> None:
    made = files("cifar/resnet20")
    report = build(made.write("refused.onnx", change(onnx.load(made.qdq("float32")))), EngineOptions(), made.macs)
    failure = report.failure
    assert (failure.stage, failure.node) == (stage_name, node)
    assert words in failure.rule
    assert report.status.startswith(f"failed: {stage_name}")
    assert words in report.status
    assert (node or "") in report.status
    assert (report.coverage, report.layers, report.size_bytes) == (None, [], None)


@rtx
def test_a_failed_build_names_the_operation_and_does_not_spoil_the_next(files: Callable[[str], Files]) -> None:
    made = files("cifar/resnet20")
    path = made.qdq("float32")
    failed = build(path, EngineOptions(compute_capabilities=("SM75",)), made.macs)
    assert (failed.failure.stage, failed.failure.node) == ("build", "linear")
    assert "FP32 GEMM is not supported" in failed.failure.rule
    assert build(path, EngineOptions(compute_capabilities=("SM80",)), made.macs).coverage.by_macs == 1.0


@rtx
def test_batches_that_a_file_does_not_allow(files: Callable[[str], Files]) -> None:
    made = files("cifar/resnet20")
    model = onnx.load(made.qdq("float32"))
    batch, _, height, _ = model.graph.input[0].type.tensor_type.shape.dim
    batch.dim_value = 2
    fixed = made.write("fixed.onnx", model)
    assert build(fixed, EngineOptions(batch=(2, 2, 2)), made.macs).coverage.by_macs == 1.0
    assert (
        build(fixed, EngineOptions(batch=STATIC)).failure.rule
        == "the network's input input has the fixed batch 2, not 4"
    )
    height.dim_param = "height"
    failure = build(made.write("height.onnx", model), EngineOptions(batch=(2, 2, 2))).failure
    assert failure.rule == "the network's input input has a dynamic dimension that is not the batch"


@rtx
def test_the_engine_is_written_beside_its_report(files: Callable[[str], Files], tmp_path: Path) -> None:
    report = build(files("cifar/resnet20").qdq("float32"), EngineOptions(), engine=tmp_path / "model.engine")
    content = (tmp_path / "model.engine").read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (report.size_bytes, report.engine_sha256)
    assert [path.name for path in tmp_path.iterdir()] == ["model.engine"]
    # Without MACs the plan's own layers are counted.
    coverage = report.coverage
    assert (coverage.by_macs, coverage.by_count, coverage.nodes, coverage.macs) == (None, 1.0, 20, None)


@rtx
def test_the_engine_inspector_is_asked_where_the_log_tells_nothing(
    files: Callable[[str], Files], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = files("cifar/resnet20")
    arguments = (made.qdq("float32"), EngineOptions("tensorrt_rtx"), {"conv1": 5}, None, tmp_path / "log")
    monkeypatch.setattr(plan_layers, "from_log", lambda messages: ([], []))
    if not host.cuda_device():  # nothing can load the engine
        with pytest.raises(ToolError, match="neither its log nor its engine inspector reports the engine's layers"):
            engine.build_here(*arguments)
    layer = plan_layers.Layer("conv1", "matmul", "CaskConvolution", ("Int8",), ("Int8",), "Int8", ("conv1",))
    monkeypatch.setattr(engine_build.Build, "inspect", lambda build, serialized: [layer])
    report = engine.build_here(*arguments)
    assert report.coverage is not None
    assert (report.source, report.coverage.by_macs) == ("engine inspector", 1.0)
    assert "Parsing node: conv1 [Conv]" in (tmp_path / "log").read_text()


def stand_in(directory: Path, body: str) -> None:
    """A program in place of the real one, in a directory that Python finds it in."""
    folder = directory / "crqat" / "runtime_eval" / "trt"
    folder.mkdir(parents=True)
    (directory / "crqat" / "__init__.py").touch()
    (folder / "engine.py").write_text(f"import os, signal, sys, time\n{body}")


@pytest.mark.parametrize(
    ("body", "limit", "node", "rule"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", 60.0, "layer1/conv [7]", "its process was ended by SIGSEGV"),
        (
            "sys.exit('no memory left')",
            60.0,
            "layer1/conv [7]",
            "its process exited with 1, last output: no memory left",
        ),
        ("time.sleep(60)", 0.5, "layer1/conv [7]", "not finished after 0.5 s, stopped"),
        ("print('crqat: the file has been parsed', file=log, flush=True); os.abort()", 60.0, None, "ended by SIGABRT"),
    ],
)
def test_a_process_that_dies_or_hangs_is_a_failed_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, limit: float, node: str | None, rule: str
) -> None:
    log = "log = open(sys.argv[sys.argv.index('--log') + 1], 'w')\n"
    stand_in(tmp_path, f"{log}print('VERBOSE Parsing node: layer1/conv [7] [Conv]', file=log, flush=True)\n{body}")
    monkeypatch.setattr(engine, "PACKAGES", tmp_path)
    monkeypatch.setattr(tensorrt_api, "installed", lambda module: "1.7")
    (tmp_path / "model.onnx").write_bytes(b"model")
    report = build(tmp_path / "model.onnx", EngineOptions("tensorrt_rtx", time_limit_seconds=limit))
    assert (report.failure.stage, report.failure.node) == ("process", node)
    assert rule in report.failure.rule
    assert report.status.startswith("failed: process")


def test_what_is_wrong_with_the_machine_is_no_failed_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model.onnx"
    with pytest.raises(UsageError, match=r"model\.onnx: no such file"):
        build(model, EngineOptions())
    model.write_bytes(b"model")
    stand_in(tmp_path, "print('crqat.runtime_eval.trt.engine: tensorrt does not start', file=sys.stderr); sys.exit(3)")
    monkeypatch.setattr(engine, "PACKAGES", tmp_path)
    monkeypatch.setattr(tensorrt_api, "installed", lambda module: "1.7")
    with pytest.raises(ToolError, match=r"^tensorrt does not start$"):
        build(model, EngineOptions("tensorrt_rtx"))
    with pytest.raises(UsageError, match=r"SM87 .*Jetson Orin"):
        build(model, EngineOptions("tensorrt_rtx", compute_capabilities=("SM87",)))
    monkeypatch.setattr(tensorrt_api, "installed", lambda module: None)
    with pytest.raises(ToolError, match=r"^tensorrt_rtx is not installed.*pip install crqat-edge\[tensorrt-cpu\]$"):
        build(model, EngineOptions())


@rtx
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_timing_cache_goes_through_a_real_builder(tmp_path: Path) -> None:
    trt = tensorrt_api.load("tensorrt_rtx")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    path = tmp_path / "timing.cache"
    for _ in range(2):  # not there, then there
        config = builder.create_builder_config()
        cache = timing_cache.attach(config, path)
        digest = timing_cache.merge(config, cache, path)
        assert path.read_bytes().startswith(digest.encode())


@rtx
def test_weak_typing_allows_what_the_file_is_written_in() -> None:
    """The table's older rows on this builder, which knows their calls though not their flags."""
    config, flags = SimpleNamespace(set_flag=lambda flag: asked.append(flag)), SimpleNamespace(FP16="FP16", INT8="INT8")
    asked: list[str] = []
    trt = SimpleNamespace(BuilderFlag=flags, ILogger=object)
    for precisions, expected in (
        (["FLOAT", "INT8"], ["INT8"]),
        (["FLOAT", "HALF", "INT8"], ["FP16", "INT8"]),
        (["FLOAT"], []),
    ):
        asked.clear()
        going = engine_build.Build(trt, tensorrt_api.capability("tensorrt", "8.6.2"), lambda *_: None)
        going.precisions = precisions
        going._allow_precisions(cast(Any, config))
        assert asked == going.flags == expected
    strong = engine_build.Build(trt, tensorrt_api.capability("tensorrt", "10.3.0"), lambda *_: None, [], [], ["INT8"])
    strong._allow_precisions(cast(Any, config))
    assert asked == []


@rtx
def test_every_name_of_tensorrt_that_is_used_exists() -> None:
    trt = tensorrt_api.load("tensorrt_rtx")
    used = set()
    for module in (engine_build, tensorrt_api):
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
            match = re.fullmatch(r"(?:self\.|build\.)?trt\.([\w.]+)", ast.unparse(node))
            used |= {match[1]} if isinstance(node, ast.Attribute) and match else set()
    assert {"Builder", "OnnxParser", "ILogger", "ProfilingVerbosity.DETAILED"} <= used
    for name in used:
        value = trt
        for part in name.split("."):
            assert hasattr(value, part), name
            value = getattr(value, part)
    methods = {
        trt.Builder: (
            "create_network", "create_builder_config", "create_optimization_profile", "build_serialized_network"
        ),
        trt.INetworkDefinition: ("num_inputs", "num_outputs", "num_layers", "get_input", "get_layer"),
        trt.OnnxParser: ("parse", "num_errors", "get_error"),
        trt.ParserError: ("desc", "node_name", "node_operator"),
        trt.IBuilderConfig: (
            "profiling_verbosity", "num_compute_capabilities", "set_compute_capability", "add_optimization_profile",
            "set_flag", "create_timing_cache", "set_timing_cache", "get_timing_cache",
        ),
        trt.Runtime: ("deserialize_cuda_engine",),
        trt.ICudaEngine: ("create_engine_inspector",),
        trt.EngineInspector: ("get_engine_information",),
    }  # fmt: skip
    assert [
        f"{kind.__name__}.{name}" for kind, names in methods.items() for name in names if not hasattr(kind, name)
    ] == []


@rtx
@pytest.mark.parametrize("weights", ["int8", "float"])
def test_transposed_convolutions_are_built(weights: str, tmp_path: Path) -> None:
    """Scales on axis 1, and one scale for all groups."""
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.ConvTranspose2d(8, 8, 3, 2, 1, output_padding=1),
        torch.nn.ReLU(), torch.nn.ConvTranspose2d(8, 4, 2, 2, groups=2), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3),
    )  # fmt: skip
    quantized = quantize(network, random_images(4, 3, 8, 8))
    path = tmp_path / "model.onnx"
    onnx.save(quantized.file("tensorrt", "float16", weights=weights).model, path)
    assert build(path, EngineOptions()).status == "built"
