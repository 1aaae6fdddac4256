"""Measuring process of `crqat.train.scaling.measure`: `python -m crqat.train.scaling.worker FOLDER RANK`.

FOLDER/job.json states what to measure; rank 0 writes FOLDER/result.json. A single process measures its training steps
and the data source; several processes measure the all-reduce of gradients and a training step that they run together.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pydantic
import torch
import torch.distributed as dist
from torch import Tensor, nn

from crqat.core import failures
from crqat.core.errors import CrqatError, Told, UsageError
from crqat.core.progress import quiet
from crqat.train import distributed, shares
from crqat.train.config import TrainConfig
from crqat.train.data import sources
from crqat.train.data.batches import Batches, Feed, Generators, evaluation_batches, subset
from crqat.train.data.split import split_of
from crqat.train.data.streaming import workers
from crqat.train.device import choose_device, compiler
from crqat.train.models import build as models
from crqat.train.models import published
from crqat.train.quantized_model import QuantizedModel, quantize_model
from crqat.train.scaling.model import default_processes, local_batches
from crqat.train.training import loop
from crqat.train.training.consistency import ConsistencyTraining
from crqat.train.training.optimizer import Fit

ROUNDS = 7
_ROUND_SECONDS = 0.1
_WARM_UP = 3
_REPEATS = 5  # all-reduces in a round
_LONG_MESSAGE = 1 << 26  # bytes; the gradients of a small network are too fast to time
_CALIBRATION = 32  # images; ranges need to be plausible only
_MANY_STEPS = 1_000_000  # keeps the learning rate in its warm-up, however long the measurement

Step = Callable[[], object]


class Work:
    """Images and network of a recipe, from which training steps of any batch size can be built and timed."""

    def __init__(self, config: TrainConfig, device: torch.device, seed: int) -> None:
        self.config, self.device = config, device
        self.dataset = sources.of_recipe(published.data_section(config))
        self.chosen = split_of(self.dataset.train_labels, config.data, config.seed).train
        self.batch = min(config.qat.batch_size, len(self.chosen))
        data = config.data
        self.unlabeled = data.unlabeled_ratio if data.unlabeled is not None or data.labeled is not None else 0.0
        self.generators = Generators.of(seed, device)
        # A step's time does not depend on the weights: none are loaded or trained.
        channels, classes = self.dataset.train_images.shape[1], len(self.dataset.class_names)
        self.network = models.build(config.model.name, classes, channels)
        self.network = self.network.to(device).to(memory_format=torch.channels_last).eval()
        self.compiler = "" if config.compile == "never" else compiler(device)
        self.student = self._quantize()

    @property
    def image_bytes(self) -> int:
        """Return the bytes per labeled image of a step: of the image, and of the unlabeled images that accompany it."""
        own = math.prod(self.dataset.train_images.shape[1:])
        return round(own * (1 + self.unlabeled))

    def batches(self, size: int, in_memory: bool) -> Batches:
        """Return the recipe's training batches of `size` images each.

        Args:
            size: Number of images in a batch.
            in_memory: Draw from `size` training images, which are decoded now and held in memory, to time steps without
                the data source. Otherwise draw from all training images, read from the data source.
        """
        config = self.config.data
        chosen = self.chosen[:size] if in_memory else self.chosen
        images = subset(self.dataset.train_images, chosen)
        if in_memory and not isinstance(images, Tensor):
            images = images[:size]
        labels = self.dataset.train_labels[chosen]
        strong = config.strong != "none"
        return Batches(
            images, labels, self.dataset.preprocessing, size, config.crop_padding, config.flip, self.device, strong
        )

    def step(self, size: int, share_gradients: bool = True) -> Step:
        """Return a function that runs one step of the recipe's QAT, including augmentation.

        Args:
            size: Number of images in the step, over all processes together.
            share_gradients: Average gradients over processes, as training does; otherwise processes exchange only BN's
                statistics.
        """
        student = copy.deepcopy(self.student)
        faster = self._wrap if share_gradients else self._compile
        training = ConsistencyTraining(student, self.network, self.config.consistency, faster)
        fit = Fit(student, self.config.qat, _MANY_STEPS, "qat", self.device, quiet)
        batches = endless(self.batches(size, in_memory=True), self.generators.augmentation, training.views)
        # Labeled images replace unlabeled ones: they take the same time.
        unlabeled, further = None, round(size * self.unlabeled)
        if further and (training.views == 2 or training.pseudo_labels):
            unlabeled = Feed(self.batches(further, in_memory=True), self.generators, training.views).stream()
        student.train()

        def run() -> None:
            *images, labels = next(batches)
            pseudo_labels = None
            if unlabeled is not None:
                *others, given = next(unlabeled)
                images = [torch.cat(pair) for pair in zip(images, others, strict=True)]
                pseudo_labels = given if training.pseudo_labels else None
            loop.step(images, labels, training, fit, pseudo_labels=pseudo_labels)

        return run

    def _quantize(self) -> QuantizedModel:
        """Return the quantized network, calibrated on a few images."""
        quantization = self.config.quantization
        images = self.dataset.train_images[self.chosen[:_CALIBRATION]].to(self.device)
        batches = list(evaluation_batches(images, self.dataset.preprocessing, _CALIBRATION))
        student = quantize_model(self.network, batches[0][:2], quantization, self.config.targets).to(self.device)
        student.calibrate(batches, quantization.calibration)
        return student

    def _compile(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        # Not dynamic: training has one shape, and the several shapes here must not share a graph.
        return torch.compile(model, dynamic=False) if self.compiler else model

    def _wrap(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        return distributed.wrap(self._compile(model))


def gradient_bytes(model: nn.Module) -> int:
    """Return the bytes of the gradients of one step: of every trained parameter, including the quantizers' scales."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def endless(batches: Batches, generator: torch.Generator, views: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield batches without end, one epoch after the other.

    Each batch has `views` augmented copies of its images; with 0, the images are only read.
    """
    while True:
        yield from batches.epoch(generator, views)


def measure_alone(work: Work, job: dict[str, Any]) -> dict[str, Any]:
    """Measure, in a single process, the seconds of a training step and the speed of the data source.

    Returns:
        A dictionary for JSON. "compute" has one entry for each batch size, with the mean seconds of a step in each of
        ROUNDS repetitions; "data" is the result of `measure_data`; further entries are the device, the numbers of
        processes to predict, and the bytes of gradients and images.

    Raises:
        UsageError: There are more processes than images in a step.
    """
    processes = sorted(set(job["processes"])) or default_processes(job["holds"], work.batch, job["between"])
    if processes[-1] > work.batch:
        msg = (
            f"--processes {processes[-1]}: a step has {work.batch} images (qat.batch_size, or the whole training split "
            f"if that is smaller); take at most {work.batch} processes"
        )
        raise UsageError(msg)
    for number in processes:
        shares.check_batch(work.batch, "qat.batch_size", number)
    sizes = local_batches(work.batch, processes)
    steps = [work.step(size) for size in sizes]
    for step in steps:
        timed(step, _WARM_UP, work.device)
    repeats = [max(1, math.ceil(_ROUND_SECONDS / timed(step, 1, work.device))) for step in steps]
    # Sizes alternate, so that a machine that slows down affects all of them.
    rounds = [
        [timed(step, number, work.device) for step, number in zip(steps, repeats, strict=True)] for _ in range(ROUNDS)
    ]
    return {
        "device": str(work.device),
        "batch": work.batch,
        "processes": processes,
        "gradient_bytes": gradient_bytes(work.student),
        "image_bytes": work.image_bytes,
        "compiled": work.compiler or "no",
        "compute": [
            {"local_batch": size, "seconds": list(seconds)}
            for size, seconds in zip(sizes, zip(*rounds, strict=True), strict=True)
        ],
        "data": measure_data(work),
    }


def measure_data(work: Work) -> list[tuple[int, float]]:
    """Measure how fast batches are read from the recipe's data source, ROUNDS times.

    Returns:
        For each repetition, the bytes of the labeled images of a batch and the mean seconds to read a batch.
    """
    delivered = endless(work.batches(work.batch, in_memory=False), work.generators.augmentation, 0)
    own = math.prod(work.dataset.train_images.shape[1:]) * work.batch

    def draw() -> None:
        next(delivered)

    # Decoding workers deliver in bursts: a round takes as many batches from each of them.
    burst = 1 if isinstance(work.dataset.train_images, Tensor) else workers()
    seconds = timed(draw, max(_WARM_UP, 2 * burst), work.device)
    number = burst * max(1, math.ceil(_ROUND_SECONDS / (burst * seconds)))
    return [(own, timed(draw, number, work.device)) for _ in range(ROUNDS)]


def message_sizes(gradients: int) -> list[int]:
    """Return the tensor sizes, in bytes, for which all-reduces are timed: four sizes in ascending order.

    The first is small, to find the latency; the second is `gradients`, the size of the network's gradients in bytes;
    the other two are larger, to find the bandwidth.
    """
    longest = max(2 * gradients, min(16 * gradients, _LONG_MESSAGE))
    sizes = (gradients // 16, gradients, round(math.sqrt(gradients * longest)), longest)
    return [max(4, size // 4 * 4) for size in sizes]


def measure_group(work: Work) -> dict[str, Any]:
    """Measure all-reduces and training steps in all processes at once.

    Each measurement is repeated ROUNDS times.

    Returns:
        A dictionary for JSON. "all_reduce" has one entry for each message size, with "bytes" and a list of "seconds",
        one value for each repetition. "step" and "compute" are lists of the seconds of one training step that all
        processes run together: "step" with the all-reduce of gradients, "compute" without it. "backend" names the
        communication library.
    """
    size = gradient_bytes(work.student)
    messages = [torch.zeros(number // 4, device=work.device) for number in message_sizes(size)]
    exchanges: list[Step] = [partial(dist.all_reduce, message) for message in messages]
    step, alone = work.step(work.batch), work.step(work.batch, share_gradients=False)
    for send in exchanges:
        together(send, _WARM_UP, work.device)
    for warm in (step, alone):
        together(warm, _WARM_UP, work.device)
    # All processes use the count of the slowest: each step is a collective.
    slowest = torch.tensor([together(step, 1, work.device)], device=work.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    repeats = max(1, math.ceil(_ROUND_SECONDS / float(slowest)))
    seconds: list[list[float]] = [[] for _ in messages]
    common, apart = [], []
    for _ in range(ROUNDS):
        for row, send in zip(seconds, exchanges, strict=True):
            row.append(statistics.median(together(send, 1, work.device) for _ in range(_REPEATS)))
        common.append(together(step, repeats, work.device))
        apart.append(together(alone, repeats, work.device))
    return {
        "backend": dist.get_backend(),
        "all_reduce": [
            {"bytes": message.numel() * 4, "seconds": row} for message, row in zip(messages, seconds, strict=True)
        ],
        "step": common,
        "compute": apart,
    }


def timed(step: Step, times: int, device: torch.device) -> float:
    """Return the seconds of one call of `step`: the mean over `times` calls, including the device's work."""
    start = time.perf_counter()
    for _ in range(times):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / times


