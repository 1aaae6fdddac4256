"""Two real processes that train together by gloo, against one process with the same recipe."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn

from crqat.core.errors import ToolError, UsageError
from crqat.core.progress import quiet
from crqat.train import distributed
from crqat.train import shares as ranks
from crqat.train.checkpoint import read_tensors
from crqat.train.config import DataConfig, FloatConfig, ModelConfig, QATConfig, QuantizationConfig, TrainConfig
from crqat.train.data import sources
from crqat.train.data.batches import Batches
from crqat.train.data.split import split as split_images
from crqat.train.models import build as models
from crqat.train.quantizers import ActivationObserver
from crqat.train.training import loop
from crqat.train.training.optimizer import Fit
from crqat.train.training.stage import _Run, train

ROOT = Path(__file__).parents[2]
STEPS = 27
NETWORK = """
import os, signal
from pathlib import Path
import torch
from torch import nn
from torch.nn import functional

class Net(nn.Module):
    def __init__(self, classes, channels, dropout):
        super().__init__()
        self.dropout = dropout
        self.unused = nn.Parameter(torch.zeros(3))  # no loss depends on it, which gradients' averages must allow
        self.conv, self.bn = nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(128, classes)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.bn(self.conv(x))), 2)
        return self.fc(torch.flatten(functional.dropout(x, self.dropout, self.training), 1))

steps = []

def die(module, inputs):
    # One of the processes, killed in the middle of the float training, the first time that it is started.
    steps.append(1)
    if os.environ["RANK"] == "1" and len(steps) == 5 and not Path("killed").exists():
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)

def plain(classes, channels):
    return Net(classes, channels, 0.0)

def network(classes, channels):
    net = Net(classes, channels, 0.1)
    if "KILL" in os.environ:
        net.fc.register_forward_pre_hook(die)
    return net
"""
WORKER = """
import json, sys
from pathlib import Path
import torch
sys.path.append({tests!r})
import test_distributed as tests
from crqat.core.progress import quiet
from crqat.train import distributed
from crqat.train.training.stage import train

folder = Path(sys.argv[1])
with distributed.started("cpu"):
    rank = distributed.rank()
    (folder / f"out-{{rank}}").mkdir()
    losses, seeds = tests.record_losses(), tests.record_seeds()
    train(tests.recipe(folder), folder / f"out-{{rank}}", quiet, folder / f"states-{{rank}}")
    observer = tests.observed(distributed.share)
    told = {{"world": distributed.world(), "losses": losses, "seeds": seeds, "limit": observer.limit,
            "lowest": observer.lowest, "highest": observer.highest, "counts": observer.counts.tolist(),
            "estimated": tests.estimated(tests.recipe(folder)), "after": tests.turn(folder)}}
    (folder / f"told-{{rank}}.json").write_text(json.dumps(told))
"""


def recipe(folder: Path) -> TrainConfig:
    """No augmentation, no dropout, BN frozen: nothing that a share of a batch changes."""
    return TrainConfig(
        seed=0,
        targets=("onnxruntime", "tensorrt"),
        data=DataConfig("digits", crop_padding=0, flip=False),
        model=ModelConfig("net:plain", str(folder / "start.pth")),
        float_training=FloatConfig(0),
        quantization=QuantizationConfig(calibration_images=100),
        qat=QATConfig(3, 100, 0.01, freeze_bn_at=0.0, damping=1e-4),
        compile="never",
    )


def record_losses() -> list[float]:
    """The loss of each step from now on."""
    losses: list[float] = []
    original = loop.update

    def step(self: Fit, loss: torch.Tensor) -> None:
        losses.append(float(loss.detach()))
        original(self, loss)

    loop.update = step  # type: ignore[assignment]
    return losses


def record_seeds() -> dict[str, list[int]]:
    """What the order, the augmentation and networks' own draws of each epoch began with, from now on."""
    seeds: dict[str, list[int]] = {"order": [], "augmentation": [], "torch": []}
    order, epoch = Batches.order, Batches.epoch

    def spy_order(self: Batches, generator: torch.Generator) -> torch.Tensor:
        seeds["order"].append(generator.initial_seed())
        return order(self, generator)

    def spy_epoch(self: Batches, generator: torch.Generator, *rest: Any) -> Any:
        seeds["augmentation"].append(generator.initial_seed())
        seeds["torch"].append(torch.initial_seed())
        return epoch(self, generator, *rest)

    Batches.order, Batches.epoch = spy_order, spy_epoch  # type: ignore[method-assign, assignment]
    return seeds


