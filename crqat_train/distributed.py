"""Trains in several processes, one for each device, which share gradients, BN statistics and decisions.

A process is a "rank". Accelerate starts the process group from the environment variables that torchrun sets, and wraps
a network in DistributedDataParallel. Outside of `started` there is one rank, and the functions of this module cost
nothing.
"""

from __future__ import annotations

import os
import random
import re
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

from crqat.core.errors import CrqatError, Told, ToolError, UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator

_T = TypeVar("_T")
# Timeout for a rank that downloads or waits for a slow disk. A rank that ended is noticed at once: its connection
# closes.
_PATIENCE = timedelta(days=7)


class _Group:
    """Process groups of this rank: one on the device (`accelerator`) and one on the CPU (`cpu`).

    Both are None outside of `started`. Ranks exchange decisions in the group on the CPU, so that no rank waits for its
    device.
    """

    accelerator: Accelerator | None = None
    cpu: Any = None


def rank() -> int:
    """Return this process's number, from 0. Only rank 0 writes files."""
    return 0 if _Group.accelerator is None else dist.get_rank()


def world() -> int:
    """Return the world size: the number of processes that train together."""
    return 1 if _Group.accelerator is None else dist.get_world_size()


@contextmanager
def started(device: str) -> Iterator[None]:
    """Join the other processes of a training run, as set by torchrun's environment variables.

    An error in one rank ends the others, too: the rank that fails first prints its error, and the others only exit.

    Args:
        device: The recipe's `device`; "cpu" uses gloo, and so does "auto" without CUDA.

    Raises:
        ToolError: The other ranks cannot be reached, or one of them has ended.
        Told: Another rank ended with an error that it has printed; this rank exits without printing it again.
    """
    store = _meet()
    try:
        try:
            _join(device, store)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)  # for a newer one
                warnings.filterwarnings("ignore", "Grad strides do not match bucket view", UserWarning)  # a small copy
                yield
        except (RuntimeError, ValueError) as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower() and _Group.cpu is not None:
                raise
            msg = f"another process of this training has ended or cannot be reached ({_reason(error)})"
            raise ToolError(msg) from error
    except BaseException as error:
        # Reported before leaving the group, because the others notice that.
        if _is_first_to_tell(store) or not isinstance(error, (CrqatError, KeyboardInterrupt, SystemExit)):
            raise
        raise Told(_exit_code(error)) from error
    finally:
        _Group.accelerator = _Group.cpu = None
        if dist.is_initialized():
            dist.destroy_process_group()


def _exit_code(error: BaseException) -> int:
    if isinstance(error, CrqatError):
        return error.exit_code
    if isinstance(error, Told):
        return int(error.code or 0)
    # By Ctrl-C, or because the user's own code has called sys.exit.
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else UsageError.exit_code


def _join(device: str, store: Any) -> None:
    from accelerate import Accelerator, DistributedDataParallelKwargs

    on_cpu = device == "cpu" or not torch.cuda.is_available()
    rank, count = _number("RANK"), _number("WORLD_SIZE")
    dist.init_process_group("gloo" if on_cpu else "nccl", store=store, rank=rank, world_size=count)
    # Buffers: see `average_statistics`. A recipe's network may have weights that no loss depends on. Their set never
    # changes, so DDP needs to find it in the first step only.
    how = DistributedDataParallelKwargs(broadcast_buffers=False, static_graph=True)
    _Group.accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=[how])
    _Group.cpu = dist.new_group(backend="gloo", timeout=_PATIENCE)


def _reason(error: Exception) -> str:
    """Return the first sentence of torch's message, without the place in its source."""
    return re.sub(r"^\[[^]]*\]\s*", "", str(error).strip()).partition("\n")[0].partition(". ")[0]


def _number(name: str) -> int:
    return int(os.environ[name])


def _meet() -> Any:
    """Return the store by which ranks meet, under a prefix of its own for each attempt.

    torchrun's store survives a restart, and torch gives its keys no prefix: without one, ranks would connect to the
    addresses of dead ranks.
    """
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    place, first = (os.environ["MASTER_ADDR"], _number("MASTER_PORT")), _number("RANK") == 0
    try:
        store = dist.TCPStore(*place, _number("WORLD_SIZE"), is_master=first and not by_torchrun)  # type: ignore[attr-defined]
    except (RuntimeError, ValueError) as error:
        msg = f"the other processes of this training cannot be reached ({_reason(error)})"
        raise ToolError(msg) from error
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # type: ignore[attr-defined]


def _is_first_to_tell(store: Any) -> bool:
    try:
        return bool(store.add("told", 1) == 1)
    except RuntimeError:  # it has ended with the process that kept it
        return True


