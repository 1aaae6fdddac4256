"""`TensorRTRunner` against a fake of the CUDA boundary and of the engine; its names against TensorRT for RTX itself."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from crqat.core.errors import ToolError, UsageError
from crqat.runtime_eval.machine import host
from crqat.runtime_eval.runners import Description
from crqat.runtime_eval.runners import tensorrt as runner_module
from crqat.runtime_eval.runners.tensorrt import Cuda, TensorRTRunner, device_capability, tensorrt_version
from crqat.runtime_eval.trt import plan_file
from tests.needs import missing, require
from tests.runtime_eval.runners.fake_cuda import PLAN, FakeCuda, FakeEngine, FakeTensorRT

ROOT = Path(__file__).parents[3]
RUNNER = ROOT / "runtime_eval" / "runners" / "tensorrt.py"
# Every module that speaks to TensorRT calls it so.
SOURCES = [path for path in sorted((ROOT / "runtime_eval").rglob("*.py")) if "trt." in path.read_text()]
# What TensorRT for RTX does not have, and why the code names it all the same.
RTX_LACKS: dict[str, str] = {}


def rtx() -> Any:
    require("tensorrt_rtx")
    return importlib.import_module("tensorrt_rtx")


def write(path: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "builder": "tensorrt",
        "version": "10.3.0",
        "compute_capability": "8.7",
        "precision": "int8",
        "metadata": {"crqat.target": "tensorrt"},
    }
    plan = changes.pop("plan", PLAN)
    plan_file.save(path, plan, **(values | changes))
    return path


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a CUDA device and TensorRT 10.3."""
    monkeypatch.setattr(host, "CUDA_DEVICES", ("/dev/null",))
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT("tensorrt"))
    monkeypatch.setattr(runner_module, "Cuda", FakeCuda)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return write(tmp_path / "tensorrt.plan")


