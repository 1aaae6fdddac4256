"""The `models` command: runs networks through all stages, each in its own process, and reports how far they get."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from crqat.core import failures
from crqat.core.errors import ToolError, UsageError
from crqat.core.targets import executed
from crqat.export.verification import UNEXPLAINED
from crqat.pipeline import console

SCHEMA_VERSION = 2
# Each network, and its size in pixels if it takes only one; null if it takes every size.
NETWORKS: dict[str, int | None] = json.loads(Path(__file__).with_name("model_survey_networks.json").read_text())
TIME_LIMIT_SECONDS = 1800.0
VERIFIED_IMAGES = 2
_PACKAGES = ("torch", "torchvision", "timm", "nncf", "onnxruntime", "tensorrt-rtx-cu13")
_MULTIPLYING = ("Conv", "Gemm", "MatMul")
_INT8_SHARE = 0.9
PASSES, NOT_PROVABLE = "passes", "not provable behind the last quantizer"


@dataclass(frozen=True)
class Images:
    """Settings of the images that the networks run on.

    Attributes:
        size: Height and width, in pixels.
        verified: Number of images whose codes are compared.
        cifar10: Folder of CIFAR-10, whose training images are enlarged; None for normally distributed noise.
        channels: Number of channels: 3, or 1 for grey images.
    """

    size: int
    verified: int = VERIFIED_IMAGES
    cifar10: Path | None = None
    channels: int = 3

    def __str__(self) -> str:
        source = "normal noise" if self.cifar10 is None else "CIFAR-10, enlarged"
        return f"{source}, {self.size} px{', grey' if self.channels == 1 else ''}"


def run(
    names: Sequence[str],
    cifar10: Path | None,
    size: int,
    out: Path | None,
    force: bool = False,
    channels: int = 3,
    engines: bool = True,
    again: bool = True,
    limit: float = TIME_LIMIT_SECONDS,
) -> int:
    """Measure networks one by one, show the table, and write it as Markdown and as JSON next to it.

    Args:
        names: Names as in `model.name` of a recipe; empty for all of `NETWORKS`.
        cifar10: Folder with cifar-10-batches-py; None for noise.
        size: Height and width, except for networks that take only one size.
        out: The Markdown file; None writes nothing. Rows of other networks in the JSON next to it are kept.
        force: Whether to replace files that this command did not write.
        channels: Number of channels of the images: 3, or 1 for grey.
        engines: Whether to build TensorRT engines too.
        again: Whether to measure also the networks whose rows for the same images are already in the JSON.
        limit: Time limit for each network, in seconds.

    Returns:
        The exit code for these networks; see `exit_code`.

    Raises:
        UsageError: CIFAR-10 is not in its folder, or a file exists at `out` that this command did not write.
        ToolError: A file cannot be written.
    """
    if cifar10 is not None and not (cifar10 / "cifar-10-batches-py").is_dir():
        msg = f"--cifar10: {cifar10} holds no cifar-10-batches-py; give the folder that does, or leave --cifar10 out"
        raise UsageError(msg)
    rows = {} if out is None else _read(out, force)
    chosen = list(names or NETWORKS)
    for index, name in enumerate(chosen, 1):
        images = Images(NETWORKS.get(name) or size, cifar10=cifar10, channels=channels)
        if not again and rows.get(name, {}).get("images") == str(images):
            continue
        row = measure(name, images, limit, engines)
        rows[name] = row
        console.say(f"{index}/{len(chosen)} {name}: {outcome(row)} ({row['total_seconds']:.0f} s)")
        if out is not None:
            _write(out, rows)
    console.show_table("networks", COLUMNS, [cells(name, rows[name]) for name in chosen])
    if out is None:
        console.say("nothing is written; --out FILE.md writes the table, and the figures as JSON next to it")
    else:
        console.say(f"wrote {out} and {out.with_suffix('.json')}")
    code = exit_code([rows[name] for name in chosen])
    console.give(exit_code=code, networks={name: rows[name] for name in chosen})
    return code


def exit_code(rows: Sequence[Mapping[str, Any]]) -> int:
    """Return the exit code for several networks: 1 if any failed, else 3, 2 or 4 if any has that code, else 0.

    A network fails if its verification, its engine or its training step fails, if one of its files breaks a rule of its
    runtime, or if its process dies or takes too long. 3 means that the machine lacks something, 2 that a network was
    refused, and 4 that a verification could not be made.
    """
    codes = {_exit_code(row) for row in rows}
    return next((code for code in (1, 3, 2, 4) if code in codes), 0)


def _exit_code(row: Mapping[str, Any]) -> int:
    status = str(row["status"])
    if status != "measured":
        return {"refused": 2, "not run": 3}.get(status.partition(":")[0], 1)
    proofs = [str(entry["status"]) for entry in row["verification"].values()]
    engine = str(row["engine"]["status"])
    broken = any(row["findings"].values()) or row["step"]["unreached"] or not row["step"]["finite"]
    if broken or any(text.startswith("failed") for text in (*proofs, engine)):
        return 1
    return 0 if all(text == "passed" for text in proofs) else 4


def outcome(row: Mapping[str, Any]) -> str:
    """Return the outcome of a network from its row: `PASSES`, `NOT_PROVABLE`, or what failed, in a word or two.

    A network passes if its verification passed and, in addition, ONNX Runtime computes at least 90 % of the
    multiply-accumulates in INT8 or every layer that stays float has a known reason. `NOT_PROVABLE` means that nothing
    failed, but the logits could not be verified.
    """
    status = str(row["status"])
    if status != "measured":
        if "not finished after" in status:
            return "time limit"
        if status.startswith(("refused", "not run")):
            return status.partition(":")[0]
        return "traceback" if "traceback" in status.lower() else "failed"
    if _exit_code(row) == 1:
        return "failed"
    open_proofs = [str(entry["status"]) for entry in row["verification"].values() if entry["status"] != "passed"]
    if open_proofs:
        return NOT_PROVABLE if all("logits:" in text for text in open_proofs) else "inconclusive"
    unnamed = any(UNEXPLAINED in entry["reason"] for entry in row["fusion"]["float"])
    return "float without a reason" if unnamed and int8_share(row) < _INT8_SHARE else PASSES


def int8_share(row: Mapping[str, Any]) -> float:
    """Return the share of the multiply-accumulates of Conv, Gemm and MatMul that ONNX Runtime computes in INT8."""
    amounts = row["macs"]
    return 1.0 - sum(amounts["float"].values()) / amounts["all"] if amounts["all"] else 1.0


def measure(name: str, images: Images, limit: float = TIME_LIMIT_SECONDS, engines: bool = False) -> dict[str, Any]:
    """Measure one network in its own process; return the results, or a status with the reason if that failed.

    Args:
        name: Name as in `model.name` of a recipe.
        images: Images that the network runs on.
        limit: Time limit in seconds, after which the network is stopped.
        engines: Whether to build the TensorRT engine too.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "row.json"
        command = [sys.executable, "-m", "crqat.pipeline.commands.model_survey_worker", name, "--report", str(report)]
        command += ["--size", str(images.size), "--verified", str(images.verified), "--channels", str(images.channels)]
        command += ["--cifar10", str(images.cifar10.resolve())] if images.cifar10 else []
        command += ["--engines"] if engines else []
        row: dict[str, Any]
        try:
            ended = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit, check=False, env=_environment()
            )
        except subprocess.TimeoutExpired:
            row = {"status": f"failed: not finished after {limit:g} s"}
        else:
            row = json.loads(report.read_text()) if report.is_file() else {"status": _death(ended)}
    # Readers of the table do not need to know where this machine keeps its libraries.
    row["status"] = re.sub(r"[^ ]*/site-packages/", "", str(row["status"]))
    seconds = round(time.monotonic() - started, 1)
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs"
    return {**row, "images": str(images), "machine": machine, "versions": _versions(), "total_seconds": seconds}