def together(step: Step, times: int, device: torch.device) -> float:
    """Return the mean seconds of a call of `step` over `times` calls; the processes start the first call together."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()
    return timed(step, times, device)


def main() -> int:
    """Measure as FOLDER/job.json states, and return the exit code.

    It is 0 on success, and 2 or 3 for an error, which is then described in FOLDER/RANK.error.json.
    """
    if len(sys.argv) != 3:
        print("scaling_rank: started by `crqat scale`, with FOLDER and RANK", file=sys.stderr)
        return UsageError.exit_code
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    job = json.loads((folder / "job.json").read_text())
    try:
        config = pydantic.TypeAdapter(TrainConfig).validate_json(json.dumps(job["config"]), strict=True)
        world = job["world"]
        device = choose_device(config.device)
        cuda = device.type == "cuda"
        if cuda:
            device = torch.device("cuda", rank)
            torch.cuda.set_device(device)
        torch.manual_seed(config.seed)
        torch.use_deterministic_algorithms(True, warn_only=cuda)  # as training does, which takes its time
        if world == 1:
            result = measure_alone(Work(config, device, config.seed), job)
        else:
            with distributed.started(config.device):
                result = measure_group(Work(config, device, config.seed + rank))
        if rank == 0:
            (folder / "result.json").write_text(json.dumps(result))
    except Told:
        raise
    except (Exception, SystemExit) as error:  # the parent tells the user; the recipe's own code may raise anything
        told = error if isinstance(error, CrqatError) else failures.explain(error, "scale")
        said = {"text": str(told), "usage": isinstance(told, UsageError)}
        (folder / f"{rank}.error.json").write_text(json.dumps(said))
        return told.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