def images(count: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(count).integers(-8, 8, (count, 3, 2, 2)).astype(np.float32)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize(("smallest", "dtype"), [(1, "float32"), (2, "float32"), (None, "float32"), (1, "float16")])
def test_any_number_of_images_gets_its_logits(
    plan: Path, monkeypatch: pytest.MonkeyPatch, smallest: int | None, dtype: str, graph: bool
) -> None:
    monkeypatch.setattr(FakeEngine, "smallest", smallest)
    monkeypatch.setattr(FakeEngine, "dtype", dtype)
    with TensorRTRunner(plan, graph) as runner:
        for count in (4, 1, 1, 3, 9, 4):
            given = images(count)
            logits = runner.infer(given)
            assert logits.dtype == np.float32
            np.testing.assert_array_equal(logits, given.sum(axis=(2, 3)))
        kept = runner.infer(images(2))
        before = kept.copy()
        runner.infer(images(4))
        np.testing.assert_array_equal(kept, before)
    assert FakeCuda.here.calls[-1] == "close"


@pytest.mark.usefixtures("cuda")
def test_what_the_device_computed_is_told_apart_and_padding_counts(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with TensorRTRunner(plan) as runner:
        assert runner.compute_seconds() is None
        runner.infer(images(1))
        assert runner.compute_seconds() == pytest.approx(0.003)
        runner.infer(images(6))  # as 4 and 2
        assert runner.compute_seconds() == pytest.approx(0.018)
        described = Description("tensorrt", "10.3.0", "compute capability 8.7", {"crqat.target": "tensorrt"})
        assert runner.describe() == described
    monkeypatch.setattr(FakeEngine, "smallest", None)
    with TensorRTRunner(plan) as runner:
        runner.infer(images(1))
        assert runner.compute_seconds() == pytest.approx(0.012)


@pytest.mark.usefixtures("cuda")
def test_a_graph_is_captured_once_for_each_shape_after_a_first_run(plan: Path) -> None:
    with TensorRTRunner(plan, graph=True) as runner:
        for count in (1, 1, 1, 2):
            runner.infer(images(count))
        calls = FakeCuda.here.calls
    # Once to let it allocate, once captured; the graph then runs without TensorRT being asked.
    first = ["execute", "synchronize", "capture", "execute", "synchronize"]
    assert calls == [*first, "synchronize", "synchronize", *first, "close"]


def test_without_a_cuda_device_that_is_the_reason(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CUDA_DEVICES", ())
    with pytest.raises(ToolError, match=r"^no CUDA device$"):
        TensorRTRunner(plan)
    with pytest.raises(ToolError, match=r"^no CUDA device$"):
        device_capability()


@pytest.mark.usefixtures("cuda")
def test_the_devices_capability_is_asked_and_the_device_given_back() -> None:
    assert device_capability() == (8, 7)
    assert FakeCuda.here.calls == ["close"]


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("capability", "changes", "kind", "words"),
    [
        ((6, 2), {"compute_capability": "6.2"}, ToolError, "needs compute capability 7.2, but this device has 6.2"),
        ((8, 7), {"version": "8.6.2"}, ToolError, "built for tensorrt version 8.6.2, not 10.3.0"),
        ((8, 7), {"compute_capability": "8.6"}, ToolError, "built for compute capability 8.6, not 8.7"),
        ((8, 7), {"builder": "tensorrt_rtx"}, ToolError, "built for builder tensorrt_rtx, not tensorrt"),
        ((8, 7), {"plan": b"garbage"}, ToolError, "does not load the plan (tensorrt.plan): magic tag does not match"),
    ],
)
def test_refusals_give_the_device_back(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    changes: dict[str, Any],
    kind: type[Exception],
    words: str,
) -> None:
    monkeypatch.setattr(FakeCuda, "capability", capability)
    with pytest.raises(kind) as caught:
        TensorRTRunner(write(tmp_path / "tensorrt.plan", **changes))
    assert words in str(caught.value)
    assert FakeCuda.here.calls == ["close"]


@pytest.mark.usefixtures("cuda")
def test_a_plan_without_a_sidecar_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "a.plan").write_bytes(PLAN)
    with pytest.raises(UsageError, match=r"a\.plan\.json: missing"):
        TensorRTRunner(tmp_path / "a.plan")


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("create_execution_context", "makes no execution context"),
        ("set_tensor_address", "takes no address for input"),
        ("set_input_shape", r"takes no input \[1, 3, 2, 2\]"),
        ("infer_shapes", "does not know the shape of input"),
        ("execute_async_v3", "does not start the inference"),
    ],
)
def test_every_return_value_is_checked_and_the_log_tells_the_cause(
    plan: Path, monkeypatch: pytest.MonkeyPatch, call: str, words: str
) -> None:
    monkeypatch.setattr(FakeEngine, "trouble", call)
    with pytest.raises(ToolError, match=rf"^TensorRT {words} \(tensorrt\.plan\): {call} went wrong$"):  # noqa: SIM117
        with TensorRTRunner(plan) as runner:
            runner.infer(images(1))
    assert FakeCuda.here.calls[-1] == "close"


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [
        ("names", ("input", "output"), r"finds the tensors \['input', 'output'\]"),
        ("image", (3, -1, -1), r"takes images of any size \[-1, 3, -1, -1\]"),
        ("dtype", "int8", "uses int8 for the tensor input, not a float type"),
    ],
)
def test_a_plan_of_something_else_is_refused(
    plan: Path, monkeypatch: pytest.MonkeyPatch, attribute: str, value: Any, words: str
) -> None:
    monkeypatch.setattr(FakeEngine, attribute, value)
    with pytest.raises(ToolError, match=words):
        TensorRTRunner(plan)


def test_a_refusal_of_the_real_runtime_is_told_with_its_cause(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trt = rtx()
    monkeypatch.setattr(host, "CUDA_DEVICES", ("/dev/null",))
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(runner_module, "Cuda", FakeCuda)
    write(plan, version=trt.__version__)
    with pytest.raises(ToolError, match=r"^TensorRT does not load the plan \(tensorrt\.plan\): \S"):
        TensorRTRunner(plan)
    assert FakeCuda.here.calls == ["close"]


def test_an_empty_package_that_stubs_leave_is_no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ModuleType("tensorrt"), None):
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        with pytest.raises(ToolError, match="no TensorRT in this Python"):
            tensorrt_version()
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT("tensorrt"))
    assert tensorrt_version() == "10.3.0"


def test_without_pycuda_or_with_a_driver_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda", None)
    with pytest.raises(ToolError, match="pycuda is not installed"):
        Cuda()

    class Error(Exception):
        pass

    def init() -> None:
        msg = "cuInit failed: no CUDA-capable device is detected"
        raise Error(msg)

    driver = SimpleNamespace(Error=Error, init=init)
    monkeypatch.setitem(sys.modules, "pycuda", SimpleNamespace(driver=driver))
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    with pytest.raises(ToolError, match="CUDA does not start: cuInit failed: no CUDA-capable device"):
        Cuda()


