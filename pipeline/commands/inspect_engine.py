"""The `inspect` command: shows the TensorRT engine of a file layer by layer."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from crqat.core import run_directory, strict_json, typed_json
from crqat.core.errors import ToolError, UsageError
from crqat.core.results.engine import BUILT, Builder, Coverage, EngineLayer, EngineReport, Engines, LayerCounts
from crqat.core.results.export import ExportPayload
from crqat.core.typed_json import to_json
from crqat.pipeline import console
from crqat.pipeline.console import printable
from crqat.runtime_eval.trt import engine, plan_layers
from crqat.runtime_eval.trt import versions as tensorrt_api
from crqat.train.models import untrusted_onnx

if TYPE_CHECKING:
    import onnx

_COLUMNS = ("layer", "kind", "operands", "output", "M MACs", "ONNX nodes")
_SYNC = ("sync", "shape")
_SHOWN_UNCOVERED = 20
_AGAIN = "give an .onnx file, an engine report of this crqat or an inspector's JSON"


def inspect(path: Path, options: engine.EngineOptions, bisect: bool, out: Path | None) -> None:
    """Build and show the engine of an ONNX file, or show an engine report or an inspector's JSON.

    Args:
        path: An .onnx file, an engine report (engine.json) or the JSON of TensorRT's engine inspector.
        options: Options of the engine build.
        bisect: If the build fails, write the smallest part of the file that fails too to the current directory.
        out: File for the engine report of an .onnx file; None writes none.

    Raises:
        UsageError: The file is of another kind, or no engine can be built from it.
        ToolError: TensorRT's builder is not installed or crashed, or a file cannot be written.
    """
    if not path.is_file():
        msg = f"{path}: {'a directory; give an .onnx file in it' if path.is_dir() else 'no such file'}"
        raise UsageError(msg)
    if path.suffix != ".onnx":
        reports = read(path)
        for name, report in reports:
            if report.status == BUILT:
                show(name, report)
        console.give(engines=dict(reports))
        unbuilt = [f"{name}: {report.status}" for name, report in reports if report.status != BUILT]
        if unbuilt:
            msg = f"{path}: {len(unbuilt)} of {len(reports)} engines were not built, first {unbuilt[0]}"
            raise UsageError(msg)
        return
    model = untrusted_onnx.read(path)
    untrusted_onnx.check(path, model)
    report = engine.build(path, options, _macs(path, model))
    if out is not None:
        _write(out, typed_json.text(report).encode())
    if report.status == BUILT:
        if bisect:
            click.echo(f"{path} builds: there is nothing to bisect")
        show(str(path), report)
        console.give(engines={str(path): report})
        return
    if bisect and model.graph.node:
        cut = _cut(model, options)
        target = Path(f"{path.stem}.cut.onnx")
        _write(target, cut.SerializeToString())
        click.echo(
            f"wrote {target}: {len(cut.graph.node)} of {len(model.graph.node)} nodes, which fail in the same way:"
        )
        for node in cut.graph.node:
            click.echo(printable(f"  {node.op_type} {node.name}"))
    msg = f"{path}: {report.status}"
    # A builder that crashed or was stopped says nothing about the file.
    raise ToolError(msg) if report.failure is not None and report.failure.stage == "process" else UsageError(msg)


def _macs(path: Path, model: onnx.ModelProto) -> dict[str, int] | None:
    """Return the MACs of each layer, from the manifest next to the file or else from the file; None if unknown."""
    from crqat.export.graph.macs import file_macs

    if (path.parent / run_directory.MANIFEST).is_file():
        manifest = run_directory.read_manifest(path.parent)
        for entry in run_directory.payload_of(ExportPayload, path.parent, manifest).models:
            if entry.file == path.name and entry.macs is not None:
                return entry.macs
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
                failure = engine.build(file, options).failure
                console.say(f"{len(part.graph.node)} nodes: {'refused' if failure else 'built'}")
                # Numbers in the text are line numbers and addresses; the rest distinguishes this failure from others.
                known[content] = re.sub(r"\d+", "#", failure.rule) if failure else None
            return known[content]

        return smallest_cut(model, refused)


def read(path: Path) -> list[tuple[str, EngineReport]]:
    """Return (name, engine report) of each engine that a JSON file describes.

    The file is an engine.json, a single engine report, or the JSON of TensorRT's engine inspector.

    Raises:
        UsageError: The file is of another kind, damaged, or describes no engine.
        ToolError: The file cannot be read.
    """
    try:
        data = strict_json.read(path)
        if isinstance(data, dict) and "Layers" in data:
            return [(str(path), of_inspector(path, data))]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        msg = f"{path}: not an .onnx file, an engine report or an inspector's JSON ({type(error).__name__}: {error})"
        raise UsageError(msg) from error
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}"
        raise ToolError(msg) from error
    if isinstance(data, dict) and "engines" in data:
        engines = typed_json.checked(Engines, data, str(path), _AGAIN).engines
        if not engines:
            msg = f"{path}: holds no engine report: the benchmark that wrote it built no engine"
            raise UsageError(msg)
        return list(engines.items())
    report = typed_json.checked(EngineReport, data, str(path), _AGAIN)
    return [(report.model, report)]


def of_inspector(path: Path, information: Mapping[str, Any]) -> EngineReport:
    """Return an engine report with the layers in the engine inspector's JSON, which names no builder and no GPU."""
    found = engine.Found(source="engine inspector")
    engine.describe_plan(found, plan_layers.from_inspector(information), None)
    report = engine.report_of(path, engine.EngineOptions(), tensorrt_api.TENSORRT, found)
    return replace(report, builder=Builder("unknown", "unknown"), compute_capabilities=["unknown"])


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        msg = f"{path}: cannot be written: {error.strerror}"
        raise ToolError(msg) from error