def observed(share: Any) -> ActivationObserver:
    """An observer of batches whose largest value grows, the second share's faster than the first's."""
    observer, generator = ActivationObserver(), torch.Generator().manual_seed(0)
    for factor in (1.0, 3.0, 0.5, 20.0):
        batch = torch.randn(7, 50, generator=generator) * factor
        batch[5] *= factor
        observer.update(share(batch))
    observer.reduce()
    return observer


def estimated(config: TrainConfig) -> list[float]:
    """BN's statistics of a network that draws, each rank something else."""
    dataset, split = sources.load("digits", None, False), split_images(1000, 0.1, 0)
    config = replace(config, qat=replace(config.qat, bn_images=200))
    run = SimpleNamespace(config=config, dataset=dataset, split=split, device=torch.device("cpu"))
    norm = nn.BatchNorm2d(1)
    distributed.seed_rank(0)
    _Run.estimate_bn(run, nn.Sequential(nn.Dropout(0.5), norm))  # type: ignore[arg-type]
    return [float(value) for value in norm.buffers()]


def turn(folder: Path) -> bool:
    """Whether rank 0 was through first, although it took longer than the device's group has patience."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
    with distributed.first_rank_first():
        if distributed.rank() == 0:
            time.sleep(3)
            (folder / "through").touch()
        return (folder / "through").exists()


def start(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder, env=variables, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "net.py").write_text(NETWORK)
    sys.path.append(str(folder))
    torch.manual_seed(0)
    torch.save(models.build("net:plain", 10, 1).state_dict(), folder / "start.pth")
    (folder / "worker.py").write_text(WORKER.format(tests=str(Path(__file__).parent)))
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "worker.py", str(folder)]
    ended = start(torchrun, folder)
    assert ended.returncode == 0, ended.stderr
    return folder


def told(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"told-{rank}.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(together: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "update", loop.update)
    alone = record_losses()
    train(recipe(together), tmp_path, quiet)
    shares = [told(together, rank) for rank in range(2)]
    assert [one["world"] for one in shares] == [2, 2]
    assert shares[0]["losses"] != shares[1]["losses"]  # each its own half of the images
    mean = [(a + b) / 2 for a, b in zip(shares[0]["losses"], shares[1]["losses"], strict=True)]
    assert len(alone) == len(mean) == STEPS
    # Halves of a batch are added up in another order; a value that then rounds to the next of its codes moves the loss.
    torch.testing.assert_close(torch.tensor(mean), torch.tensor(alone), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.tensor(mean[:9]), torch.tensor(alone[:9]), rtol=1e-5, atol=1e-5)
    places = (tmp_path, together / "out-0", together / "out-1")
    histories = [[json.loads(line) for line in (place / "history.jsonl").open()] for place in places]
    for key, tolerance in (("loss", 1e-3), ("validation", 0.01), ("validation_teacher", 0.01)):  # of 179 images
        rows = [[row[key] for row in history if row["epoch"]] for history in histories]
        assert rows[1] == rows[2] == pytest.approx(rows[0], abs=tolerance), key


@pytest.mark.slow
def test_processes_end_with_the_same_bits_and_the_first_alone_writes_states(together: Path) -> None:
    for name in ("student", "teacher"):
        own, other = (read_tensors(together / f"out-{rank}" / f"{name}.safetensors") for rank in range(2))
        assert own.keys() == other.keys()
        assert all(torch.equal(own[key], other[key]) for key in own), name
    assert list((together / "states-0").glob("*.safetensors"))
    assert not (together / "states-1").exists()


@pytest.mark.slow
def test_processes_share_the_order_of_images_and_nothing_else_that_is_random(together: Path) -> None:
    first, second = (told(together, rank)["seeds"] for rank in range(2))
    assert {kind: len(seeds) for kind, seeds in first.items()} == {"order": 3, "augmentation": 3, "torch": 3}
    assert first["order"] == second["order"]
    assert not {*first["augmentation"], *first["order"]} & {*second["augmentation"]}
    assert not {*first["torch"]} & {*second["torch"]}


@pytest.mark.slow
def test_observers_are_added_exactly(together: Path) -> None:
    """For one process the whole batches; bins, counts and ends are the same."""
    alone = observed(lambda batch: batch)
    for rank in range(2):
        found = told(together, rank)
        assert (found["limit"], found["lowest"], found["highest"]) == (alone.limit, alone.lowest, alone.highest)
        assert torch.equal(torch.tensor(found["counts"], dtype=torch.float64), alone.counts)


@pytest.mark.slow
def test_processes_estimate_the_same_statistics_and_wait_for_the_first_as_long_as_it_takes(together: Path) -> None:
    shares = [told(together, rank) for rank in range(2)]
    assert shares[0]["estimated"] == shares[1]["estimated"]
    assert [one["after"] for one in shares] == [True, True]


@pytest.mark.slow
def test_another_number_of_processes_does_not_go_on(together: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"in 2 processes cannot resume in 1; use `crqat train RECIPE --nproc 2`, or --restart"
    ):
        train(recipe(together), tmp_path, quiet, together / "states-0")


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"^qat\.batch_size: 100 images a step .* by 3 processes; take a multiple of 3$"
    ):
        ranks.check(recipe(tmp_path), 3)
    ranks.check(recipe(tmp_path), 2)


def test_fewer_training_images_than_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them would not calibrate, and the others wait for it."""
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "first_rank_first", nullcontext)
    data, model = DataConfig("digits", validation=0.999), ModelConfig("cifar/resnet20")
    config = replace(recipe(tmp_path), data=data, model=model)
    with pytest.raises(UsageError, match=r"^data\.validation: training images: each of 2 .* but there are 1$"):
        train(config, tmp_path, quiet)


