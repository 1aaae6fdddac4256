from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from crqat.core.errors import ToolError, UsageError
from crqat.runtime_eval.machine import host
from crqat.runtime_eval.trt import versions as tensorrt_api
from crqat.runtime_eval.trt.versions import capability, check_targets, choose, installed, load, network_flags
from tests.needs import require


@pytest.mark.parametrize(
    ("module", "version", "typing", "explicit_batch", "flags"),
    [
        ("tensorrt", "8.5.2.2", "weak", True, ("FP16", "INT8")),
        ("tensorrt", "8.6.1", "weak", True, ("FP16", "INT8")),
        ("tensorrt", "10.3.0", "flag", False, ("FP16", "INT8")),
        ("tensorrt", "10.16.1.11", "flag", False, ("FP16", "INT8")),
        ("tensorrt", "11.4.0.106", "strong", False, ()),
        ("tensorrt", "12.0rc1", "strong", False, ()),
        ("tensorrt_rtx", "1.7.1.116", "strong", False, ()),
    ],
)
def test_rows(module: str, version: str, typing: str, explicit_batch: bool, flags: tuple[str, ...]) -> None:
    row = capability(module, version)
    assert (row.module, row.typing, row.explicit_batch, row.precision_flags) == (module, typing, explicit_batch, flags)
    assert row.timing_cache == (module == "tensorrt")


def test_versions_that_are_too_old() -> None:
    for version in ("8.4.3", "7.1", "unknown"):
        with pytest.raises(ToolError, match=f"tensorrt {version} is older"):
            capability("tensorrt", version)


def module(version: str, **members: int) -> Any:
    """The one enumeration that `network_flags` looks at."""
    return SimpleNamespace(__version__=version, NetworkDefinitionCreationFlag=SimpleNamespace(__members__=members))


@pytest.mark.parametrize(
    ("version", "members", "flags", "names"),
    [
        ("8.6.1", {"EXPLICIT_BATCH": 0, "EXPLICIT_PRECISION": 1}, 1, ["EXPLICIT_BATCH"]),
        ("10.3.0", {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}, 2, ["STRONGLY_TYPED"]),
        ("11.1.0", {"STRONGLY_TYPED": 0, "PREFER_JIT_PYTHON_PLUGINS": 1}, 1, ["STRONGLY_TYPED"]),
    ],
)
def test_the_same_flag_has_another_bit_in_another_version(
    version: str, members: dict[str, int], flags: int, names: list[str]
) -> None:
    assert network_flags(module(version, **members), capability("tensorrt", version)) == (flags, names)


def test_a_module_that_is_not_what_its_version_says() -> None:
    with pytest.raises(ToolError, match=r"tensorrt 10\.3\.0 has no network flag STRONGLY_TYPED"):
        network_flags(module("10.3.0", EXPLICIT_BATCH=0), capability("tensorrt", "10.3.0"))


def test_targets() -> None:
    check_targets("tensorrt_rtx", ("SM80", "SM86", "SM89", "SM120"))
    check_targets("tensorrt", ())
    for name, words in (
        ("SM87", "Jetson Orin.*does not build for it.*build with tensorrt on the device"),
        ("SM90", "Hopper"),
        ("SM1", "supports only SM75, SM80"),
    ):
        with pytest.raises(UsageError, match=words):
            check_targets("tensorrt_rtx", ("SM80", name))
    with pytest.raises(UsageError, match="tensorrt builds for the GPU of this machine alone"):
        check_targets("tensorrt", ("SM87",))


def test_the_table_is_true_of_the_builder_that_is_here() -> None:
    require("tensorrt_rtx")
    trt = load("tensorrt_rtx")
    row = capability("tensorrt_rtx", trt.__version__)
    assert installed("tensorrt_rtx") == trt.__version__
    assert set(trt.ComputeCapability.__members__) - {"NONE", "CURRENT"} == set(row.compute_capabilities)
    assert not {"FP16", "INT8"} & set(trt.BuilderFlag.__members__)
    assert "EXPLICIT_BATCH" not in trt.NetworkDefinitionCreationFlag.__members__
    assert hasattr(trt.Builder, "create_optimization_profile") == row.profiles
    assert network_flags(trt, row) == (1, ["STRONGLY_TYPED"])


def test_type_stubs_are_no_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stubbed_trt").mkdir()
    (tmp_path / "stubbed_trt" / "__init__.pyi").write_text("")
    (tmp_path / "real_trt.py").write_text("__version__ = '1.2'")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(tensorrt_api, "INSTALL_HINTS", {"stubbed_trt": "install it", "missing_trt": "get it"})
    assert installed("stubbed_trt") is None
    assert installed("real_trt") == "1.2"
    assert installed("missing_trt") is None
    with pytest.raises(ToolError, match="only type stubs of it; install it"):
        load("stubbed_trt")
    with pytest.raises(ToolError, match=r"missing_trt cannot be imported: No module.*; get it"):
        load("missing_trt")
    sys.modules.pop("stubbed_trt", None)


@pytest.mark.parametrize(
    ("here", "gpu", "chosen"),
    [
        (("tensorrt", "tensorrt_rtx"), True, "tensorrt"),
        (("tensorrt", "tensorrt_rtx"), False, "tensorrt_rtx"),
        (("tensorrt",), False, None),
        (("tensorrt_rtx",), True, "tensorrt_rtx"),
        ((), True, None),
    ],
)
def test_choice(monkeypatch: pytest.MonkeyPatch, here: tuple[str, ...], gpu: bool, chosen: str | None) -> None:
    monkeypatch.setattr(tensorrt_api, "installed", lambda name: "1" if name in here else None)
    monkeypatch.setattr(host, "cuda_device", lambda: gpu)
    assert choose() == chosen
