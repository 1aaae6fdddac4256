"""Builds a TensorRT engine and its report: `python -m crqat.runtime_eval.trt.engine FILE --report JSON`.

Each build runs in its own process: a failed build can silently spoil the next one in the same process, and a builder
that crashes or hangs affects nothing else. Without a GPU, tensorrt_rtx builds the engine, and the layers are read from
its verbose log. With a GPU, tensorrt builds the engine for this GPU, and the layers are read from the engine inspector.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from crqat.core import failures, run_directory, strict_json, typed_json
from crqat.core.errors import ToolError, UsageError
from crqat.core.results.engine import (
    BUILT,
    Builder,
    BuilderMessage,
    BuildError,
    Coverage,
    EngineLayer,
    EngineReport,
    LayerCounts,
)
from crqat.runtime_eval.machine import host
from crqat.runtime_eval.runners import onnx_header
from crqat.runtime_eval.trt import coverage, plan_file, plan_layers
from crqat.runtime_eval.trt import versions as tensorrt_api
from crqat.runtime_eval.trt.builder import Batch, Build, BuildFailure

# Working directory of the building process: `python -m` searches it first.
PACKAGES = Path(__file__).parents[3]
_PROGRAM = "crqat.runtime_eval.trt.engine"
# Type of an export file's float operations, by the target in its metadata.
_PRECISIONS = {"float": "float32", "float16": "float16"}
_PARSING = re.compile(r"Parsing node: (?P<node>.*) \[(?P<operator>\w+)\]")
_PARSED = "crqat: the file has been parsed"


@dataclass(frozen=True)
class EngineOptions:
    """Options of an engine build.

    Attributes:
        builder: "tensorrt" or "tensorrt_rtx"; None selects one that works on this machine.
        batch: Minimum, optimum and maximum batch size; three equal values make the engine static.
        compute_capabilities: GPUs to build for, such as SM89, if the builder offers a choice; empty for its default.
        time_limit_seconds: Seconds after which a build is stopped.
        timing_cache: File with measured kernel times, which is read if it exists and then replaced; not used by
            tensorrt_rtx, which measures nothing.
    """

    builder: str | None = None
    batch: Batch = (1, 1, 64)
    compute_capabilities: tuple[str, ...] = ()
    time_limit_seconds: float = 600.0
    timing_cache: Path | None = None


def build(
    model: Path, options: EngineOptions, macs: Mapping[str, int] | None = None, engine: Path | None = None
) -> EngineReport:
    """Build an engine in a separate process.

    Args:
        model: The ONNX file.
        options: Options of the build.
        macs: Multiply-accumulates of each Conv and Gemm by node name, from the export's manifest; None if not known.
        engine: File for the engine; None keeps only the report.

    Returns:
        The engine report, even if no engine can be built from the file.

    Raises:
        ToolError: No builder is installed, or it does not start.
        UsageError: The file does not exist, or the builder does not support a compute capability.
    """
    if not model.is_file():
        msg = f"{model}: no such file"
        raise UsageError(msg)
    builder = options.builder or tensorrt_api.choose()
    if builder is None or tensorrt_api.installed(builder) is None:
        builder = builder or tensorrt_api.RTX
        msg = f"{builder} is not installed, but the engine build needs it; {tensorrt_api.INSTALL_HINTS[builder]}"
        raise ToolError(msg)
    tensorrt_api.check_targets(builder, options.compute_capabilities)
    with tempfile.TemporaryDirectory() as scratch:
        report, log, given = Path(scratch) / "report.json", Path(scratch) / "log", Path(scratch) / "macs.json"
        command = [sys.executable, "-m", _PROGRAM, str(model.resolve()), "--report", str(report)]
        command += ["--builder", builder, "--log", str(log), "--batch", *map(str, options.batch)]
        for name in options.compute_capabilities:
            command += ["--compute-capability", name]
        if macs is not None:
            given.write_text(json.dumps(dict(macs)))
            command += ["--macs", str(given)]
        for option, path in (("--engine", engine), ("--timing-cache", options.timing_cache)):
            command += [] if path is None else [option, str(path.resolve())]
        start = time.monotonic()
        cause = _run(command, options.time_limit_seconds)
        if cause is None:
            return typed_json.read(EngineReport, report, "build again")
        node, operator = _last_parsed(log)
    seconds = round(time.monotonic() - start, 3)
    return report_of(
        model, options, builder, Found(failure=BuildError("process", node, operator, cause), seconds=seconds)
    )


def _run(command: list[str], limit: float) -> str | None:
    """Run the command in a process; return None if it wrote its report, else why the process failed."""
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit, cwd=PACKAGES, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not finished after {limit:g} s, stopped"
    code = result.returncode
    if code == 0:
        return None
    words = [line.strip() for line in result.stderr.decode(errors="replace").splitlines() if line.strip()]
    last = words[-1] if words else ""
    if code == ToolError.exit_code and last.startswith(f"{_PROGRAM}: "):
        raise ToolError(last.removeprefix(f"{_PROGRAM}: "))
    cause = f"its process was ended by {failures.signal_name(-code)}" if code < 0 else f"its process exited with {code}"
    return f"{cause}, last output: {last}" if last else cause


def _last_parsed(log: Path) -> tuple[str | None, str | None]:
    """Return (node, operator) that was being parsed when the process ended; (None, None) if it was not parsing."""
    text = log.read_text(errors="replace") if log.is_file() else ""
    found = [match for match in map(_PARSING.search, text.splitlines()) if match]
    if not found or _PARSED in text:
        return None, None
    return found[-1]["node"], found[-1]["operator"]


@dataclass
class Found:
    """Facts about an engine, collected during its build; `EngineReport` describes the attributes of the same names."""

    failure: BuildError | None = None
    flags: list[str] = field(default_factory=list)
    precisions: list[str] = field(default_factory=list)
    seconds: float | None = None
    size_bytes: int | None = None
    engine_sha256: str | None = None
    timing_cache_sha256: str | None = None
    source: str | None = None
    layers: list[EngineLayer] = field(default_factory=list)
    coverage: Coverage | None = None
    counts: LayerCounts | None = None
    messages: list[BuilderMessage] = field(default_factory=list)


def report_of(model: Path, options: EngineOptions, builder: str, found: Found) -> EngineReport:
    """Return the engine report of a finished or failed build.

    Args:
        model: The ONNX file.
        options: Options of the build.
        builder: Builder that was used.
        found: Facts collected during the build.
    """
    failure, status, notices = found.failure, BUILT, []
    if failure is not None:
        at = f" at {failure.node}" if failure.node else ""
        operator = f" [{failure.operator}]" if failure.operator else ""
        status = f"failed: {failure.stage}{at}{operator}: {failure.rule}"
    if builder == tensorrt_api.RTX:
        notices.append("tensorrt_rtx does not build for Jetson (SM87, SM110) or SM90: this plan is not for them")
    return EngineReport(
        model=model.name,
        model_sha256=run_directory.sha256_file(model),
        status=status,
        builder=Builder(builder, tensorrt_api.installed(builder)),
        compute_capabilities=list(options.compute_capabilities) or ["default"],
        batch=options.batch,
        notices=notices,
        **vars(found),
    )


def build_here(
    model: Path, options: EngineOptions, macs: Mapping[str, int] | None, engine: Path | None, log: Path
) -> EngineReport:
    """Build an engine in this process; only `main` uses it, and other callers use `build`.

    Args:
        model: The ONNX file.
        options: Options of the build; the parent process enforces the time limit.
        macs: As in `build`.
        engine: As in `build`.
        log: File for the builder's messages, written as they arrive.

    Returns:
        The engine report, as in `build`.

    Raises:
        ToolError: The builder cannot be imported, does not start, or does not report what it built.
        UsageError: As in `build`.
    """
    name = options.builder or tensorrt_api.choose() or tensorrt_api.RTX
    trt = tensorrt_api.load(name)
    if not model.is_file():
        msg = f"{model}: no such file"
        raise UsageError(msg)
    tensorrt_api.check_targets(name, options.compute_capabilities)
    start = time.monotonic()
    with log.open("w", errors="replace", buffering=1) as file:
        going = Build(trt, tensorrt_api.capability(name, trt.__version__), lambda *words: print(*words, file=file))
        found = Found()
        try:
            serialized = going.run(
                model,
                options.batch,
                options.compute_capabilities,
                options.timing_cache,
                lambda: print(_PARSED, file=file),
            )
        except BuildFailure as failure:
            found.failure = failure.reason
        found.seconds = round(time.monotonic() - start, 3)
        found.flags, found.precisions = going.flags, going.precisions
        found.messages = coverage.warnings(going.messages)
        if found.failure is not None:
            return report_of(model, options, name, found)
        layers, unread = plan_layers.from_log([text for _, text in going.messages])
        found.source = "verbose log"
        if name == tensorrt_api.TENSORRT or not layers:
            inspected = going.inspect(serialized)
            if inspected:
                layers, unread, found.source = inspected, [], "engine inspector"
    if not layers:
        msg = f"{name} {trt.__version__}: neither its log nor its engine inspector reports the engine's layers"
        raise ToolError(msg)
    if unread:
        text = f"plan lines that could not be read, such as {unread[0][:200]}"
        found.messages.append(BuilderMessage("warning", text, len(unread), [], "unread_plan"))
    if engine is not None and name == tensorrt_api.TENSORRT:
        _save_plan(model, engine, serialized, trt.__version__)
    elif engine is not None:  # no runner loads the engine
        run_directory.replace_file(engine, serialized)
    found.timing_cache_sha256 = going.timing_cache_sha256
    found.size_bytes, found.engine_sha256 = len(serialized), hashlib.sha256(serialized).hexdigest()
    describe_plan(found, layers, macs)
    return report_of(model, options, name, found)


def describe_plan(found: Found, layers: Sequence[plan_layers.Layer], macs: Mapping[str, int] | None) -> None:
    """Set `layers`, `counts` and `coverage` of `found`; for the arguments, see `runtime_eval.trt.coverage.coverage`."""
    found.layers, found.counts = coverage.described(layers, macs), coverage.counts(layers)
    found.coverage = coverage.coverage(layers, macs)


def _save_plan(model: Path, engine: Path, serialized: bytes, version: str) -> None:
    """Write an engine and its sidecar, by which the runner checks that the engine fits the machine."""
    from crqat.runtime_eval.runners.tensorrt import device_capability

    metadata = onnx_header.read(model)
    plan_file.save(
        engine,
        serialized,
        builder=tensorrt_api.TENSORRT,
        version=version,
        compute_capability="{}.{}".format(*device_capability()),
        precision=_PRECISIONS.get(metadata.get("crqat.target", ""), "int8"),
        metadata=metadata,
    )


def main(arguments: list[str] | None = None) -> int:
    """Build one engine in this process and write its report; return 0 even if no engine can be built from the file.

    Args:
        arguments: Arguments without the program's name; None uses those of the process.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {_PROGRAM}", description="Build a TensorRT engine.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--report", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--engine", type=Path, help="write the engine here")
    parser.add_argument("--builder", choices=(tensorrt_api.TENSORRT, tensorrt_api.RTX))
    parser.add_argument("--batch", type=int, nargs=3, default=EngineOptions.batch, metavar=("MIN", "OPT", "MAX"))
    parser.add_argument("--compute-capability", action="append", default=[], metavar="SM89")
    parser.add_argument("--macs", type=Path, help="JSON object: multiply-accumulates by node name")
    parser.add_argument("--timing-cache", type=Path)
    parser.add_argument("--log", type=Path, help="write the builder's messages here; default: next to the report")
    given = parser.parse_args(arguments)
    targets = tuple(given.compute_capability)
    options = EngineOptions(given.builder, tuple(given.batch), targets, timing_cache=given.timing_cache)
    try:
        macs = None if given.macs is None else typed_json.from_json(dict[str, int], strict_json.read(given.macs))
        log = given.log or given.report.with_suffix(".log")
        report = build_here(given.model, options, macs, given.engine, log)
        run_directory.replace_file(given.report, typed_json.text(report).encode())
    except OSError as error:
        print(f"{_PROGRAM}: {error.filename}: {error.strerror}", file=sys.stderr)
        return ToolError.exit_code
    except Exception as error:
        return failures.tell(error, _PROGRAM)
    return 0


if __name__ == "__main__":
    host.die_first()
    sys.exit(main())