def test_sync_bn_needs_cuda(tmp_path: Path) -> None:
    config = replace(recipe(tmp_path), device="cpu", qat=QATConfig(sync_bn=True))
    with pytest.raises(ToolError, match=r"^qat\.sync_bn: SyncBatchNorm needs CUDA, and this training runs on cpu"):
        train(config, tmp_path, quiet)


RECIPE = """
name: net
device: cpu
compile: never
data: {source: digits, crop_padding: 1, flip: false}
model: {name: "net:network"}
float: {epochs: 1, batch_size: 100, lr: 0.1}
qat: {epochs: 1, batch_size: 100}
quantization: {calibration_images: 64}
export: {targets: [onnxruntime], verify_images: 4}
"""


def trained(folder: Path, *options: str, **environment: str) -> tuple[dict[str, str], str]:
    """Train in two processes; give each file's SHA-256, of the history without the times, and stderr."""
    (folder / "net.py").write_text(NETWORK)
    (folder / "recipe.yaml").write_text(RECIPE)
    ended = start(["crqat", "train", "recipe.yaml", "--nproc", "2", *options], folder, **environment)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("best: ") == 1
    digests = {}
    for path in (folder / "runs/net/train").iterdir():
        content = path.read_bytes()
        if path.name == "history.jsonl":
            rows = [json.loads(line) for line in content.splitlines()]
            content = json.dumps([{**row, "seconds": 0} for row in rows]).encode()
        if path.name != "manifest.json":
            digests[path.name] = hashlib.sha256(content).hexdigest()
    return digests, ended.stderr


@pytest.mark.slow
def test_a_killed_process_restarts_all_from_the_last_state_with_the_same_bits_and_export_goes_on(
    tmp_path: Path,
) -> None:
    """Augmentation, dropout, BN and EMA included."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole, told = trained(tmp_path / "whole")
    assert "continued" not in told
    killed, told = trained(tmp_path / "killed", "--max-restarts", "1", "--save-every", "0", KILL="1")
    assert "continued: 1/1  from float epoch 1 of 1, step 4 in it" in told
    assert killed == whole
    assert not (tmp_path / "killed/runs/net/.states").exists()
    manifest = json.loads((tmp_path / "whole/runs/net/train/manifest.json").read_text())
    assert manifest["payload"]["processes"] == 2
    again = start(["crqat", "export", "recipe.yaml"], tmp_path / "whole")
    assert again.returncode == 0, again.stderr
    assert "onnxruntime.onnx" in again.stdout
