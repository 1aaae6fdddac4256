"""A TensorRT engine from an ONNX file, and its report: `python -m crqat.runtime_eval.trt.engine FILE --report JSON`.

Each build has a process of its own: a failed build can spoil the next one in the same process, silently, and a builder
that dies or hangs takes nothing else along. Without a GPU, tensorrt_rtx builds and its verbose log tells the plan;
tensorrt needs the GPU that it builds for, and there the engine inspector tells.
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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crqat.core import failures, run_directory
from crqat.core.errors import ToolError, UsageError
from crqat.runtime_eval.machine import host
from crqat.runtime_eval.runners import onnx_header
from crqat.runtime_eval.trt import coverage, plan_file, plan_layers
from crqat.runtime_eval.trt import versions as tensorrt_api
from crqat.runtime_eval.trt.builder import Batch, Build, BuildFailure

SCHEMA_VERSION = 1
# The working directory of the process that builds: `python -m` searches it first.
PACKAGES = Path(__file__).parents[3]
_PROGRAM = "crqat.runtime_eval.trt.engine"
# What an export's files compute in, by the target that their metadata names.
_PRECISIONS = {"float": "float32", "float16": "float16"}
_PARSING = re.compile(r"Parsing node: (?P<node>.*) \[(?P<operator>\w+)\]")
_PARSED = "crqat: the file has been parsed"


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is built.

    Attributes:
        builder: "tensorrt" or "tensorrt_rtx"; None takes what this machine can build with.
        batch: Smallest, usual and largest batch; three times the same makes the engine static.
        compute_capabilities: GPUs to build for, such as SM89, where the builder lets choose; empty is its default.
        time_limit_seconds: A build that takes longer is stopped.
        timing_cache: File with measured kernel times, read if it is there and written anew; not used by tensorrt_rtx,
            which measures nothing.
    """

    builder: str | None = None
    batch: Batch = (1, 1, 64)
    compute_capabilities: tuple[str, ...] = ()
    time_limit_seconds: float = 600.0
    timing_cache: Path | None = None


def build(
    model: Path, options: EngineOptions, macs: Mapping[str, int] | None = None, engine: Path | None = None
) -> dict[str, Any]:
    """Build an engine in a process of its own.

    Args:
        model: The ONNX file.
        options: How.
        macs: Multiply-accumulates of each Conv and Gemm by node name, from the export's manifest; None if not known.
        engine: Where to write the engine; None keeps only the report.

    Returns:
        The engine report, a JSON object. Its "status" is "built" or "failed: ...", and "failure" then names the stage,
        the ONNX node as far as the builder does, and the rule that was broken.

    Raises:
        ToolError: No builder is installed, or it does not start.
        UsageError: There is no such file, or the builder does not build for a compute capability.
    """
    if not model.is_file():
        msg = f"{model}: no such file"
        raise UsageError(msg)
    builder = options.builder or tensorrt_api.choose()
    if builder is None or tensorrt_api.installed(builder) is None:
        builder = builder or tensorrt_api.RTX
        msg = f"{builder} is not installed, which builds the engine; {tensorrt_api.INSTALL_HINTS[builder]}"
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
            data: dict[str, Any] = json.loads(report.read_text())
            return data
        node, operator = _last_parsed(log)
    failure = {"stage": "process", "node": node, "operator": operator, "rule": cause}
    return report_of(model, options, builder, failure=failure, seconds=round(time.monotonic() - start, 3))


def _run(command: list[str], limit: float) -> str | None:
    """Run the process; None if it wrote its report, else what it died of."""
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
    return f"{cause}, last words: {last}" if last else cause


def _last_parsed(log: Path) -> tuple[str | None, str | None]:
    """Node and operator at which the parser was when the process ended; None and None if it was not parsing."""
    text = log.read_text(errors="replace") if log.is_file() else ""
    found = [match for match in map(_PARSING.search, text.splitlines()) if match]
    if not found or _PARSED in text:
        return None, None
    return found[-1]["node"], found[-1]["operator"]