def test_a_graph_that_cannot_be_captured_is_told_by_the_real_cuda_python() -> None:
    require("cuda-python")
    if host.cuda_device():
        pytest.skip("CUDA works here; this is about the driver's error code")
    boundary = object.__new__(Cuda)
    boundary.stream, boundary._graphs = 1, []
    called: list[None] = []
    with pytest.raises(
        ToolError,
        match=r"cudaStreamBeginCapture failed: cudaErrorInsufficientDriver; set benchmark\.cuda_graph to false",
    ):
        boundary.capture(lambda: called.append(None))
    assert called == []


def test_every_name_of_cuda_python_exists() -> None:
    require("cuda-python")
    runtime: Any = importlib.import_module("cuda.bindings.runtime")
    names = {
        text
        for node in ast.walk(ast.parse(RUNNER.read_text()))
        for text in [getattr(node, "value", None) if isinstance(node, ast.Constant) else getattr(node, "attr", None)]
        if isinstance(text, str) and text.startswith("cuda") and text.isalnum() and text != "cuda"
    }
    assert {"cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphLaunch", "cudaGraphInstantiate"} <= names
    assert [name for name in sorted(names - {"cudart"}) if not hasattr(runtime, name)] == []


def attributes(tree: ast.AST) -> Iterator[tuple[str, ...]]:
    """The dotted names in a module: `a.b.c` as a, b, c; what is behind a call or an index starts with "?"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names: list[str] = []
            part: ast.expr = node
            while isinstance(part, ast.Attribute):
                names.insert(0, part.attr)
                part = part.value
            yield (part.id if isinstance(part, ast.Name) else "?", *names)


def stub_members() -> dict[str, set[str]]:
    """The classes of TensorRT's stubs that have a member of each name."""
    from tests.typing_stubs import repaired

    try:
        (stub,) = (file for file in files("tensorrt-stubs") or [] if file.name == "tensorrt.pyi")
    except PackageNotFoundError:
        missing("tensorrt-stubs")
    members: dict[str, set[str]] = {}
    for kind in ast.parse(repaired(Path(str(stub.locate())).read_text())).body:
        if isinstance(kind, ast.ClassDef):
            for node in kind.body:
                name = getattr(node, "name", None) or getattr(getattr(node, "target", None), "id", None)
                if name is not None:
                    members.setdefault(name, set()).add(kind.name)
    return members


def lacking(sources: list[Path], trt: Any, members: dict[str, set[str]]) -> tuple[set[str], set[str]]:
    """The names of TensorRT's that sources use, and those of them that `trt` does not have."""
    used, absent = set(), set()
    for source in sources:
        for root, *names in attributes(ast.parse(source.read_text())):
            if root in ("trt", "tensorrt"):
                used.add(names[0])
                place: Any = trt
                for name in names:
                    place = getattr(place, name, None)
                if place is None:
                    absent.add(".".join(names))
            for name in names:
                # A method of an object, whose class is not known here: one of the classes that it may be must have it.
                kinds = members.get(name, set())
                if kinds:
                    used.add(name)
                    if not any(hasattr(getattr(trt, kind, None), name) for kind in kinds):
                        absent.add(name)
    return used, absent


def test_every_name_of_tensorrt_exists_in_tensorrt_for_rtx() -> None:
    used, absent = lacking(SOURCES, rtx(), stub_members())
    assert {"tensorrt.py", "timing_cache.py"} <= {source.name for source in SOURCES}
    expected = {"Runtime", "TensorIOMode", "deserialize_cuda_engine", "execute_async_v3", "create_timing_cache"}
    assert expected | {"set_input_shape", "get_tensor_profile_shape", "set_tensor_address", "combine"} <= used
    assert absent - set(RTX_LACKS) == set()


def test_the_comparison_of_names_sees_what_is_not_there(tmp_path: Path) -> None:
    source = tmp_path / "old.py"
    source.write_text(
        "trt.Builder(log).build_engine(network, config)\nengine.num_bindings\nconfig.max_workspace_size = 1\n"
    )
    trt, members = rtx(), stub_members()
    members |= {"build_engine": {"Builder"}, "num_bindings": {"ICudaEngine"}, "max_workspace_size": {"IBuilderConfig"}}
    assert lacking([source], trt, members)[1] == {"build_engine", "num_bindings", "max_workspace_size"}
    source.write_text("trt.BuilderFlag.INT8\ntrt.nonsense\n")
    assert lacking([source], trt, members)[1] >= {"nonsense"}
