"""Tests interrupted runs: kills train, export and benchmark by SIGKILL at random times and compares the results.

One reference run is not killed. Other runs are killed several times in each stage, at times drawn uniformly from the
stage's duration, and resumed by the same command. At its end every run must have the files of the reference run: bit
for bit after train and export, and the same accuracies after benchmark.

Processes are forked from one that has imported the libraries, so that kills hit work and not imports; a few are started
as a user starts them (`--cold`). Writes bench-out/soak.json.

    python -m bench.kill_and_resume [--kills 200] [--seed 0] [--cold 0.05]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from crqat.core.typed_json import to_json
from crqat.runtime_eval.machine import host

ROOT = Path(__file__).parent.parent
OUT = Path("bench-out/soak.json")
STAGES = ("train", "export", "benchmark")
KILLS_OF_A_STAGE = 4
SECONDS = 300.0  # after this time a stage that was not killed counts as hanging
# A small network with all sources of randomness: two streams of images, strong views, dropout from torch's generator.
RECIPE = """
name: soak
compile: never
data: {source: digits, crop_padding: 1, flip: false, strong: randaugment, unlabeled: digits}
model: {name: "soak_network:network"}
float: {epochs: 2, batch_size: 100, lr: 0.05}
quantization: {calibration_images: 100}
qat: {epochs: 2, batch_size: 100, lr: 0.005}
export: {verify_images: 2}
benchmark: {latency_rounds: 6, latency_seconds: 0.05, warm_up_seconds: 0.0}
"""
NETWORK = """
from torch import flatten, nn
from torch.nn import functional

class Net(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16 * 16, classes)

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.dropout(functional.relu(self.bn2(self.conv2(x))), 0.1, self.training)
        return self.fc(flatten(x, 1))

def network(classes, channels):
    return Net(classes, channels)
"""
PRELOADED = [
    "crqat.train.training.stage",
    "crqat.export.stage",
    "matplotlib.pyplot",
    "nncf.torch",
    "onnx",
    "onnxruntime",
    "crqat.pipeline.cli",
    "crqat.pipeline.report.html",
    "crqat.pipeline.stages.run",
    "crqat.runtime_eval.benchmark",
    "sklearn.datasets",
]


def command(folder: Path, arguments: list[str]) -> None:
    """Run `crqat` with these arguments in this process, which was forked for it; its output goes to FOLDER/log."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["crqat", *arguments]
    from crqat.pipeline.cli import main

    main()


class Command:
    """A running `crqat` process."""

    def __init__(self, folder: Path, arguments: list[str], cold: bool = False) -> None:
        self._cold: subprocess.Popen[bytes] | None = None
        if cold:
            environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{folder}"}
            with (folder / "log").open("ab") as log:
                words = [sys.executable, "-m", "crqat", *arguments]
                self._cold = subprocess.Popen(words, cwd=folder, env=environment, stdout=log, stderr=log)
            self.pid = self._cold.pid
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._warm = context.Process(target=command, args=(folder, arguments))
        self._warm.start()
        self.pid = self._warm.pid or 0

    def wait(self, seconds: float) -> int | None:
        """Wait for the exit code, negative for a signal; return None if it is still running after so many seconds."""
        if self._cold is None:
            self._warm.join(seconds)
            return self._warm.exitcode
        try:
            return self._cold.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> bool:
        """Send SIGKILL to the process; return False if it had ended before."""
        os.kill(self.pid, signal.SIGKILL)
        return self.wait(SECONDS) == -signal.SIGKILL


def prepare(folder: Path) -> Path:
    """Create `folder`, write the recipe and the network of the test into it, and return its path."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "soak_network.py").write_text(NETWORK)
    return folder


def crqat(folder: Path, *arguments: str) -> int:
    """Run `crqat` with these arguments in `folder` until it ends, and return its exit code."""
    code = Command(folder, list(arguments)).wait(SECONDS)
    return 124 if code is None else code


def fingerprint(folder: Path) -> dict[str, Any]:
    """Return the values in which runs must agree: hashes of the files of train and export, accuracies of benchmark."""
    run, found = folder / "runs" / "soak", {}
    for stage in ("train", "export"):
        for path in sorted((run / stage).rglob("*")):
            content = path.read_bytes() if path.is_file() else b""
            if path.name == "history.jsonl":
                content = json.dumps([_timeless(json.loads(line)) for line in content.splitlines()]).encode()
            if path.name != "manifest.json":  # times, and the hash of a manifest with times
                found[f"{stage}/{path.relative_to(run / stage)}"] = hashlib.sha256(content).hexdigest()
        payload = json.loads((run / stage / "manifest.json").read_text())["payload"]
        found[f"{stage}/payload"] = json.dumps(_timeless(payload), sort_keys=True)
    for name, model in json.loads((run / "benchmark" / "results.json").read_text())["models"].items():
        versus = model["versus_float"] or {}
        agreement = {key: versus[key] for key in ("drop_points", "agreement") if key in versus}
        found[f"benchmark/{name}"] = json.dumps([model["accuracy"], agreement], sort_keys=True)
    return found


def _timeless(value: Any) -> Any:
    """Return a value without its times."""
    if isinstance(value, list):
        return [_timeless(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: _timeless(item) for key, item in value.items() if key != "seconds"}


@dataclass
class Figures:
    """Results of the test.

    Attributes:
        kills: Number of processes ended by SIGKILL, by stage.
        early: Number of processes that ended before they were killed.
        continued: Number of kills after which a training reported that it resumes from a state.
        runs: Number of runs that were compared with the reference run.
        lost: Reason for each run that the same command did not finish.
        differing: Name of each run whose files differ.
    """

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    early: int = 0
    continued: int = 0
    runs: int = 0
    lost: list[str] = field(default_factory=list)
    differing: list[list[str]] = field(default_factory=list)


def undisturbed(folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Run every stage without kills; return the run's fingerprint and the seconds of each stage."""
    prepare(folder)
    seconds = {}
    for stage in (*STAGES, *STAGES):  # the second time, everything is imported
        started = time.monotonic()
        code = crqat(folder, stage, "recipe.yaml", "--force")
        if code != 0:
            msg = f"{stage} ended with {code}: {(folder / 'log').read_text()[-500:]}"
            raise RuntimeError(msg)
        seconds[stage] = time.monotonic() - started
    return fingerprint(folder), seconds


def disturbed(
    folder: Path, seconds: dict[str, float], draw: random.Random, figures: Figures, most: int, cold: float = 0.0
) -> dict[str, Any] | None:
    """Run every stage with up to `most` kills in each; return the run's fingerprint, or None if a stage failed.

    Args:
        folder: Folder of the run, which is created.
        seconds: Duration of each stage without kills.
        draw: Random generator for the times of the kills.
        figures: Results, which are updated.
        most: Largest number of kills in a stage; a stage that ends early is killed less often.
        cold: Share of processes that are started without a warm parent process.
    """
    prepare(folder)
    for stage in STAGES:
        for _ in range(most):
            # States are saved periodically, or after every step, so that kills hit both cases.
            options = ["--save-every", draw.choice(("0", "0.2", "300"))] if stage == "train" else []
            is_cold = draw.random() < cold
            running = Command(folder, [stage, "recipe.yaml", *options], is_cold)
            code = running.wait(draw.uniform(0, seconds[stage] + (3.0 if is_cold else 0.0)))
            if code is None and running.kill():
                figures.kills[stage] += 1
                continue
            figures.early += 1
            code = running.wait(0) if code is None else code
            if code != 0:
                figures.lost.append(f"{stage} ended with {code}: {(folder / 'log').read_text()[-300:]}")
                return None
            break
        code = crqat(folder, stage, "recipe.yaml")
        if code != 0:
            figures.lost.append(f"{stage} ended with {code}: {(folder / 'log').read_text()[-300:]}")
            return None
    figures.continued += (folder / "log").read_text().count("continued: 1/1")
    figures.runs += 1
    return fingerprint(folder)


def compare(found: dict[str, Any] | None, reference: dict[str, Any], figures: Figures) -> None:
    """Add to `figures` the names of the files in which a run differs from the reference run.

    Args:
        found: Fingerprint of the run; None, if a stage failed, adds nothing.
        reference: Fingerprint of the reference run.
        figures: Results, which are updated.
    """
    if found is not None and found != reference:
        names = sorted(found.keys() | reference.keys())
        figures.differing.append([name for name in names if found.get(name) != reference.get(name)])


def main() -> None:
    """Run until the number of kills is reached, print and write results; exit with 1 if a run is lost or differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cold", type=float, default=0.05, help="share of processes that import everything again")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # before the first process: the order of sums depends on it
    draw, figures, started = random.Random(arguments.seed), Figures(), time.monotonic()  # noqa: S311 - instants
    with tempfile.TemporaryDirectory(prefix="crqat-soak-") as place:
        reference, seconds = undisturbed(Path(place) / "undisturbed")
        while sum(figures.kills.values()) < arguments.kills and len(figures.lost) < 5:
            folder = Path(place) / f"run{figures.runs + len(figures.lost)}"
            compare(disturbed(folder, seconds, draw, figures, KILLS_OF_A_STAGE, arguments.cold), reference, figures)
            done = sum(figures.kills.values())
            print(f"{done} kills, {len(figures.lost)} lost, {len(figures.differing)} differing", file=sys.stderr)
    row = {**asdict(figures), "seed": arguments.seed, "stage_seconds": seconds, "seconds": time.monotonic() - started}
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps({"device": to_json(host.describe()), **row}, indent=1))
    kills = ", ".join(f"{stage} {count}" for stage, count in figures.kills.items())
    print(f"kills: {sum(figures.kills.values())} ({kills})")
    print(f"runs: {figures.runs}; trainings that resumed from a state: {figures.continued}")
    print(f"lost runs: {len(figures.lost)}")
    print(f"differing runs: {len(figures.differing)}")
    for problem in [*figures.lost, *map(str, figures.differing)]:
        print(f"  {' '.join(problem.split())}")
    print(f"written: {OUT}")
    sys.exit(1 if figures.lost or figures.differing else 0)


if __name__ == "__main__":
    main()