def report_of(model: Path, options: EngineOptions, builder: str, **known: Any) -> dict[str, Any]:
    """A report with every key, and what is known filled in."""
    failure, status, notices = known.get("failure"), "built", []
    if failure is not None:
        at = f" at {failure['node']}" if failure["node"] else ""
        operator = f" [{failure['operator']}]" if failure["operator"] else ""
        status = f"failed: {failure['stage']}{at}{operator}: {failure['rule']}"
    if builder == tensorrt_api.RTX:
        notices.append("tensorrt_rtx does not build for Jetson (SM87, SM110) or SM90: this plan says nothing of them")
    return {
        "schema_version": SCHEMA_VERSION,
        "model": model.name,
        "model_sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        "status": status,
        "failure": None,
        "builder": {"name": builder, "version": tensorrt_api.installed(builder)},
        "compute_capabilities": list(options.compute_capabilities) or ["default"],
        "flags": [],
        "precisions": [],
        "batch": list(options.batch),
        "seconds": None,
        "size_bytes": None,
        "engine_sha256": None,
        "timing_cache_sha256": None,
        "source": None,
        "layers": [],
        "coverage": None,
        "counts": None,
        "remarks": [],
        "notices": notices,
        **known,
    }


def build_here(
    model: Path, options: EngineOptions, macs: Mapping[str, int] | None, engine: Path | None, log: Path
) -> dict[str, Any]:
    """Build in this process, as the program does; for everyone else there is `build`.

    Args:
        model: The ONNX file.
        options: How; the time limit is not this process's to keep.
        macs: As in `build`.
        engine: As in `build`.
        log: File to which the builder's words go as they come.

    Returns:
        As `build`.

    Raises:
        ToolError: The builder cannot be imported, does not start, or does not tell what it built.
        UsageError: As `build`.
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
        known: dict[str, Any] = {}
        try:
            serialized = going.run(
                model,
                options.batch,
                options.compute_capabilities,
                options.timing_cache,
                lambda: print(_PARSED, file=file),
            )
        except BuildFailure as failure:
            known["failure"] = failure.entry
        known["seconds"] = round(time.monotonic() - start, 3)
        known |= {"flags": going.flags, "precisions": going.precisions}
        remarks = coverage.remarks(going.messages)
        if "failure" in known:
            return report_of(model, options, name, **known, remarks=remarks)
        layers, unread = plan_layers.from_log([text for _, text in going.messages])
        source = "verbose log"
        if name == tensorrt_api.TENSORRT or not layers:
            inspected = going.inspect(serialized)
            if inspected:
                layers, unread, source = inspected, [], "engine inspector"
    if not layers:
        msg = f"{name} {trt.__version__}: neither its log nor its engine inspector tells the engine's layers"
        raise ToolError(msg)
    if unread:
        text = f"plan lines that could not be read, such as {unread[0][:200]}"
        remarks.append(
            {"kind": "unread_plan", "severity": "warning", "message": text, "count": len(unread), "nodes": []}
        )
    if engine is not None and name == tensorrt_api.TENSORRT:
        _save_plan(model, engine, serialized, trt.__version__)
    elif engine is not None:  # no runner loads it
        run_directory.replace_file(engine, serialized)
    known["timing_cache_sha256"] = going.timing_cache_sha256
    known |= {"size_bytes": len(serialized), "engine_sha256": hashlib.sha256(serialized).hexdigest(), "source": source}
    return report_of(model, options, name, **known, **coverage.summarize(layers, macs), remarks=remarks)


def _save_plan(model: Path, engine: Path, serialized: bytes, version: str) -> None:
    """Write an engine with the sidecar by which `crqat.runtime_eval.runners.tensorrt` knows that it fits."""
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
    """Build one engine in this process and write its report; 0 also if the file cannot become an engine.

    Args:
        arguments: Without the program's name; None takes the process's own.
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
    parser.add_argument("--log", type=Path, help="write the builder's words here; default: beside the report")
    given = parser.parse_args(arguments)
    targets = tuple(given.compute_capability)
    options = EngineOptions(given.builder, tuple(given.batch), targets, timing_cache=given.timing_cache)
    try:
        macs = None if given.macs is None else json.loads(given.macs.read_text())
        log = given.log or given.report.with_suffix(".log")
        report = build_here(given.model, options, macs, given.engine, log)
        run_directory.replace_file(given.report, json.dumps(report, indent=1).encode())
    except OSError as error:
        print(f"{_PROGRAM}: {error.filename}: {error.strerror}", file=sys.stderr)
        return ToolError.exit_code
    except Exception as error:
        return failures.tell(error, _PROGRAM)
    return 0


if __name__ == "__main__":
    host.die_first()
    sys.exit(main())
