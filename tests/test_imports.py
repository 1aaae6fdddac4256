"""Imports run downwards only, between packages and inside them; an import inside a function counts as well."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from bench.import_arrows import Arrow, arrows, imported, modules, package_of

ROOT = Path(__file__).parents[1]
# What each package may import beside itself.
BETWEEN = {
    "crqat": {"core", "train", "export", "runtime_eval", "pipeline"},
    "pipeline": {"core", "train", "export", "runtime_eval"},
    "export": {"core", "train"},
    "train": {"core"},
    "runtime_eval": {"core"},
    "core": set(),
}
# Inside a package a room imports those before it. Rooms on one line import neither each other nor what comes after.
ORDER: dict[str, list[set[str]]] = {
    "train": [
        {"arguments", "checkpoint", "compilers", "config", "distributed", "own_code", "untrained"},
        {"device", "shares", "data"},
        {"graph", "models"},
        {"placement"},
        {"quantizers"},
        {"ptq"},
        {"quantized_model"},
        {"nncf", "load_trained"},
        {"training"},
        {"scaling"},
    ],
    "export": [
        {"config", "graph"}, {"qdq", "simulator"}, {"verification", "analysis", "to_onnx"}, {"write_models"},
        {"stage", "export_model"},
    ],
    "runtime_eval": [
        {"config", "machine"}, {"runners", "trt"}, {"exported", "measure"}, {"benchmark"}, {"board"}, {"__main__"},
    ],
    "pipeline": [
        {"streams", "console", "gate"}, {"recipe", "report"}, {"stages", "cli_options", "measure"},
        {"commands", "study"}, {"cli_stages", "cli_tools"}, {"cli_quantize", "cli_expert"}, {"cli"},
    ],
}  # fmt: skip
# What a room imports against the order, with the reason.
ALLOWED = {
    ("runtime_eval", "runners", "trt"): "a plan is run by what its description says of it",
    ("runtime_eval", "trt", "runners"): "the builder reads the header of an ONNX file and tries an engine once",
    ("runtime_eval", "board", "__main__"): "a bundle starts by the same command as the package",
    ("pipeline", "stages", "commands"): "a recipe that asks for mixed precision gets its bit widths from that command",
}


# Imported inside functions: a board that reads no image files needs no Pillow.
EXTRA: dict[str, set[str]] = {
    "core": {"core.image_file: PIL.Image", "core.image_file: PIL.ImageOps"},
    "runtime_eval": set(),
}


@pytest.fixture(scope="module")
def found() -> list[Arrow]:
    return arrows(ROOT)


def test_packages_import_downwards(found: list[Arrow]) -> None:
    upward = [
        f"{arrow.source} -> {arrow.target}"
        for arrow in found
        if package_of(arrow.source) != package_of(arrow.target)
        and package_of(arrow.target) not in BETWEEN[package_of(arrow.source)]
    ]
    assert len(found) > 500 and not upward


@pytest.mark.parametrize("package", ORDER)
def test_rooms_import_downwards(package: str, found: list[Arrow]) -> None:
    level = {room: index for index, rooms in enumerate(ORDER[package]) for room in rooms}
    there = {name.split(".")[1] for name in modules(ROOT) if name.startswith(f"{package}.")}
    assert there == set(level), "a new room takes its place in ORDER"
    upward, used = [], set()
    for arrow in found:
        if not (arrow.source.startswith(f"{package}.") and arrow.target.startswith(f"{package}.")):
            continue
        source, target = arrow.source.split(".")[1], arrow.target.split(".")[1]
        if source == target or level[target] < level[source]:
            continue
        if (package, source, target) in ALLOWED:
            used.add((package, source, target))
        else:
            upward.append(f"{arrow.source} -> {arrow.target}")
    assert not upward
    assert used == {pair for pair in ALLOWED if pair[0] == package}, "an exception that is not needed any more"


@pytest.mark.parametrize("package", ["core", "runtime_eval"])
def test_what_ships_to_boards_needs_numpy_and_runtimes_only(package: str) -> None:
    allowed = {*sys.stdlib_module_names, "crqat", "numpy"}
    allowed |= (
        {"onnxruntime", "openvino", "tensorrt", "pycuda", "tensorrt_rtx", "cuda"}
        if package == "runtime_eval"
        else set()
    )
    others = {
        f"{name}: {module}"
        for name, path in modules(ROOT).items()
        if name.split(".")[0] == package
        for module, _ in imported(ast.parse(path.read_text()))
        if module.split(".")[0] not in allowed
    }
    assert others == EXTRA[package]
