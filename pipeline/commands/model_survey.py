"""The `models` command: which networks work, to which extent, and why not further. Each has a process of its own."""

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
# Each network, and its size in pixels where it does not take every size; null where it does.
NETWORKS: dict[str, int | None] = json.loads(Path(__file__).with_name("model_survey_networks.json").read_text())
TIME_LIMIT_SECONDS = 1800.0
VERIFIED_IMAGES = 2
_PACKAGES = ("torch", "torchvision", "timm", "nncf", "onnxruntime", "tensorrt-rtx-cu13")
_MULTIPLYING = ("Conv", "Gemm", "MatMul")
_INT8_SHARE = 0.9
PASSES, NOT_PROVABLE = "passes", "not provable behind the last quantizer"


@dataclass(frozen=True)
class Images:
    """What the networks see.

    Attributes:
        size: Height and width, in pixels.
        verified: Images whose codes are compared.
        cifar10: Folder of CIFAR-10, whose training images are enlarged; None is normal noise.
        channels: 3, or 1 for grey images.
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
    """Measure networks one by one, show their table, and write it as Markdown and as JSON beside.

    Args:
        names: As `model.name` of a recipe; none are all of `NETWORKS`.
        cifar10: Folder with cifar-10-batches-py; None is noise.
        size: Height and width, except for networks that take one size alone.
        out: The Markdown file; None writes nothing. Rows of other networks in the JSON beside it stay.
        force: Replace files that this command has not written.
        channels: 3, or 1 for grey images.
        engines: Build TensorRT's engines, too.
        again: Measure networks that the JSON has rows of, with the same images, once more.
        limit: Seconds for each network.

    Returns:
        The exit code of these networks; see `exit_code`.

    Raises:
        UsageError: There is no CIFAR-10 where it should be, or a file that this command has not written is in the way.
        ToolError: A file cannot be written.
    """
    if cifar10 is not None and not (cifar10 / "cifar-10-batches-py").is_dir():
        msg = f"--cifar10: {cifar10} holds no cifar-10-batches-py; name the folder that does, or leave it out for noise"
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
        console.say("nothing is written; --out FILE.md writes the table, and the numbers as JSON beside it")
    else:
        console.say(f"wrote {out} and {out.with_suffix('.json')}")
    code = exit_code([rows[name] for name in chosen])
    console.give(exit_code=code, networks={name: rows[name] for name in chosen})
    return code


def exit_code(rows: Sequence[Mapping[str, Any]]) -> int:
    """As of all commands: 1 for a network that failed, before 3, 2 and 4.

    A network has failed if its verification, its engine or its training step has, if it breaks a rule, or if it ends
    its process or takes too long. 3 stands for what the machine lacks, 2 for a network that is refused, 4 for a
    verification that could not be made.
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
    """The class of a row: `PASSES`, `NOT_PROVABLE`, or what went wrong, in a word or two.

    A network passes if its codes are verified and at least 90 % of its multiply-accumulates are INT8 in ONNX Runtime,
    or each layer that stays float has a reason.
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
    """Share of the multiply-accumulates of Conv, Gemm and MatMul that ONNX Runtime computes in INT8."""
    amounts = row["macs"]
    return 1.0 - sum(amounts["float"].values()) / amounts["all"] if amounts["all"] else 1.0


def measure(name: str, images: Images, limit: float = TIME_LIMIT_SECONDS, engines: bool = False) -> dict[str, Any]:
    """One network's row: `model_survey_worker.measure`'s result, or a status that says in a sentence why there is none.

    Args:
        name: As `model.name` of a recipe.
        images: What it sees.
        limit: Seconds, after which it is stopped.
        engines: Build TensorRT's engine, too.
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
    # Where this machine keeps its libraries is of no interest to readers of the table.
    row["status"] = re.sub(r"[^ ]*/site-packages/", "", str(row["status"]))
    seconds = round(time.monotonic() - started, 1)
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs"
    return {**row, "images": str(images), "machine": machine, "versions": _versions(), "total_seconds": seconds}


def _death(ended: subprocess.CompletedProcess[bytes]) -> str:
    """The status of a network whose process has written no row: the network ended it, or it did not even begin."""
    if ended.returncode < 0:
        return f"failed: its process was ended by {failures.signal_name(-ended.returncode)}"
    words = [line.strip() for line in ended.stderr.decode(errors="replace").splitlines() if line.strip()]
    named = [line for line in words if re.match(r"[\w.]+(Error|Exception|Interrupt|Exit)\b", line)]
    return f"not run: {(named or words or [f'exit code {ended.returncode}'])[-1]}"