def _death(ended: subprocess.CompletedProcess[bytes]) -> str:
    """Return the status of a network whose process wrote no results: it died, or it did not start."""
    if ended.returncode < 0:
        return f"failed: its process was ended by {failures.signal_name(-ended.returncode)}"
    words = [line.strip() for line in ended.stderr.decode(errors="replace").splitlines() if line.strip()]
    named = [line for line in words if re.match(r"[\w.]+(Error|Exception|Interrupt|Exit)\b", line)]
    return f"not run: {(named or words or [f'exit code {ended.returncode}'])[-1]}"


def _environment() -> dict[str, str]:
    """Return the environment variables of a network's process.

    The process finds this crqat, and a file in the current directory with the name of a library does not replace the
    library (except in Python 3.10, where PYTHONSAFEPATH has no effect). `import_function` still finds the user's own
    modules.
    """
    paths = [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path), "PYTHONSAFEPATH": "1"}


def _versions() -> dict[str, str]:
    installed = {package: list(metadata.distributions(name=package)) for package in _PACKAGES}
    return {package: found[0].version if found else "not installed" for package, found in installed.items()}


COLUMNS = (
    "network",
    "class",
    "quantizers / hooks",
    "claims: exact / lossy",
    "differing codes",
    "ONNX Runtime: INT8",
    "TensorRT for RTX: INT8",
    "ONNX Runtime: integer / float",
    "what stays float, and why",
    "s",
)


