"""Exchanged gradients are the mean of all processes; frozen parameters have none to exchange."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from torch import nn

from crqat_train.exchange import gradient_bytes

# The mean of two processes' gradients, one with 1 and 4, one with 3 and 8; then none is exchanged.
EXCHANGE = """
import sys, torch, torch.distributed as dist
from crqat_train.exchange import Exchange
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
model = torch.nn.ParameterDict({"a": torch.zeros(1), "b": torch.zeros(1, 2), "unused": torch.zeros(3)})
exchange = Exchange()
def set_gradients():
    model["a"].grad, model["b"].grad = torch.tensor([(1.0, 3.0)[rank]]), torch.tensor([[(4.0, 8.0)[rank], 1.0]])
set_gradients()
exchange(model)
assert model["a"].grad.tolist() == [2.0] and model["b"].grad.tolist() == [[6.0, 1.0]] and model["unused"].grad is None
exchange.on = False
set_gradients()
exchange(model)
assert model["a"].grad.tolist() == [(1.0, 3.0)[rank]]
dist.destroy_process_group()
"""


def test_frozen_parameters_are_not_exchanged() -> None:
    model = nn.Linear(3, 2)
    assert gradient_bytes(model) == 4 * 8
    assert gradient_bytes(model.double()) == 8 * 8
    model.bias.requires_grad_(False)
    assert gradient_bytes(model) == 8 * 6


def test_exchanged_gradients_are_the_mean_of_all_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", EXCHANGE]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], env=environment) for rank in range(2)]
    try:
        assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
