"""Which versions of the libraries take a network from its recipe to its verdict?

One row for each combination: a virtual environment with those versions, in which the four stages of two recipes run as
a user runs them. The libraries that crqat reaches into are varied one at a time against the newest of the others, and
one row has the lowest version of every dependency that pyproject.toml allows; the full product would cost hours and say
little more. Writes pipeline/commands/versions.json, which `crqat doctor` reads, and the table of docs/versions.md.

    python -m bench.versions [--rows newest --rows "oldest PyTorch"] [--folder DIR] [--keep]

Needs nothing but Python and pip; the Python that runs it is that of the environments. Ends with 1 if a row that could
be installed does not end as expected: in passed gates, but for old versions of ONNX Runtime.
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
# The residual network of CIFAR's size: depthwise convolutions, ReLU6 and sums, calibrated and not trained further. Its
# images are digits, since CIFAR-10 is a download; nearly untrained, it loses more to INT8 than a network in use.
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
# A package to its name in the table: what crqat calls beyond documented interfaces or writes files for, and numpy.
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
    """One combination.

    Attributes:
        name: What it varies.
        pins: Package to version; every other dependency is the newest that pip finds.
        further: A package beside the dependencies.
        needs_cuda: It does nothing without a CUDA device.
        expected: The row's status, if all is as it should be.
    """

    name: str
    pins: Mapping[str, str]
    further: str | None = None
    needs_cuda: bool = False
    expected: str = PASSED


def bounds(text: str) -> dict[str, str]:
    """The lowest version of each dependency, of the text of pyproject.toml.

    Raises:
        ValueError: A dependency has none.
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
    """All combinations; those of one PyTorch follow each other, since they share its environment."""
    # ONNX Runtime 1.20.0 and 1.23.2 truncate where they quantize float16, so that tensorrt.onnx is not measured there.
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
    """The digits as RGB images of 32 x 32 pixels: 400 to train and 397 to judge."""
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
    """Install a row's versions and run all recipes; what the JSON file says of the row.

    Args:
        row: The combination.
        lowest: Of `bounds`.
        folder: Where environments are kept, one for each PyTorch.
    """
    told: dict[str, Any] = {"name": row.name, "python": platform.python_version(), "pins": dict(row.pins)}
    told |= {"status": NOT_AVAILABLE, "versions": {}, "recipes": {}, "error": None}
    if row.needs_cuda and not Path("/dev/nvidiactl").exists():
        return told | {"error": "no CUDA device"}
    python = environment(row, folder)
    # The package itself, whose bounds pip then holds; the names of all dependencies, or what is there would stay.
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
    """Of a row whose recipes ran: a gate that is inconclusive says that nothing failed, and that a rule was not run."""
    verdicts = {result["gate"] for result in recipes.values()}
    if verdicts == {"PASS"}:
        return PASSED
    return INCONCLUSIVE if verdicts <= {"PASS", "INCONCLUSIVE"} else FAILED


def environment(row: Row, folder: Path) -> Path:
    """The Python of a row's environment, which is made if it is not there; those of other PyTorches are removed."""
    place = folder / f"torch-{row.pins.get('torch', 'newest')}"
    for other in folder.glob("torch-*/pyvenv.cfg"):
        if other.parent != place:
            shutil.rmtree(other.parent)
    python = place / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    return python


def stages(python: Path, recipe: Path, runs: Path) -> dict[str, Any]:
    """Exit codes and seconds of a recipe's stages up to the first that fails, the gate's verdict, the first error."""
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
    """A process in this directory, whose crqat it takes; after its time it ends with 124, as the program `timeout`."""
    paths = {"PYTHONPATH": str(ROOT / "src")} if "pip" not in command else {"PYTHONPATH": ""}
    try:
        return subprocess.run(
            command, cwd=ROOT, env=os.environ | paths, capture_output=True, text=True, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"not finished after {seconds:g} s")


def _first(text: str, *starts: str) -> str:
    """The first line with one of these starts, else the last line that is not empty; spaces are single."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    found = [line for line in lines if line.startswith(tuple(start.strip() for start in starts))]
    return found[0] if found else (lines or [""])[-1]


def table(told: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows of the JSON file as lines of Markdown."""
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
    """A document with these lines in place of its table, which is the only one."""
    old = text.splitlines()
    inside = [number for number, line in enumerate(old) if line.startswith("|")]
    return "\n".join([*old[: inside[0]], *lines, *old[inside[-1] + 1 :]]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows and write both files after each; 0, or 1 if a row that could be installed is not as expected."""
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
    """Put a row into both files, in place of what an earlier run on the same Python said of it."""
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
