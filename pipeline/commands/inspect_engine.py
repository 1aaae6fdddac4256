"""The `inspect` command: a file's TensorRT engine, layer by layer, as a person reads it."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from crqat.core import run_directory, strict_json
from crqat.core.errors import ToolError, UsageError
from crqat.pipeline import console, untrusted_onnx
from crqat.pipeline.console import printable
from crqat.runtime_eval.trt import coverage, engine, plan_layers
from crqat.runtime_eval.trt import versions as tensorrt_api

if TYPE_CHECKING:
    import onnx

_COLUMNS = ("layer", "kind", "operands", "output", "M MACs", "ONNX nodes")
_SYNC = ("sync", "shape")
_SHOWN_UNCOVERED = 20


def inspect(path: Path, options: engine.EngineOptions, bisect: bool, out: Path | None) -> None:
    """Show the engine of an ONNX file, which is built, or of a report or an inspector's JSON, which is read.

    Args:
        path: An .onnx file, an engine report (engine.json) or the JSON of TensorRT's engine inspector.
        options: How to build.
        bisect: If the file cannot be built, write the smallest part of it that cannot either to the current directory.
        out: Where to write the report of an engine that was built; None writes none.

    Raises:
        UsageError: The file is none of these, or no engine can be made of it.
        ToolError: There is no builder, or a file cannot be written.
    """
    if not path.is_file():
        msg = f"{path}: {'a directory; name an .onnx file in it' if path.is_dir() else 'no such file'}"
        raise UsageError(msg)
    if path.suffix != ".onnx":
        reports = read(path)
        for name, report in reports:
            if report["status"] == "built":
                show(name, report)
        unbuilt = [f"{name}: {report['status']}" for name, report in reports if report["status"] != "built"]
        if unbuilt:
            msg = f"{path}: {len(unbuilt)} of {len(reports)} engines were not built, first {unbuilt[0]}"
            raise UsageError(msg)
        return
    model = untrusted_onnx.read(path)
    untrusted_onnx.check(path, model)
    report = engine.build(path, options, _macs(path, model))
    if out is not None:
        _write(out, json.dumps(report, indent=1).encode())
    if report["status"] == "built":
        if bisect:
            click.echo(f"{path} builds: there is nothing to cut")
        show(str(path), report)
        return
    if bisect and model.graph.node:
        cut = _cut(model, options)
        target = Path(f"{path.stem}.cut.onnx")
        _write(target, cut.SerializeToString())
        click.echo(f"wrote {target}: {len(cut.graph.node)} of {len(model.graph.node)} nodes, which are refused alike:")
        for node in cut.graph.node:
            click.echo(printable(f"  {node.op_type} {node.name}"))
    msg = f"{path}: {report['status']}"
    # A builder that died or was stopped says nothing of the file.
    raise ToolError(msg) if report["failure"]["stage"] == "process" else UsageError(msg)


def _macs(path: Path, model: onnx.ModelProto) -> dict[str, int] | None:
    """The MACs that the export's manifest beside the file states, else what the file itself says."""
    from crqat.export.graph.macs import file_macs

    if (path.parent / run_directory.MANIFEST).is_file():
        manifest = run_directory.read_manifest(path.parent)
        for entry in manifest.payload.get("models", []):
            if entry.get("file") == path.name and "macs" in entry:
                macs: dict[str, int] = entry["macs"]
                return macs
    return file_macs(model)


def _cut(model: onnx.ModelProto, options: engine.EngineOptions) -> onnx.ModelProto:
    from crqat.export.analysis.smallest_failing_part import smallest_cut

    known: dict[bytes, str | None] = {}
    with tempfile.TemporaryDirectory() as scratch:

        def refused(part: onnx.ModelProto) -> str | None:
            content = part.SerializeToString()
            if content not in known:
                file = Path(scratch) / "part.onnx"
                file.write_bytes(content)
                failure = engine.build(file, options)["failure"]
                console.say(f"{len(part.graph.node)} nodes: {'refused' if failure else 'built'}")
                # Numbers in it are line numbers and addresses; what is left tells this failure from another.
                known[content] = re.sub(r"\d+", "#", failure["rule"]) if failure else None
            return known[content]

        return smallest_cut(model, refused)