def cells(name: str, row: Mapping[str, Any]) -> list[str]:
    """Return the cells of one network's table row as text, in the order of `COLUMNS`."""
    if row["status"] != "measured":
        return [name, outcome(row), "", "", "", "", "", "", str(row["status"]), f"{row['total_seconds']:.0f}"]
    claims: Counter[str] = Counter()
    for counts in row["claims"].values():
        claims.update(counts)
    integer, in_float = multiplications(row)
    return [
        name,
        outcome(row),
        f"{row['mapped']['quantizers']} / {row['mapped']['hooks']}",
        f"{claims['exact']} / {claims['lossy']}",
        _codes(row),
        f"{100 * int8_share(row):.2f} % of {row['macs']['all'] / 1e6:.0f} M MACs",
        _coverage(row["engine"]),
        f"{integer} / {in_float}",
        "; ".join(stays_float(row)) or "nothing",
        f"{row['total_seconds']:.0f}",
    ]


def _codes(row: Mapping[str, Any]) -> str:
    proof = row["verification"]
    runtime = proof[executed()]
    text = f"{runtime['differing_codes']} of {runtime['codes']:,}"
    ties = runtime["links"]["runtime"]["inexact_differing"] if "links" in runtime else 0
    text += f", {ties} at ties" if ties else ""
    broken = [f"{target}.onnx {entry['status']}" for target, entry in proof.items() if entry["status"] != "passed"]
    broken += [finding for findings in row["findings"].values() for finding in findings[:1]]
    return "; ".join([text, *broken])


def _coverage(report: Mapping[str, Any]) -> str:
    covered = report["coverage"]
    if report["status"] != "built" or covered is None:
        return str(report["status"])
    return f"{100 * covered['by_macs']:.2f} % of {covered['macs'] / 1e6:.0f} M MACs"


