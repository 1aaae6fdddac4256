"""Tests which versions of the libraries run all stages of a recipe successfully.

One row for each combination: a virtual environment with those versions, in which the four stages of two recipes run
like a user's. Libraries whose internals crqat uses are varied one at a time with the newest versions of the others, and
one row has the lowest version of every dependency that pyproject.toml allows; all combinations would take hours and
tell little more. Writes pipeline/commands/versions.json, which `crqat doctor` reads, and the table of docs/versions.md.

    python -m bench.versions [--rows newest --rows "oldest PyTorch"] [--folder DIR] [--keep]

Needs only Python and pip; the environments use the Python that runs it. Exits with 1 if an installable row does not end
as expected: with passed gates, except for old versions of ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crqat.train.data.dataset import Dataset

ROOT = Path(__file__).parents[1]
JSON, DOC = ROOT / "pipeline" / "commands" / "versions.json", ROOT / "docs" / "versions.md"
FOLDER = ROOT / "bench-out" / "versions"
STAGES = ("train", "export", "benchmark", "gate")
# A residual network for CIFAR's image size: depthwise convolutions, ReLU6 and sums, calibrated without QAT. It uses
# digits, because CIFAR-10 is a download; nearly untrained, it loses more accuracy in INT8 than a trained network.
RESIDUAL = """name: residual
compile: never
data: {source: "bench.versions:enlarged_digits"}
model: {name: cifar/mobilenet_v2}
float: {epochs: 4, batch_size: 16, lr: 0.02}
qat: {epochs: 0}
gate: {max_accuracy_drop: 5, min_agreement: 0.8}
"""
RECIPES = ("digits", "residual")
PASSED, INCONCLUSIVE, FAILED, NOT_AVAILABLE = "passed", "inconclusive", "failed", "not available here"
# Maps a package to its name in the table: libraries whose internals crqat uses or for which it writes files, and numpy.
SHOWN = {
    "torch": "PyTorch",
    "nncf": "NNCF",
    "onnx": "ONNX",
    "onnxruntime": "ONNX Runtime",
    "numpy": "numpy",
    "tensorrt-rtx-cu13": "TensorRT for RTX",
}
INSTALL_SECONDS, STAGE_SECONDS = 1800.0, 1200.0
_VERSIONS = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Row:
    """One combination of versions.

    Attributes:
        name: Name of the combination, which says what it varies.
        pins: Pinned versions by package; every other dependency is the newest that pip finds.
        further: A package that is installed in addition to the dependencies.
        needs_cuda: Whether the row needs a CUDA device.
        expected: Status that the row should end with.
    """

    name: str
    pins: Mapping[str, str]
    further: str | None = None
    needs_cuda: bool = False
    expected: str = PASSED


def bounds(text: str) -> dict[str, str]:
    """Return the lowest version of each dependency in the text of pyproject.toml.

    Raises:
        ValueError: A dependency has no lower bound.
    """
    listed = re.findall(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)[0]
    found = {}
    for requirement in re.findall(r'"([^"]+)"', listed):
        parts = re.fullmatch(r"([a-z0-9-]+)>=([0-9.]+)(,.*)?", requirement)
        if parts is None:
            msg = f"pyproject.toml: {requirement} has no lower bound; write NAME>=VERSION"
            raise ValueError(msg)
        found[parts[1]] = parts[2]
    return found


def rows(lowest: Mapping[str, str]) -> list[Row]:
    """Return all combinations; those with the same PyTorch are adjacent, because they share an environment."""
    # ONNX Runtime 1.20.0 and 1.23.2 truncate when they quantize float16, so tensorrt.onnx is not measured there.
    truncates = INCONCLUSIVE
    return [
        Row("newest", {}),
        Row("oldest NNCF", {"nncf": lowest["nncf"]}),
        Row("oldest ONNX Runtime", {"onnxruntime": lowest["onnxruntime"]}, expected=truncates),
        Row("last ONNX Runtime for Python 3.10", {"onnxruntime": "1.23.2"}, expected=truncates),
        Row("oldest ONNX", {"onnx": lowest["onnx"]}),
        Row("TensorRT for RTX", {}, "tensorrt-rtx-cu13"),
        Row("TensorRT", {}, "tensorrt", needs_cuda=True),
        Row("oldest PyTorch", {name: lowest[name] for name in ("torch", "torchvision")}),
        Row("oldest of everything", lowest, expected=truncates),
    ]


def enlarged_digits() -> Dataset:
    """Return the digits as RGB images of 32 x 32 pixels: 400 for training and 397 for testing."""
    from dataclasses import replace

    from torch.nn import functional

    from crqat.train.data import sources

    whole = sources.load("digits", None, False)

    def enlarge(images: Any) -> Any:
        return functional.interpolate(images.expand(-1, 3, -1, -1).float(), scale_factor=4).byte()

    preprocessing = replace(whole.preprocessing, mean=whole.preprocessing.mean * 3, std=whole.preprocessing.std * 3)
    return replace(
        whole,
        train_images=enlarge(whole.train_images[:400]),
        train_labels=whole.train_labels[:400],
        test_images=enlarge(whole.test_images[-397:]),
        test_labels=whole.test_labels[-397:],
        preprocessing=preprocessing,
    )


def run(row: Row, lowest: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """Install a row's versions and run all recipes; return the row's entry of the JSON file.

    Args:
        row: The combination.
        lowest: Result of `bounds`.
        folder: Folder for the environments, one for each PyTorch.
    """
    told: dict[str, Any] = {"name": row.name, "python": platform.python_version(), "pins": dict(row.pins)}
    told |= {"status": NOT_AVAILABLE, "versions": {}, "recipes": {}, "error": None}
    if row.needs_cuda and not Path("/dev/nvidiactl").exists():
        return told | {"error": "no CUDA device"}
    python = environment(row, folder)
    # Install the package itself, so that pip respects its bounds, and name all dependencies, so that old ones are
    # replaced.
    pinned = [f"{name}=={row.pins[name]}" if name in row.pins else name for name in lowest]
    extra = [row.further] if row.further else []
    install = ["install", "--quiet", "--upgrade", "--editable", str(ROOT), *pinned, *extra]
    done = _call([*_pip(python), *install], INSTALL_SECONDS)
    if done.returncode:
        wrong = _first(done.stderr.replace("ERROR: Exception:", ""), "ERROR:")  # below it is a traceback
        missing = "No matching distribution" in done.stderr or "Could not find a version" in done.stderr
        return told | {"status": NOT_AVAILABLE if missing else FAILED, "error": wrong}
    told["versions"] = json.loads(_call([str(python), "-c", _VERSIONS, *SHOWN, "torchvision", *extra], 60).stdout)
    recipes = {"digits": ROOT / "recipes" / "digits.yaml", "residual": folder / "residual.yaml"}
    recipes["residual"].write_text(RESIDUAL)
    shutil.rmtree(folder / "runs", ignore_errors=True)
    for name in RECIPES:
        told["recipes"][name] = stages(python, recipes[name], folder / "runs")
    if row.further:
        _call([*_pip(python), "uninstall", "--quiet", "--yes", row.further], INSTALL_SECONDS)
    errors = [result["error"] for result in told["recipes"].values() if result["error"]]
    return told | {"status": status(told["recipes"]), "error": errors[0] if errors else None}


def status(recipes: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the status of a row from the results of its recipes.

    "inconclusive" means that no rule of a gate failed, but one was not run.
    """
    verdicts = {result["gate"] for result in recipes.values()}
    if verdicts == {"PASS"}:
        return PASSED
    return INCONCLUSIVE if verdicts <= {"PASS", "INCONCLUSIVE"} else FAILED