def _environment() -> dict[str, str]:
    """The process finds these packages, and nothing in the current folder takes the place of a library.

    The user's own module there is found by `import_function`. Python 3.10 does not know the variable.
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
    """A row of the table, as text."""
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
    """Conv, Gemm and MatMul that ONNX Runtime computes in integers, and those that stay float."""
    fused = row["fusion"]
    expected = sum(fused["expected"].get(kind, 0) for kind in ("QLinearConv", "QGemm", "QLinearMatMul"))
    in_float = sum(entry["operation"] in _MULTIPLYING for entry in fused["float"])
    return expected - in_float, in_float


def stays_float(row: Mapping[str, Any]) -> list[str]:
    """One phrase for each kind of operation that stays float and each reason: ONNX Runtime's, then TensorRT's."""
    groups: Counter[tuple[str, str]] = Counter()
    for entry in row["fusion"]["float"]:
        reason = re.sub(
            r"its input \S+ is not quantized \((.*)\)", r"behind \1, which has no quantizer", entry["reason"]
        )
        groups[reason.replace(f" for {entry['operation']}", ""), entry["operation"]] += 1
    by_reason: dict[str, list[str]] = {}
    for (reason, operation), count in sorted(groups.items()):
        by_reason.setdefault(reason, []).append(f"{count} {operation}")
    phrases = [f"{', '.join(operations)}: {reason}" for reason, operations in by_reason.items()]
    uncovered = Counter(entry["why"] for entry in row["engine"].get("uncovered", []))
    return phrases + [f"TensorRT: {count} Conv, Gemm or MatMul: {why}" for why, count in sorted(uncovered.items())]


def unexplained(row: Mapping[str, Any]) -> list[str]:
    """What of a row is no result and has no reason; nothing in a row that may stand in the document."""
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
    """How many rows are of which class, and how many of those that pass are mostly INT8."""
    counted = Counter(map(outcome, rows.values()))
    others = "".join(f", {count} {kind}" for kind, count in counted.most_common() if kind != PASSES)
    mostly = sum(outcome(row) == PASSES and int8_share(row) >= _INT8_SHARE for row in rows.values())
    return (
        f"{len(rows)} networks: {counted[PASSES]} pass ({mostly} of them with at least 90 % of their MACs in INT8, the "
        f"rest with a reason for each layer in float){others}."
    )


def document(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The Markdown page."""
    lines = [
        "# Networks",
        "",
        "Written by `crqat models`; the numbers behind it are in the `.json` beside. Each network has untrained",
        "weights and BatchNorm statistics of the images, is quantized W8A8 for both runtimes, trained for one step,",
        "and exported. The table says what is mapped, equal and computed in integers, and nothing of accuracy.",
        "",
        _counts(rows),
        "",
        "* class: a network passes if both files are verified in integer codes and at least 90 % of its",
        "  multiply-accumulates are INT8 in ONNX Runtime, or each layer that stays float has its reason in the row.",
        "* quantizers / hooks: edges of the layout; several of NNCF's hooks may share a quantizer.",
        "* claims: of all edges of both files, how many hold the trained Grid exactly.",
        "* differing codes: of ONNX Runtime against the integer simulator, over all quantized tensors of two images.",
        "  Codes behind what is computed in float may lie on the other side of a tie, within the stated bound of it;",
        "  where some do, they are counted apart. The torch network against the simulator, and one file against the",
        "  other, hold too, unless the cell says otherwise.",
        "* ONNX Runtime: INT8: share of the multiply-accumulates of Conv, Gemm and MatMul that its optimized graph",
        "  computes in integers; then these operations, in integers / in float.",
        "* TensorRT for RTX: the same share in the plan of the engine, which is built where it was asked for, and not",
        "  run: no CUDA device.",
        "* s: of the whole row, on a machine that did other things too.",
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
    """The rows that this command has written before; none where there is no file, or one to be replaced.

    Raises:
        UsageError: Something else is in the way.
    """
    path = out.with_suffix(".json")
    if path == out:
        msg = f"--out {out}: names the Markdown file, beside which the JSON is written; give it another ending"
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
    raise UsageError(msg + "name another --out, or replace it by --force")


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