def read(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The engine reports in a file by their names: of an engine.json, of one report, or of an inspector's JSON.

    Raises:
        UsageError: It is none of these, or what it holds cannot be shown.
        ToolError: It cannot be read.
    """
    try:
        data = strict_json.read(path)
        if "Layers" in data:
            return [(str(path), of_inspector(path, data))]
        if data.get("engines") == {}:
            msg = f"{path}: holds no engine report; none was built in that benchmark"
            raise UsageError(msg)
        reports = data["engines"] if "engines" in data else {data["model"]: data}
        versions = {report["schema_version"] for report in reports.values()}
        if versions - {engine.SCHEMA_VERSION}:
            msg = f"{path}: schema_version {versions}, this crqat reads {engine.SCHEMA_VERSION}; build again"
            raise UsageError(msg)
        for name, report in reports.items():
            _ = report["coverage"], report["counts"], report["layers"], report["builder"]["name"]
            if report["status"] == "built":  # everything that `show` shows can be shown
                _ = name.lower(), [_row(layer) for layer in report["layers"]], list(_lines(report))
        return list(reports.items())
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        msg = f"{path}: not an .onnx file, an engine report or an inspector's JSON ({type(error).__name__}: {error})"
        raise UsageError(msg) from error
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}"
        raise ToolError(msg) from error


def of_inspector(path: Path, information: dict[str, Any]) -> dict[str, Any]:
    """The report of an engine of which only the inspector's JSON is known."""
    return {
        **engine.report_of(path, engine.EngineOptions(), tensorrt_api.TENSORRT),
        **coverage.summarize(plan_layers.from_inspector(information), None),
        "builder": {"name": "unknown", "version": "unknown"},
        "compute_capabilities": ["unknown"],
        "source": "engine inspector",
    }


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        msg = f"{path}: cannot be written: {error.strerror}"
        raise ToolError(msg) from error


def show(name: str, report: dict[str, Any]) -> None:
    """The table of an engine's layers, then coverage, counts, and what the builder said."""
    if report["status"] != "built":
        click.echo(printable(f"{name}: {report['status']}"))
        return
    rows = [_row(layer) for layer in report["layers"] if layer["kind"] not in _SYNC]
    console.show_table(printable(f"{name}: the engine's layers"), _COLUMNS, rows)
    for line in _lines(report):
        click.echo(printable(line))


def _row(layer: dict[str, Any]) -> list[str]:
    matmul = layer["kind"] == "matmul"
    operands = f"{_first(layer['inputs'])} x {layer['weights'] or '?'}" if matmul else ", ".join(layer["inputs"])
    cells = [
        _title(layer["name"]),
        f"{layer['type']}" if layer["kind"] in ("matmul", "other") else layer["kind"],
        operands,
        ", ".join(layer["outputs"]),
        f"{layer['macs'] / 1e6:.3f}" if layer["macs"] else "",
        ", ".join(_short(layer["nodes"])),
    ]
    return [printable(cell) for cell in cells]


def _first(values: list[str]) -> str:
    return values[0] if values else "?"


def _title(name: str) -> str:
    """A generated kernel's name is the list of its operations; the others carry a number of the compiler's."""
    body = re.sub(r"_myl\d+_\d+$", "", name)
    if body.startswith("__myl_"):
        words = " ".join(re.findall("[A-Z][a-z]*", body.removeprefix("__myl_")))
        return words.replace("Mul Min Max Roun Cast", "Quantize")
    return body


def _short(nodes: list[str]) -> list[str]:
    """Without quantizers, of which the precisions tell, unless there is nothing else."""
    return [node for node in nodes if not node.endswith(("QuantizeLinear", "DequantizeLinear"))] or nodes[:1]


def _lines(report: dict[str, Any]) -> Iterator[str]:
    covered, number = report["coverage"], report["counts"]
    if covered["by_macs"] is not None:
        yield (
            f"INT8 coverage: {100 * covered['by_macs']:.2f} % of {covered['macs'] / 1e6:.1f} M MACs, "
            f"{covered['int8_nodes']} of {covered['nodes']} Conv and Gemm"
        )
    elif covered["by_count"] is not None:
        yield f"INT8 coverage: {covered['int8_nodes']} of {covered['nodes']} Conv and Gemm layers; MACs are not known"
    for entry in covered["uncovered"][:_SHOWN_UNCOVERED]:
        share = f", {100 * entry['macs'] / covered['macs']:.2f} % of the MACs" if entry["macs"] else ""
        yield f"  not INT8: {entry['node']}: {entry['reason']}{share}"
    if len(covered["uncovered"]) > _SHOWN_UNCOVERED:
        yield f"  and {len(covered['uncovered']) - _SHOWN_UNCOVERED} more"
    kinds = ", ".join(f"{count} {kind}" for kind, count in number.items() if kind != "layers")
    yield f"{number['layers']} layers: {kinds}"
    for remark in report["remarks"]:
        at = f"; first at {remark['nodes'][0]}" if remark["nodes"] else ""
        yield f"{remark['severity']}: {remark['message']} ({remark['count']} times{at})"
    built = f"{report['builder']['name']} {report['builder']['version']}, {', '.join(report['compute_capabilities'])}"
    if report["seconds"] is not None:
        low, usual, high = report["batch"]
        batch = f"batch {low}" if low == high else f"batch {low} to {high}, best at {usual}"
        built += f", {batch}, built in {report['seconds']:.1f} s, {report['size_bytes'] / 1e6:.2f} MB"
    yield f"{built}; read from the {report['source']}"
    yield from report["notices"]