def environment(row: Row, folder: Path) -> Path:
    """Return the Python interpreter of a row's environment, which is created if it is missing.

    Environments with another PyTorch are removed, because each needs gigabytes.
    """
    place = folder / f"torch-{row.pins.get('torch', 'newest')}"
    for other in folder.glob("torch-*/pyvenv.cfg"):
        if other.parent != place:
            shutil.rmtree(other.parent)
    python = place / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    return python


def stages(python: Path, recipe: Path, runs: Path) -> dict[str, Any]:
    """Run a recipe's stages until one fails; return exit codes and seconds, the gate's verdict and the first error."""
    told: dict[str, Any] = {"exit_codes": {}, "seconds": {}, "gate": None, "error": None}
    for stage in STAGES:
        start = time.monotonic()
        done = _call([str(python), "-m", "crqat", stage, str(recipe), "--runs", str(runs)], STAGE_SECONDS)
        told["exit_codes"][stage], told["seconds"][stage] = done.returncode, round(time.monotonic() - start, 1)
        if stage == "gate":
            told["gate"] = _first(done.stdout, "gate: ").removeprefix("gate: ") or None
        if done.returncode:
            failed = _first(done.stdout, "fail ", "error ", "inconclusive ") if told["gate"] else ""
            told["error"] = f"{stage}: {failed or _first(done.stderr, 'crqat: error: ')}"
            break
    return told