def show(name: str, report: EngineReport) -> None:
    """Print the table of an engine's layers, then coverage, counts and the builder's messages."""
    if report.coverage is None or report.counts is None:
        click.echo(printable(f"{name}: {report.status}"))
        return
    rows = [_row(layer) for layer in report.layers if layer.kind not in _SYNC]
    console.show_table(printable(f"{name}: the engine's layers"), _COLUMNS, rows)
    for line in _lines(report, report.coverage, report.counts):
        click.echo(printable(line))


def _row(layer: EngineLayer) -> list[str]:
    matmul = layer.kind == "matmul"
    operands = f"{_first(layer.inputs)} x {layer.weights or '?'}" if matmul else ", ".join(layer.inputs)
    cells = [
        _title(layer.name),
        layer.type if layer.kind in ("matmul", "other") else layer.kind,
        operands,
        ", ".join(layer.outputs),
        f"{layer.macs / 1e6:.3f}" if layer.macs else "",
        ", ".join(_short(layer.nodes)),
    ]
    return [printable(cell) for cell in cells]


def _first(values: list[str]) -> str:
    return values[0] if values else "?"


def _title(name: str) -> str:
    """Return a readable layer name, without the numbers that TensorRT's compiler adds.

    The name of a kernel that the compiler generated becomes a list of operations: "__myl_AddRelu_myl0_3" becomes "Add
    Relu".
    """
    body = re.sub(r"_myl\d+_\d+$", "", name)
    if body.startswith("__myl_"):
        words = " ".join(re.findall("[A-Z][a-z]*", body.removeprefix("__myl_")))
        return words.replace("Mul Min Max Roun Cast", "Quantize")
    return body


def _short(nodes: list[str]) -> list[str]:
    """Return the ONNX nodes without QuantizeLinear and DequantizeLinear; if there are no others, the first node."""
    return [node for node in nodes if not node.endswith(("QuantizeLinear", "DequantizeLinear"))] or nodes[:1]


def _lines(report: EngineReport, covered: Coverage, counts: LayerCounts) -> Iterator[str]:
    if covered.by_macs is not None and covered.macs is not None:
        yield (
            f"INT8 coverage: {100 * covered.by_macs:.2f} % of {covered.macs / 1e6:.1f} M MACs, "
            f"{covered.int8_nodes} of {covered.nodes} Conv and Gemm"
        )
    elif covered.by_count is not None:
        yield f"INT8 coverage: {covered.int8_nodes} of {covered.nodes} Conv and Gemm layers; MACs are not known"
    uncovered = covered.uncovered or []
    for entry in uncovered[:_SHOWN_UNCOVERED]:
        share = f", {100 * entry.macs / covered.macs:.2f} % of the MACs" if entry.macs and covered.macs else ""
        yield f"  not INT8: {entry.node}: {entry.reason}{share}"
    if len(uncovered) > _SHOWN_UNCOVERED:
        yield f"  and {len(uncovered) - _SHOWN_UNCOVERED} more"
    kinds = ", ".join(f"{count} {kind}" for kind, count in to_json(counts).items() if kind != "layers")
    yield f"{counts.layers} layers: {kinds}"
    for message in report.messages:
        at = f"; first at {message.nodes[0]}" if message.nodes else ""
        yield f"{message.severity}: {message.message} ({message.count} times{at})"
    built = f"{report.builder.name} {report.builder.version}, {', '.join(report.compute_capabilities)}"
    if report.seconds is not None and report.size_bytes is not None:
        low, usual, high = report.batch
        batch = f"batch {low}" if low == high else f"batch {low} to {high}, best at {usual}"
        built += f", {batch}, built in {report.seconds:.1f} s, {report.size_bytes / 1e6:.2f} MB"
    yield f"{built}; read from the {report.source}"
    yield from report.notices