def multiplications(row: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many Conv, Gemm and MatMul nodes ONNX Runtime computes in integers, and how many in float."""
    fused = row["fusion"]
    expected = sum(fused["expected"].get(kind, 0) for kind in ("QLinearConv", "QGemm", "QLinearMatMul"))
    in_float = sum(entry["operation"] in _MULTIPLYING for entry in fused["float"])
    return expected - in_float, in_float


def stays_float(row: Mapping[str, Any]) -> list[str]:
    """Return the reasons why operations stay float, each with their number: in ONNX Runtime first, then in TensorRT."""
    groups: Counter[tuple[str, str]] = Counter()
    for entry in row["fusion"]["float"]:
        reason = re.sub(
            r"its input \S+ is not quantized \((.*)\)", r"after \1, which has no quantizer", entry["reason"]
        )
        groups[reason.replace(f" for {entry['operation']}", ""), entry["operation"]] += 1
    by_reason: dict[str, list[str]] = {}
    for (reason, operation), count in sorted(groups.items()):
        by_reason.setdefault(reason, []).append(f"{count} {operation}")
    phrases = [f"{', '.join(operations)}: {reason}" for reason, operations in by_reason.items()]
    uncovered = Counter(entry["why"] for entry in row["engine"].get("uncovered", []))
    return phrases + [f"TensorRT: {count} Conv, Gemm or MatMul: {why}" for why, count in sorted(uncovered.items())]


def unexplained(row: Mapping[str, Any]) -> list[str]:
    """Return one line for each failure of a network and each operation that stays float for no known reason."""
    if row["status"] != "measured":
        return [] if re.match(r"refused: .{20}", row["status"]) else [row["status"]]
    gaps = [f"{target}: {entry['status']}" for target, entry in row["verification"].items()
            if entry["status"] != "passed"]  # fmt: skip
    gaps += [phrase for phrase in stays_float(row) if UNEXPLAINED in phrase or "though both" in phrase]
    gaps += [f"{target}: {finding}" for target, findings in row["findings"].items() for finding in findings]
    if not row["engine"]["status"].startswith(("built", "not run")):
        gaps.append(f"engine {row['engine']['status']}")
    if row["step"]["unreached"] or not row["step"]["finite"]:
        gaps.append("the training step did not reach every parameter, or its loss is not finite")
    return gaps


def _counts(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a sentence with the number of networks by outcome, and of passing networks that are mostly INT8."""
    counted = Counter(map(outcome, rows.values()))
    others = "".join(f", {count} {kind}" for kind, count in counted.most_common() if kind != PASSES)
    mostly = sum(outcome(row) == PASSES and int8_share(row) >= _INT8_SHARE for row in rows.values())
    return (
        f"{len(rows)} networks: {counted[PASSES]} pass ({mostly} of them with at least 90 % of their MACs in INT8, the "
        f"rest with a reason for each layer in float){others}."
    )


def document(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of all networks as a Markdown page; `rows` maps each network's name to its row."""
    lines = [
        "# Networks",
        "",
        "Written by `crqat models`; the numbers are in the `.json` next to it. Each network has untrained weights and",
        "BatchNorm statistics from the images. It is quantized W8A8 for both runtimes, trained for one step, and",
        "exported. The table shows what is mapped, equal and computed in integers. It says nothing about accuracy.",
        "",
        _counts(rows),
        "",
        "* class: a network passes if both files are verified in integer codes and at least 90 % of its",
        "  multiply-accumulates are INT8 in ONNX Runtime, or if the row has a reason for each layer that stays float.",
        "* quantizers / hooks: edges of the layout; several of NNCF's hooks may share a quantizer.",
        "* claims: number of edges in both files that hold the trained Grid exactly, and of those that do not.",
        "* differing codes: codes of ONNX Runtime that differ from the integer simulator's, over all quantized tensors",
        "  of two images. Codes after a float operation may fall on the other side of a rounding tie, within the",
        "  stated bound; the cell counts these separately. The torch network agrees with the simulator, and one file",
        "  with the other, unless the cell says otherwise.",
        "* ONNX Runtime: INT8: share of the multiply-accumulates of Conv, Gemm and MatMul that the optimized graph",
        "  computes in integers; then the number of these operations in integers / in float.",
        "* TensorRT for RTX: the same share in the engine's plan. An engine is built if it was asked for, but not run,",
        "  because there is no CUDA device.",
        "* s: seconds for the whole row, on a machine that also ran other work.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
    ]
    known = [name for name in NETWORKS if name in rows] + sorted(set(rows) - set(NETWORKS))
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in cells(name, rows[name]))} |" for name in known]
    by_setting: dict[str, list[str]] = {}
    for name in known:
        versions = ", ".join(f"{package} {version}" for package, version in rows[name]["versions"].items())
        by_setting.setdefault(f"{rows[name]['images']}; {rows[name]['machine']}; {versions}", []).append(name)
    lines += ["", "Images, machine and versions:", ""]
    lines += [f"* {setting}: {', '.join(names)}" for setting, names in by_setting.items()]
    return "\n".join([*lines, ""])


def _read(out: Path, force: bool) -> dict[str, Any]:
    """Return the results of earlier calls by network, from the JSON next to `out`; empty if there are none.

    Raises:
        UsageError: A file exists that this version of the command did not write.
    """
    path = out.with_suffix(".json")
    if path == out:
        msg = f"--out {out}: is the name of the JSON file; give the Markdown file next to it, such as FILE.md"
        raise UsageError(msg)
    if not path.exists() and (force or not out.exists()):
        return {}
    with suppress(OSError, ValueError, TypeError, KeyError):
        content = json.loads(path.read_text())
        if content["schema_version"] == SCHEMA_VERSION:
            rows: dict[str, Any] = content["rows"]
            return rows
    if force:
        return {}
    msg = f"{out if out.exists() else path}: not written by this version of `crqat models`; "
    raise UsageError(msg + "name another --out, or replace it with --force")


def _write(out: Path, rows: Mapping[str, Any]) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".json").write_text(
            json.dumps({"schema_version": SCHEMA_VERSION, "rows": rows}, indent=1) + "\n"
        )
        out.write_text(document(rows), "utf-8")
    except OSError as error:
        msg = f"{out}: cannot be written: {error.strerror}"
        raise ToolError(msg) from error