def _pip(python: Path) -> list[str]:
    return [str(python), "-m", "pip", "--disable-pip-version-check"]


def _call(command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a process in this directory, so that it uses this crqat; on a timeout it ends with 124, as `timeout` does."""
    paths = {"PYTHONPATH": str(ROOT / "src")} if "pip" not in command else {"PYTHONPATH": ""}
    try:
        return subprocess.run(
            command, cwd=ROOT, env=os.environ | paths, capture_output=True, text=True, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"not finished after {seconds:g} s")


def _first(text: str, *starts: str) -> str:
    """Return the first line with one of these beginnings, else the last nonempty line; spaces are collapsed."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    found = [line for line in lines if line.startswith(tuple(start.strip() for start in starts))]
    return found[0] if found else (lines or [""])[-1]


def table(told: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table of the results; `told` has the rows of the JSON file."""
    columns = ("row", "Python", *SHOWN.values(), *RECIPES, "error")
    lines = [columns, ("---",) * len(columns)]
    for row in told:
        versions = [row["versions"].get(package, "-") for package in SHOWN]
        verdicts = [_verdict(row["recipes"].get(name)) for name in RECIPES]
        if row["status"] == NOT_AVAILABLE:
            verdicts = [NOT_AVAILABLE] * len(RECIPES)
        error = (row["error"] or "").replace("|", "/")
        lines.append((row["name"], row["python"].rpartition(".")[0], *versions, *verdicts, error))
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _verdict(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return "-"
    if result["gate"]:
        return str(result["gate"])
    stage, code = list(result["exit_codes"].items())[-1]
    return f"{stage} ends with {code}"


def with_table(text: str, lines: Sequence[str]) -> str:
    """Return a Markdown text in which the only table is replaced by `lines`."""
    old = text.splitlines()
    inside = [number for number, line in enumerate(old) if line.startswith("|")]
    return "\n".join([*old[: inside[0]], *lines, *old[inside[-1] + 1 :]]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows, writing JSON and table after each; return 0, or 1 if an installable row ends unexpectedly."""
    lowest = bounds((ROOT / "pyproject.toml").read_text())
    every = rows(lowest)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", action="append", choices=[row.name for row in every], help="Default: all.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="For environments: up to 10 GB at a time.")
    parser.add_argument("--keep", action="store_true", help="Leave the last environment there.")
    chosen = parser.parse_args(arguments)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    as_expected = True
    for row in every:
        if chosen.rows and row.name not in chosen.rows:
            continue
        told = run(row, lowest, chosen.folder.resolve())
        as_expected &= told["status"] in (row.expected, NOT_AVAILABLE)
        print(f"{row.name}: {told['status']} {told['error'] or ''}", flush=True)
        write(told, [item.name for item in every])
    for left in () if chosen.keep else chosen.folder.glob("torch-*/pyvenv.cfg"):
        shutil.rmtree(left.parent)
    return 0 if as_expected else 1


def write(told: Mapping[str, Any], order: Sequence[str]) -> None:
    """Add the result of a row to the JSON file and to the table of docs/versions.md.

    It replaces the result of an earlier run of the same row on the same Python.

    Args:
        told: Result from `run`.
        order: Names of all rows in the order of the table.
    """
    minor = told["python"].rpartition(".")[0]
    old = json.loads(JSON.read_text())["rows"] if JSON.is_file() else []
    kept = [row for row in old if (row["name"], row["python"].rpartition(".")[0]) != (told["name"], minor)]
    merged = sorted(
        [*kept, told], key=lambda row: (order.index(row["name"]) if row["name"] in order else -1, row["python"])
    )
    JSON.write_text(json.dumps({"rows": merged}, indent=1) + "\n")
    DOC.write_text(with_table(DOC.read_text(), table(merged)))


if __name__ == "__main__":
    sys.exit(main())