def wrap(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wrap a network so that gradients are averaged over ranks.

    It is returned unchanged if there is one rank, or if none of its weights is trained.

    All ranks start from rank 0's weights.
    """
    accelerator = _Group.accelerator
    if accelerator is None or not isinstance(model, nn.Module):
        return model
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return model
    # The network is on its device already. Moving it to "cpu:0" would create new tensors, while optimizer, clamps and
    # averages refer to the old ones.
    wrapped: nn.Module = accelerator.prepare(model, device_placement=[False])
    accelerator.free_memory()  # it would keep the network and its hooks alive after this phase
    return wrapped


def share(batch: Tensor) -> Tensor:
    """Return the part of a batch that this rank processes: contiguous, along the first dimension."""
    return batch if world() == 1 else torch.tensor_split(batch, world())[rank()]


def seed_rank(seed: int) -> None:
    """Seed the generators differently on each rank, for networks that draw random numbers, as dropout does."""
    if world() > 1:
        torch.manual_seed(seed + rank())
        random.seed(seed + rank())
        np.random.seed((seed + rank()) % 2**32)  # noqa: NPY002 - a user's own modules may draw from it


def mean(value: Tensor) -> Tensor:
    """Return the mean of a value over ranks, on the value's device."""
    if world() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / world()


def total(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks; the tensor is on the CPU."""
    if world() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value, group=_Group.cpu)
    return value


def largest(*values: float) -> list[float]:
    """Return each value's maximum over ranks, without waiting for the device."""
    if world() == 1:
        return list(values)
    everywhere = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(everywhere, dist.ReduceOp.MAX, group=_Group.cpu)
    return [float(value) for value in everywhere]


def from_first(value: _T) -> _T:
    """Return rank 0's value on all ranks."""
    if world() == 1:
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0, group=_Group.cpu)
    return values[0]  # type: ignore[no-any-return]


def gather(value: _T) -> list[_T]:
    """Return the values of all ranks in order on rank 0; an empty list on the others."""
    if world() == 1:
        return [value]
    values: list[Any] | None = [None] * world() if rank() == 0 else None
    dist.gather_object(value, values, dst=0, group=_Group.cpu)
    return values or []


class Vote:
    """Maxima of numbers over all ranks, requested after one step and read after the next.

    No step therefore waits for another rank.
    """

    def __init__(self) -> None:
        self._asked: tuple[Any, Tensor] | None = None

    def largest(self, *values: float) -> list[float]:
        """Submit values, and return the maxima over ranks of the values of the previous call; zeros at the first call.

        With a single rank, the values are returned at once.
        """
        if world() == 1:
            return list(values)
        before = self.close()
        asked = torch.tensor(values, dtype=torch.float64)
        self._asked = dist.all_reduce(asked, dist.ReduceOp.MAX, group=_Group.cpu, async_op=True), asked
        return before or [0.0] * len(values)

    def close(self) -> list[float]:
        """Return the maxima over ranks of the values submitted last; [] if none are waiting to be read."""
        if self._asked is None:
            return []
        work, asked = self._asked
        self._asked = None
        work.wait()
        return [float(value) for value in asked]


@contextmanager
def first_rank_first() -> Iterator[None]:
    """Let one rank on each machine run the block before the others, so that files are downloaded only once.

    The others wait in a process group on the CPU, because one on a device times out after ten minutes, and a download
    may take hours.
    """
    if world() > 1 and _number("LOCAL_RANK"):
        dist.barrier(group=_Group.cpu)
    yield
    if world() > 1 and not _number("LOCAL_RANK"):
        dist.barrier(group=_Group.cpu)


@contextmanager
def first_rank_alone() -> Iterator[bool]:
    """Yield True on rank 0, which computes as if it were alone; the others get False and wait after the block."""
    group, first = (_Group.accelerator, _Group.cpu), rank() == 0
    if first:
        _Group.accelerator = _Group.cpu = None
    try:
        yield first
    finally:
        _Group.accelerator, _Group.cpu = group
    from_first(True)


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Average BN's running statistics over ranks after a step, so that all ranks evaluate and save the same statistics.

    During the step each rank normalizes with the statistics of its own share of the batch, unless `qat.sync_bn` is on.
    The average of the ranks' variances lacks the variance between the ranks' means.
    """
    if world() == 1:
        return
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    # Frozen and synchronized statistics are equal already, and a mean of equal numbers may differ from that number.
    differing = [norm for norm in norms if norm.training and not isinstance(norm, nn.SyncBatchNorm)]
    own = [tensor for norm in differing for tensor in (norm.running_mean, norm.running_var)]
    statistics = [tensor for tensor in own if tensor is not None]
    if statistics:
        averaged = mean(torch.cat([tensor.flatten() for tensor in statistics]))
        parts = torch.split(averaged, [tensor.numel() for tensor in statistics])
        torch._foreach_copy_(statistics, [part.view_as(t) for part, t in zip(parts, statistics, strict=True)])


@torch.no_grad()
def take_statistics(model: nn.Module) -> None:
    """Copy rank 0's BN statistics to all ranks.

    Dropout and other random layers make each rank compute different statistics.
    """
    if world() > 1:
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                for statistics in norm.buffers():
                    dist.broadcast(statistics, 0)


def check_sync_bn(device: torch.device) -> None:
    """Check that SyncBatchNorm can run: its kernels need CUDA.

    Raises:
        ToolError: The training does not run on CUDA.
    """
    if device.type != "cuda":
        msg = f"qat.sync_bn: SyncBatchNorm needs CUDA, and this training runs on {device.type}; set it to false"
        raise ToolError(msg)


@contextmanager
def synchronized_norms(model: nn.Module, on: bool) -> Iterator[None]:
    """Within the context, if `on`, BN normalizes with the statistics of the whole batch of all ranks.

    BatchNorm modules are replaced by SyncBatchNorm modules with the same weights and buffers, and restored at the end.
    """
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)} if on else {}
    for name, norm in norms.items():
        model.set_submodule(name, nn.SyncBatchNorm.convert_sync_batchnorm(norm))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for name, norm in norms.items():
            model.set_submodule(name, norm)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside DistributedDataParallel, DataParallel or torch.compile wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner
