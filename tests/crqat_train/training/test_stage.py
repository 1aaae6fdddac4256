from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from crqat.core.errors import ToolError, UsageError
from crqat.core.grid import load_grids
from crqat.core.preprocessing import normalize
from crqat.core.progress import quiet
from crqat.core.results.training import Candidate, TrainingPayload
from crqat.core.typed_json import from_json, to_json
from crqat.train import distributed
from crqat.train.checkpoint import read_tensors
from crqat.train.config import (
    ConsistencyConfig,
    DataConfig,
    FloatConfig,
    ModelConfig,
    PTQConfig,
    QATConfig,
    QuantizationConfig,
    TrainConfig,
)
from crqat.train.data import sources, streaming
from crqat.train.data.batches import Batches, Images, evaluation_batches
from crqat.train.data.dataset import Dataset
from crqat.train.data.split import split as split_images
from crqat.train.data.split import split_of
from crqat.train.device import choose_device
from crqat.train.load_trained import rebuild
from crqat.train.models import build as models
from crqat.train.quantizers import METHODS, MIN_SCALE, ActivationObserver, calibrate_weight, quantizer_of
from crqat.train.quantizers.calibration import calibrate, weight_of
from crqat.train.quantizers.finalize import make_representable
from crqat.train.training import float_network, loop
from crqat.train.training import stage as trainer
from crqat.train.training.consistency import consistency_loss, ema_alpha
from crqat.train.training.evaluate import accuracy
from crqat.train.training.optimizer import Fit
from crqat.train.training.resume import Keeper
from crqat.train.training.stage import train

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
BATCH = 100
TRAINING = 900  # of the 1,000 digits
STEPS = TRAINING // BATCH


class Net(nn.Module):
    """Trains in seconds. Its `gain.scale` is a weight of its own and no quantizer's."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.gain = Gain()
        self.fc = nn.Linear(16 * 16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.relu(self.bn2(self.conv2(x)))
        return self.gain(self.fc(torch.flatten(x, 1)))  # type: ignore[no-any-return]


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([-1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def network(classes: int, channels: int) -> nn.Module:
    return Net(classes, channels)


def wider(classes: int, channels: int) -> nn.Module:
    net = Net(classes, channels)
    net.conv1, net.bn1, net.conv2 = nn.Conv2d(channels, 9, 3, padding=1), nn.BatchNorm2d(9), nn.Conv2d(9, 16, 3, 2, 1)
    return net


def plain_images() -> Dataset:
    """An unlabeled source whose images are each of one grey: to be told from digits at any place."""
    grey = torch.arange(50, 250, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()
    labels = torch.zeros(len(grey), dtype=torch.int64)
    return Dataset(grey, labels, grey, labels, ("unknown",), sources.load("digits", None, False).preprocessing)


def recipe(**changes: Any) -> TrainConfig:
    config = TrainConfig(
        seed=0,
        targets=("onnxruntime", "tensorrt"),
        data=DataConfig("digits", crop_padding=1, flip=False),
        model=ModelConfig(f"{__name__}:network"),
        float_training=FloatConfig(epochs=4, batch_size=BATCH, lr=0.1),
        quantization=QuantizationConfig(calibration_images=256),
        qat=QATConfig(epochs=2, batch_size=BATCH, lr=0.002),
        device="cpu",
        compile="never",
    )
    return replace(config, **changes)


Run = tuple[dict[str, Any], Path]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole training: float network, consistency with an EMA teacher."""
    out = tmp_path_factory.mktemp("run")
    return to_json(train(recipe(), out, quiet)), out


@pytest.fixture
def tuned(finished: Run) -> Callable[..., TrainConfig]:
    """A recipe that starts from the finished run's float network."""
    weights = str(finished[1] / "float.safetensors")
    return lambda **changes: recipe(model=ModelConfig(f"{__name__}:network", weights), **changes)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "history.jsonl"  # it holds times
    }


def history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_a_training_leaves_its_files_and_payload(finished: Run) -> None:
    payload, out = finished
    assert sorted(path.name for path in out.iterdir()) == [
        "calibrated.grids.json", "calibrated.safetensors", "float.safetensors", "history.jsonl", "layout.json",
        "student.grids.json", "student.safetensors", "teacher.grids.json", "teacher.safetensors",
    ]  # fmt: skip
    assert set(payload) == {
        "device", "processes", "compiled", "float", "candidates", "best", "validation_images", "preprocessing",
        "class_names", "input_shape", "quantizers", "preparation", "notes", "warnings", "seconds", "schema_version",
    }  # fmt: skip
    assert to_json(from_json(TrainingPayload, json.loads(json.dumps(payload)))) == payload
    assert payload["device"] == "cpu" and payload["compiled"] == "no: the recipe says never"
    assert payload["validation_images"] == 100 and payload["input_shape"] == [1, 8, 8]
    assert payload["float"]["validation_accuracy"] > 0.8
    accuracies = {name: entry["validation_accuracy"] for name, entry in payload["candidates"].items()}
    assert accuracies.keys() == {"calibrated", "student", "teacher"} and min(accuracies.values()) > 0.8
    assert accuracies[payload["best"]] == max(accuracies.values())
    assert any("conv1: 7 bits" in note for note in payload["notes"])
    rows = history(out)
    assert [(row["phase"], row["epoch"]) for row in rows] == [
        *(("float", e) for e in (1, 2, 3, 4)),
        *(("qat", e) for e in (0, 1, 2)),
    ]
    start = accuracies["calibrated"]
    assert rows[4] == {"phase": "qat", "epoch": 0, "validation": start, "validation_teacher": start}
    assert all(math.isfinite(row["loss"]) and 0 <= row["validation"] <= 1 for row in rows if row["epoch"])
    assert [row["lambda"] for row in rows[-2:]] == [1.0, 1.0] and "validation_teacher" in rows[-1]
    assert rows[3]["loss"] < 0.7 * rows[0]["loss"]


@pytest.mark.parametrize("candidate", ["calibrated", "student", "teacher"])
def test_the_grids_are_those_of_their_network(finished: Run, candidate: str) -> None:
    payload, out = finished
    grids, state = (
        load_grids(out / f"{candidate}.grids.json"),
        safetensors.torch.load_file(out / f"{candidate}.safetensors"),
    )
    layout = json.loads((out / "layout.json").read_text())
    assert grids.keys() == {spec["edge"] for spec in layout} and len(layout) == payload["quantizers"]
    for spec in layout:
        name = "".join(c if c.isalnum() else "_" for c in spec["edge"])
        grid = grids[spec["edge"]]
        assert np.array_equal(grid.scale, state[f"quantizers.{name}.scale"].numpy().ravel())
        assert (grid.qmin, grid.qmax, grid.zero_point) == (spec["qmin"], spec["qmax"], 0)
        if spec["kind"] == "activation":  # tensorrt is in the targets
            assert np.array_equal(grid.scale, grid.scale.astype(np.float16).astype(np.float32))


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not(finished: Run, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    (tmp_path / "other").mkdir()
    torch.manual_seed(99)  # what happened before in the process must not matter
    torch.rand(7)
    again = train(recipe(), tmp_path / "again", quiet)
    assert digests(tmp_path / "again") == digests(finished[1])
    assert {**to_json(again), "seconds": 0} == {**finished[0], "seconds": 0}
    train(recipe(seed=1), tmp_path / "other", quiet)
    first, other = digests(finished[1]), digests(tmp_path / "other")
    assert all(other[name] != first[name] for name in first if name != "layout.json")


def test_no_epochs_of_qat_are_post_training_quantization(tuned: Callable[..., TrainConfig], tmp_path: Path) -> None:
    payload = train(tuned(qat=QATConfig(epochs=0)), tmp_path, quiet)
    assert payload.candidates.keys() == {"student"} and payload.best == "student"
    assert not (tmp_path / "teacher.safetensors").exists()
    assert history(tmp_path) == []  # the float network was loaded, nothing was trained
    # 8 bits cost this network at most two of the 100 validation images.
    student, original = payload.candidates["student"].validation_accuracy, payload.float_network.validation_accuracy
    assert student >= original - 0.02
    weights = [safetensors.torch.load_file(tmp_path / f"{name}.safetensors") for name in ("float", "student")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize(("teacher", "ramp"), [("none", 0.0), ("float", 1.0)])
def test_without_ema_no_teacher_is_a_candidate(
    tuned: Callable[..., TrainConfig], tmp_path: Path, teacher: Any, ramp: float
) -> None:
    payload = train(tuned(consistency=ConsistencyConfig(teacher)), tmp_path, quiet)
    assert payload.candidates.keys() == {"calibrated", "student"}
    assert not (tmp_path / "teacher.safetensors").exists()
    assert [row["lambda"] for row in history(tmp_path)[1:]] == [ramp, ramp]
    assert all("validation_teacher" not in row for row in history(tmp_path))


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What networks, the labels' loss and the consistency loss get during QAT."""
    seen: dict[str, list[Any]] = {"inputs": [], "ce": [], "kl": [], "batches": [], "modes": []}
    wrap, ce, batches = distributed.wrap, functional.cross_entropy, Batches.__init__

    def spy_wrap(model: nn.Module) -> Any:
        forward = wrap(model)

        def spied(x: Tensor) -> Tensor:
            seen["inputs"].append(x.clone())
            seen["modes"].append((type(model).__name__, model.training, torch.is_grad_enabled()))
            return forward(x)

        return spied

    def spy_ce(logits: Tensor, labels: Tensor) -> Tensor:
        seen["ce"].append((logits.detach().clone(), labels.clone()))
        return ce(logits, labels)

    def spy_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        seen["kl"].append((student.detach().clone(), teacher.detach().clone(), temperature))
        return consistency_loss(student, teacher, temperature)

    def spy_batches(self: Any, images: Tensor, *args: Any, **kwargs: Any) -> None:
        seen["batches"].append(images)
        batches(self, images, *args, **kwargs)

    monkeypatch.setattr(distributed, "wrap", spy_wrap)
    monkeypatch.setattr(functional, "cross_entropy", spy_ce)
    monkeypatch.setattr("crqat.train.training.loop.consistency_loss", spy_kl)
    monkeypatch.setattr(Batches, "__init__", spy_batches)
    return seen


def test_unlabeled_images_feed_the_consistency_term_only(
    tuned: Callable[..., TrainConfig], tmp_path: Path, observed: dict[str, list[Any]]
) -> None:
    source = DataConfig("digits", crop_padding=0, flip=False, unlabeled=f"{__name__}:plain_images")
    train(tuned(data=source, qat=QATConfig(1, BATCH, 0.002)), tmp_path, quiet)
    assert len(observed["ce"]) == len(observed["kl"]) == STEPS
    students, teachers = observed["inputs"][::2], observed["inputs"][1::2]
    for x, target, (logits, labels), (student, teacher, _) in zip(
        students, teachers, observed["ce"], observed["kl"], strict=True
    ):
        grey = (x.flatten(1).std(dim=1) == 0).tolist()
        assert grey == (target.flatten(1).std(dim=1) == 0).tolist() == [False] * BATCH + [True] * BATCH
        assert len(labels) == len(logits) == BATCH
        assert len(student) == len(teacher) == 2 * BATCH
        assert torch.equal(student[:BATCH], logits)  # the labels' loss sees the labeled half of the same predictions


def test_unlabeled_files_stream_and_the_first_process_downloads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part, name in ((part, name) for part in ("train", "test") for name in "ab"):
        (tmp_path / part / name).mkdir(parents=True)
        for index in range(5):
            Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / part / name / f"{index}.png")
    (tmp_path / "camera" / "day").mkdir(parents=True)
    for name in ("0.png", "1.png", "day/0.png", ".hidden.png"):
        Image.new("RGB", (8, 8), (9, 0, 0)).save(tmp_path / "camera" / name)
    monkeypatch.setattr(streaming, "IN_MEMORY_BYTES", 0)
    source = DataConfig("imagefolder", root=str(tmp_path), size=8, crop=8, unlabeled="imagefolder")
    config = recipe(data=replace(source, unlabeled_root=str(tmp_path / "camera")))
    turns: list[str] = []
    monkeypatch.setattr(distributed, "first_rank_first", lambda: turn(turns))
    load = sources.load_unlabeled

    def load_in_turn(*arguments: Any) -> Images:
        turns.append("load")
        return load(*arguments)

    monkeypatch.setattr(sources, "load_unlabeled", load_in_turn)
    dataset, device = sources.of_recipe(config.data), torch.device("cpu")
    keeper = Keeper(None, 1.0, device, quiet)
    run = trainer._Run(config, dataset, split_images(10, 0.2, 0), device, quiet, keeper)
    batches = run.images.unlabeled(config.qat, strong=True, labeler=None)
    assert batches is not None
    assert isinstance(batches.images, streaming.StoredImages)  # not all of them decoded at once
    assert len(batches.images) == len(batches.labels) == 3
    assert turns == ["begin", "load", "end"]
    run = trainer._Run(recipe(data=source), dataset, split_images(10, 0.2, 0), device, quiet, keeper)
    batches = run.images.unlabeled(config.qat, strong=True, labeler=None)
    assert batches is not None
    assert (
        len(batches.images) == 8
    )  # of the labeled images themselves those that do not validate, without a look at files


def test_images_without_labels_get_the_views_of_labeled_ones_and_their_share_of_a_step(
    tuned: Callable[..., TrainConfig], tmp_path: Path, observed: dict[str, list[Any]]
) -> None:
    source = DataConfig("digits", crop_padding=0, flip=False, unlabeled=f"{__name__}:plain_images")
    source = replace(source, strong="randaugment", unlabeled_ratio=0.5)
    train(tuned(data=source, qat=QATConfig(1, BATCH, 0.002)), tmp_path, quiet)
    students, teachers = observed["inputs"][::2], observed["inputs"][1::2]
    assert {len(images) for images in observed["inputs"]} == {BATCH + BATCH // 2}
    # A plain grey image stays one but for what cutout and shifts bring in: the student's views, not the teacher's.
    assert all((images[BATCH:].flatten(1).std(dim=1) == 0).all() for images in teachers)
    assert all((images[BATCH:].flatten(1).std(dim=1) > 0).any() for images in students)
    changed = [
        (images[:BATCH] != others[:BATCH]).flatten(1).any(1).float().mean()
        for images, others in zip(students, teachers, strict=True)
    ]
    assert min(changed) > 0.5


def test_few_labels_leave_the_other_images_unlabeled(
    tuned: Callable[..., TrainConfig], tmp_path: Path, observed: dict[str, list[Any]]
) -> None:
    source = DataConfig("digits", crop_padding=0, flip=False, labeled=200, validation=0.25)
    payload = train(tuned(data=source, qat=QATConfig(1, 50, 0.002)), tmp_path, quiet)
    assert payload.validation_images == 50
    digits = sources.load("digits", None, False)
    parts = split_of(digits.train_labels, source, 0)
    constants = [torch.from_numpy(value) for value in digits.preprocessing.constants()]
    of_part = {
        name: normalize(digits.train_images[indices].float(), constants) for name, indices in asdict(parts).items()
    }
    known = {name: {image.numpy().tobytes() for image in images} for name, images in of_part.items()}
    assert len(observed["ce"]) == 3
    for images in observed["inputs"][::2]:
        names = [next(n for n in known if image.contiguous().numpy().tobytes() in known[n]) for image in images]
        assert names == ["train"] * 50 + ["unlabeled"] * 50


def test_the_float_network_goes_on_from_given_weights_with_a_teacher_of_its_own(
    tuned: Callable[..., TrainConfig], tmp_path: Path, observed: dict[str, list[Any]]
) -> None:
    source = DataConfig("digits", crop_padding=0, flip=False, labeled=200)
    section = FloatConfig(2, 60, 0.02, fine_tune=True, strong="randaugment", consistency=ConsistencyConfig(ramp_up=0.5))
    config = tuned(data=source, float_training=section, qat=QATConfig(0))
    payload = train(config, tmp_path, quiet)
    assert len(observed["ce"]) == len(observed["kl"]) == 2 * 3
    assert {len(images) for images in observed["inputs"]} == {120}
    assert observed["modes"] == [("Net", True, True), ("Net", False, False)] * 6
    assert config.model.weights is not None
    files = Path(config.model.weights), tmp_path / "float.safetensors"
    start, end = (safetensors.torch.load_file(path) for path in files)
    assert not torch.equal(start["conv1.weight"], end["conv1.weight"])
    rows = history(tmp_path)
    assert [(row["phase"], row["epoch"]) for row in rows] == [("float", 1), ("float", 2)]
    assert rows[-1]["lambda"] == 1
    last = max(rows[-1]["validation"], rows[-1]["validation_teacher"])
    assert payload.float_network.validation_accuracy == last


def test_the_float_network_labels_the_images_without_labels_once(
    tuned: Callable[..., TrainConfig], tmp_path: Path, observed: dict[str, list[Any]]
) -> None:
    source = DataConfig("digits", crop_padding=0, flip=False, labeled=200)
    config = tuned(
        data=source, qat=QATConfig(1, 60, 0.002), consistency=ConsistencyConfig(teacher="pseudo-label", ramp_up=0)
    )
    train(config, tmp_path, quiet)
    assert not observed["kl"]
    pairs = observed["ce"]  # of each step the labeled half, then the other
    assert len(pairs) == 2 * 3
    float_network = models.build(config.model.name, 10, 1)
    float_network.load_state_dict(safetensors.torch.load_file(tmp_path / "float.safetensors"))
    with torch.no_grad():
        for images, (logits, labels) in zip(observed["inputs"], pairs[1::2], strict=True):
            assert len(logits) == len(labels) == 60
            assert torch.equal(labels, float_network.eval()(images[60:]).argmax(1))


@contextmanager
def turn(turns: list[str]) -> Iterator[None]:
    turns.append("begin")
    yield
    turns.append("end")


def test_views_and_teachers(
    tuned: Callable[..., TrainConfig],
    tmp_path: Path,
    observed: dict[str, list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Student and teacher see two views of the same images; the teacher predicts in eval mode, without a gradient."""
    steps: list[int] = []

    def spy(step: int, decay: float) -> float:
        steps.append(step)
        return ema_alpha(step, decay)

    monkeypatch.setattr("crqat.train.training.consistency.ema_alpha", spy)
    train(tuned(qat=QATConfig(1, BATCH, 0.002), consistency=ConsistencyConfig(temperature=3.0)), tmp_path, quiet)
    assert steps == list(range(STEPS))
    first, second = observed["inputs"][:2]
    assert not torch.equal(first, second)
    # A crop shifts by up to a pixel each way: the inner part of one view lies somewhere in the other.
    inner = first[:, :, 3:5, 3:5].flatten(1)
    windows = second.unfold(2, 2, 1).unfold(3, 2, 1)[:, :, 1:6, 1:6].flatten(1, 3).flatten(2)
    assert ((windows - inner[:, None]).abs().amax(dim=2) == 0).any(dim=1).all()
    assert observed["modes"] == [("GraphModule", True, True), ("GraphModule", False, False)] * STEPS
    assert {temperature for _, _, temperature in observed["kl"]} == {3.0}
    # After one step the teacher was the student of then (alpha 0): from the second step on it is another network.
    assert not torch.equal(observed["kl"][3][0], observed["kl"][3][1])


def test_the_float_teacher_is_the_float_network(
    tuned: Callable[..., TrainConfig], tmp_path: Path, observed: dict[str, list[Any]]
) -> None:
    config = tuned(qat=QATConfig(1, BATCH, 0.002), consistency=ConsistencyConfig("float"))
    train(config, tmp_path, quiet)
    net = Net(10, 1).eval()
    net.load_state_dict(safetensors.torch.load_file(tmp_path / "float.safetensors"))
    net = net.to(memory_format=torch.channels_last)  # the layout decides the order of sums, and so the last bits
    with torch.no_grad():
        for x, (_, target, _) in zip(observed["inputs"][1::2], observed["kl"], strict=True):
            assert torch.equal(net(x), target)


def test_plain_qat_needs_one_view_and_no_unlabeled_images(
    tuned: Callable[..., TrainConfig], tmp_path: Path, observed: dict[str, list[Any]]
) -> None:
    source = DataConfig("digits", crop_padding=1, flip=False, unlabeled=f"{__name__}:plain_images")
    config = tuned(data=source, qat=QATConfig(1, BATCH, 0.002), consistency=ConsistencyConfig("none"))
    train(config, tmp_path, quiet)
    assert not observed["kl"]
    assert [len(x) for x in observed["inputs"]] == [BATCH] * STEPS


def test_training_sees_the_training_part_alone(
    tuned: Callable[..., TrainConfig],
    tmp_path: Path,
    observed: dict[str, list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The validation part selects, nothing else; of test images a training does not even hold a reference."""
    digits = sources.load("digits", None, False)
    part = split_images(1000, 0.1, seed=0)
    visible = ("train_images", "train_labels", "class_names", "preprocessing", "notes")
    monkeypatch.setattr(
        sources, "load", lambda *_, **__: SimpleNamespace(**{name: getattr(digits, name) for name in visible})
    )
    calibrated: list[Tensor] = []
    evaluated: list[Tensor] = []

    def spy_calibrate(student: fx.GraphModule, batches: list[Tensor], calibration: str) -> None:
        calibrated.extend(batches)
        calibrate(student, batches, calibration)

    def spy_accuracy(model: nn.Module, images: Tensor, labels: Tensor, preprocessing: Any) -> float:
        assert torch.equal(labels, digits.train_labels[part.validation])
        evaluated.append(images)
        return accuracy(model, images, labels, preprocessing)

    monkeypatch.setattr("crqat.train.quantizers.calibration.calibrate", spy_calibrate)
    monkeypatch.setattr(trainer, "accuracy", spy_accuracy)
    # The labeled source as its own unlabeled one: its validation part stays unseen there too.
    train(tuned(data=DataConfig("digits", crop_padding=1, flip=False, unlabeled="digits")), tmp_path, quiet)
    assert len(observed["batches"]) == 2
    assert all(torch.equal(images, digits.train_images[part.train]) for images in observed["batches"])
    expected = torch.cat(list(evaluation_batches(digits.train_images[part.train[:256]], digits.preprocessing, 256)))
    assert torch.equal(torch.cat(calibrated), expected)
    # The float network and the calibrated one; student and teacher after each epoch; both in their final state.
    assert len(evaluated) == 2 + 2 * 2 + 2
    assert all(torch.equal(images, digits.train_images[part.validation]) for images in evaluated)


@pytest.mark.parametrize(
    ("calibrated", "student", "teacher", "best"),
    [
        (0.4, 0.5, 0.6, "teacher"),
        (0.4, 0.6, 0.5, "student"),
        (0.5, 0.5, 0.5, "student"),
        (0.5, 0.4, 0.5, "teacher"),
        (0.7, 0.5, 0.6, "calibrated"),
    ],
)
def test_the_best_candidate_on_the_validation_part_is_called_best(
    tuned: Callable[..., TrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calibrated: float,
    student: float,
    teacher: float,
    best: str,
) -> None:
    # Called for the float and the calibrated network, after the epoch for both, and for both in their final state.
    answers = iter([0.9, calibrated, 0.1, 0.2, student, teacher])
    monkeypatch.setattr(trainer, "accuracy", lambda *_: next(answers))
    payload = train(tuned(qat=QATConfig(1, BATCH, 0.002)), tmp_path, quiet)
    assert payload.best == best
    assert payload.candidates == {
        "calibrated": Candidate(calibrated),
        "student": Candidate(student),
        "teacher": Candidate(teacher),
    }
    assert payload.warnings == ([WORSE] if best == "calibrated" else [])


WORSE = (
    "training made the network worse: student 50.00%, teacher 60.00%, calibration alone 70.00% of 100 validation "
    "images, so the calibrated network is the best; try a lower qat.lr (now 0.002), more qat.epochs (now 1), or "
    "qat.epochs: 0, which saves the time"
)


def test_a_training_that_wrecks_the_network_leaves_the_calibrated_one_as_it_was(
    tuned: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    (tmp_path / "wrecked").mkdir()
    (tmp_path / "calibrated").mkdir()
    payload = train(tuned(qat=QATConfig(1, BATCH, 0.3)), tmp_path / "wrecked", quiet)
    assert payload.best == "calibrated" and payload.warnings
    assert payload.candidates["student"].validation_accuracy < 0.5
    train(tuned(qat=QATConfig(epochs=0)), tmp_path / "calibrated", quiet)
    delivered, alone = digests(tmp_path / "wrecked"), digests(tmp_path / "calibrated")
    for file in ("safetensors", "grids.json"):
        assert delivered[f"calibrated.{file}"] == alone[f"student.{file}"]


@pytest.mark.parametrize("lr", [1e4, 1e12, 1e25, 1e38])
@pytest.mark.parametrize("section", ["float", "qat"])
def test_a_training_that_diverges_names_its_learning_rate(
    tuned: Callable[..., TrainConfig], tmp_path: Path, section: str, lr: float
) -> None:
    diverging = 1, BATCH, lr
    config = recipe(float_training=FloatConfig(*diverging)) if section == "float" else tuned(qat=QATConfig(*diverging))
    with pytest.raises(UsageError, match=r"lr") as caught:
        train(config, tmp_path, quiet)
    # Float32 can hold the ruins of the smaller rates; then it is a scale that no file can hold that shows them.
    assert str(caught.value).startswith((f"{section}.lr: ", "conv1: a scale of ", "fc: a scale of "))
    assert "lower " in str(caught.value) and "\n" not in str(caught.value)


def test_weights_that_are_no_numbers_at_the_end_of_an_epoch_are_divergence_too(
    tuned: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step of all can break the weights after the last loss was finite."""
    original = loop.update

    def breaks(self: Any, loss: Tensor) -> None:
        original(self, loss)
        if self.steps_done == self.steps:
            self.model.get_parameter("fc.bias").data[3] = math.inf

    monkeypatch.setattr(loop, "update", breaks)
    with pytest.raises(UsageError, match=r"^qat\.lr: weights are not finite in epoch 2; lower qat\.lr \(now 0\.002\)$"):
        train(tuned(), tmp_path, quiet)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_in_a_file_must_be_numbers(finished: Run, tmp_path: Path, value: float) -> None:
    state = safetensors.torch.load_file(finished[1] / "float.safetensors")
    state["bn1.running_var"][2] = value
    path = tmp_path / "broken.safetensors"
    safetensors.torch.save_file(state, path)
    wrong = r"holds values that are infinite or NaN: 1 of \d+ in bn1\.running_var; the file is damaged"
    with pytest.raises(UsageError, match=rf"^model\.weights: {path} {wrong}$"):
        train(recipe(model=ModelConfig(f"{__name__}:network", str(path))), tmp_path, quiet)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device_is_an_error_of_the_environment(tmp_path: Path) -> None:
    with pytest.raises(
        ToolError, match=r"^device: cuda is asked for and torch sees no CUDA device; set `device: auto`"
    ):
        train(recipe(device="cuda"), tmp_path, quiet)
    assert not list(tmp_path.iterdir())
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")


def test_without_a_compiler_training_says_so(
    tuned: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    payload = train(tuned(compile="auto", qat=QATConfig(0)), tmp_path, quiet)
    assert payload.compiled == "no: no compiler"


def test_a_rebuilt_network_gives_the_same_bits(
    tuned: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivered: list[fx.GraphModule] = []

    def spy(model: fx.GraphModule, *args: Any) -> list[str]:
        delivered.append(model)
        return make_representable(model, *args)

    monkeypatch.setattr("crqat.train.quantizers.finalize.make_representable", spy)
    config = tuned()
    payload = train(config, tmp_path, quiet)
    digits = sources.load("digits", None, False)
    x = torch.cat(list(evaluation_batches(digits.test_images, digits.preprocessing, 200)))
    torch.manual_seed(1234)  # a rebuilt network is first drawn at random
    for name, model in zip(("calibrated", "student", "teacher"), delivered, strict=True):
        rebuilt = rebuild(tmp_path, config, payload, name)
        specs = rebuilt.specs
        assert not rebuilt.training and not model.training
        with torch.no_grad():
            assert torch.equal(rebuilt(x), model(x))
        layout = json.loads((tmp_path / "layout.json").read_text())
        assert json.loads(json.dumps([asdict(spec) for spec in specs])) == layout
        grids = load_grids(tmp_path / f"{name}.grids.json")
        for spec in specs:
            assert quantizer_of(rebuilt, spec).grid().to_json() == grids[spec.edge].to_json()
    with pytest.raises(
        UsageError, match=r"the checkpoint does not fit .*:wider as it is now; train again with --force$"
    ):
        rebuild(tmp_path, replace(config, model=ModelConfig(f"{__name__}:wider")), payload, "student")


@pytest.mark.parametrize("before", [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize("fails", [False, True])
def test_deterministic_settings_are_restored(
    tuned: Callable[..., TrainConfig], tmp_path: Path, before: tuple[bool, bool], fails: bool
) -> None:
    def settings() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()

    inside: list[tuple[bool, bool]] = []

    def progress(task: str, done: int, total: int, note: str = "") -> None:
        inside.append(settings())
        if fails:
            raise KeyboardInterrupt

    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    try:
        if fails:
            with pytest.raises(KeyboardInterrupt):
                train(tuned(qat=QATConfig(0)), tmp_path, progress)
        else:
            train(tuned(qat=QATConfig(0)), tmp_path, progress)
        assert settings() == before
        assert all(enabled for enabled, _ in inside) and inside
    finally:
        torch.use_deterministic_algorithms(False)


class HostWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes everything within an epoch that would make the host wait for a device."""

    ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "_unique2")

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.active, self.operations = False, 0
        self.found: list[str] = []
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__"):
            patch.setattr(torch.Tensor, name, self._note(name, getattr(torch.Tensor, name)))
        epoch, waits = Batches.epoch, self

        def watched(self: Batches, *args: Any, **kwargs: Any) -> Iterator[tuple[Tensor, ...]]:
            for batch in epoch(self, *args, **kwargs):
                waits.active = True
                yield batch
            waits.active = False

        patch.setattr(Batches, "epoch", watched)

    def _note(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def noted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.active:
                self.found.append(f"Tensor.{name}")
            return original(tensor, *args, **kwargs)

        return noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.active:
            self.operations += 1
            name = func.overloadpacket.__name__
            masked = name in ("index", "index_put", "index_put_") and any(
                index is not None and index.dtype == torch.bool for index in args[1]
            )
            copied = name == "_to_copy" and kwargs.get("device") is not None
            if name in self.ASKS or masked or copied:
                self.found.append(name)
        return func(*args, **kwargs)


@pytest.mark.parametrize("teacher", ["ema", "float", "none"])
def test_no_training_step_waits_for_the_device(
    tuned: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: Any
) -> None:
    """A `.item()` in a step costs a GPU its queue: losses, schedules and the teacher are handled without one."""
    source = DataConfig("digits", crop_padding=1, flip=True, unlabeled=f"{__name__}:plain_images", strong="randaugment")
    config = tuned(data=source, consistency=ConsistencyConfig(teacher))
    if teacher == "ema":  # with all switches of few bits
        switches: dict[str, Any] = {"freeze_bn_at": 0.7, "freeze_ranges_at": 0.8, "scale_lr": 0.5, "damping": 0.1}
        config = replace(config, qat=replace(config.qat, progressive_bits=(8, 7), **switches))
    if teacher == "none":
        config = recipe(data=source, consistency=ConsistencyConfig(teacher))  # the float training too
    with HostWaits(monkeypatch) as waits:
        train(config, tmp_path, quiet)
    assert waits.found == []
    assert waits.operations > 2 * STEPS * 50  # it did watch


PLANTED: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda loss: loss.item(),
    "bool": lambda loss: bool(loss > 1e9),
    "float": lambda loss: float(loss.detach()),
    "cpu": lambda loss: loss.detach().cpu(),
    "isnan": lambda loss: torch.equal(loss, loss),
    "mask": lambda loss: torch.ones(3)[torch.tensor([True, False, True])],
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_wait_is_noticed(
    tuned: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    step = loop.update
    monkeypatch.setattr(loop, "update", lambda self, loss: (PLANTED[kind](loss), step(self, loss))[1])
    with HostWaits(monkeypatch) as waits:
        train(tuned(qat=QATConfig(1, 300, 0.002)), tmp_path, quiet)
    assert len(waits.found) >= 3  # in each of the three steps


def test_calibration_observes_the_float_network_and_leaves_the_quantizers_on(
    tuned: Callable[..., TrainConfig],
) -> None:
    digits = sources.load("digits", None, False)
    run = trainer._Run(tuned(), digits, split_images(1000, 0.1, 0), CPU, quiet, Keeper(None, 0, CPU, quiet))
    model = run.float_model(*initial(run))
    student = run.quantize(model)
    (x,) = evaluation_batches(digits.train_images[run.split.train[:256]], digits.preprocessing, 256)
    assert isinstance(model, Net)
    with torch.no_grad():
        first = functional.relu(model.bn1(model.conv1(x)))
        second = functional.relu(model.bn2(model.conv2(first)))
    by_edge = {spec.edge: spec for spec in student.specs}
    for edge, values in {"post_hooks.x__0.0": x, "post_hooks./relu/1__0.0": second}.items():
        found = quantizer_of(student, by_edge[edge])
        expected, observer = copy.deepcopy(found), ActivationObserver()
        observer.update(values)
        observer.calibrate(expected)
        assert torch.equal(found.scale, expected.scale) and found.grad_scale == expected.grad_scale
    weight = by_edge["pre_hooks.conv2/conv2d/0__1.0"]
    assert torch.equal(weight_of(student, weight), model.conv2.weight)
    expected = copy.deepcopy(quantizer_of(student, weight))
    calibrate_weight(expected, model.conv2.weight)
    assert torch.equal(quantizer_of(student, weight).scale, expected.scale)
    with torch.no_grad():
        error = (student(x) - model(x)).square().mean() / model(x).square().mean()
    assert 0 < error < 0.01  # quantized again, and well


def test_steps_stay_positive_and_a_networks_own_scale_does_not_have_to(
    tuned: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.update

    def shrinks(self: Any, loss: Tensor) -> None:
        """The optimizer's step ends with a negative scale."""

        def shrink(*_: Any) -> None:
            for name, parameter in self.model.named_parameters():
                if name.startswith("quantizers.post_hooks_x"):
                    parameter.detach().fill_(-1.0)

        hook = self.optimizer.register_step_post_hook(shrink)
        original(self, loss)
        hook.remove()

    monkeypatch.setattr(loop, "update", shrinks)
    train(tuned(targets=("onnxruntime",), qat=QATConfig(1, 300, 0.002)), tmp_path, quiet)
    state = safetensors.torch.load_file(tmp_path / "student.safetensors")
    assert state["quantizers.post_hooks_x__0_0.scale"].item() == np.float32(MIN_SCALE)
    assert state["gain.scale"].item() < -0.5
    assert all((value > 0).all() for key, value in state.items() if key.startswith("quantizers."))


def test_learning_rate_and_weight_decay() -> None:
    model = Net(10, 1)
    model.add_module("quantizers", nn.ParameterDict({"a": nn.Parameter(torch.ones(8, 1, 1, 1))}))
    section = FloatConfig(epochs=4, batch_size=1, lr=0.5, weight_decay=0.1)
    fit = Fit(model, section, 50, "qat", torch.device("cpu"), quiet)
    groups: dict[float, set[int]] = {0.0: set(), 0.1: set()}
    for group in fit.optimizer.param_groups:
        groups[group["weight_decay"]] |= {id(p) for p in group["params"]}
    named = dict(model.named_parameters())
    assert groups[0.1] == {id(named[name]) for name in ("conv1.weight", "conv2.weight", "fc.weight")}
    assert groups[0.0] == {id(p) for p in named.values()} - groups[0.1]
    rates = []
    for epoch in fit.epochs():
        for _ in range(50):
            loop.update(fit, model.fc.bias.sum() * 0 + 2.0)
            (rate,) = {group["lr"] for group in fit.optimizer.param_groups}
            rates.append(rate)
        row = fit.end_of_epoch(epoch, validation=0.5)
        assert row["loss"] == pytest.approx(2.0) and row["phase"] == "qat" and row["epoch"] == epoch
    # Warm-up over 5 % of the 200 steps, then a cosine to zero.
    expected = [0.5 * min(1, (t + 1) / 10) * 0.5 * (1 + math.cos(math.pi * t / 200)) for t in range(200)]
    assert rates == pytest.approx(expected)
    assert max(rates) > 0.49 and rates[-1] < 1e-4


def test_bn_is_estimated_anew_with_the_quantizers_on(
    tuned: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean and variance of what enters BN, over full batches of unaugmented training images; nothing else changes."""
    before: list[tuple[fx.GraphModule, dict[str, Tensor]]] = []
    seen: list[Tensor] = []
    estimate = trainer._Run.estimate_bn

    def spy(run: Any, model: Any) -> None:
        model.to(memory_format=torch.contiguous_format)
        before.append((model, {name: value.clone() for name, value in model.state_dict().items()}))
        handle = model.get_submodule("bn1").register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
        estimate(run, model)
        handle.remove()

    monkeypatch.setattr(trainer._Run, "estimate_bn", spy)
    monkeypatch.setattr("crqat.train.quantizers.finalize.make_representable", lambda *_: [])
    train(tuned(qat=QATConfig(1, 100, 0.002, bn_images=350), consistency=ConsistencyConfig("none")), tmp_path, quiet)
    ((model, old),) = before
    assert [len(x) for x in seen] == [100, 100, 100]
    assert not model.training
    batches = [x.double().transpose(0, 1).flatten(1) for x in seen]
    mean = torch.stack([x.mean(dim=1) for x in batches]).mean(dim=0)
    variance = torch.stack([x.var(dim=1) for x in batches]).mean(dim=0)
    bn = model.get_submodule("bn1")
    torch.testing.assert_close(bn.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bn.running_var.double(), variance, rtol=1e-4, atol=1e-5)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, old[name])}
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{bn}.{kind}" for bn in ("bn1", "bn2") for kind in kinds}


@pytest.mark.parametrize("method", ["lsq", "minmax"])
def test_bfloat16_trains_and_delivers_float32(
    tuned: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    types: set[tuple[str, torch.dtype, torch.dtype]] = set()
    forward = METHODS[method].forward

    def spy(self: Any, x: Tensor) -> Tensor:
        out: Tensor = forward(self, x)
        if self.spec.kind == "activation" and out.requires_grad:
            types.add((self.spec.edge, x.dtype, out.dtype))
            # The codes are those of the same values in float32.
            assert torch.equal(out, forward(self, x.detach().float()))
        return out

    monkeypatch.setattr(METHODS[method], "forward", spy)
    config = recipe(
        float_training=FloatConfig(4, BATCH, 0.05, precision="bfloat16"),
        qat=QATConfig(1, BATCH, 0.002, precision="bfloat16"),
        quantization=QuantizationConfig(weight_method=method, activation_method=method, calibration_images=256),
    )
    payload = train(config, tmp_path, quiet)
    assert min(entry.validation_accuracy for entry in payload.candidates.values()) > 0.8
    assert {dtype for _, _, dtype in types} == {torch.float32}
    assert torch.bfloat16 in {dtype for _, dtype, _ in types}
    for name in ("float", "student", "teacher"):
        state = safetensors.torch.load_file(tmp_path / f"{name}.safetensors")
        assert {value.dtype for value in state.values()} <= {torch.float32, torch.int64}
    # Of activations: BN folding moves a weight's step to a number that float16 holds.
    steps = [
        [grid.scale[0] for edge, grid in load_grids(tmp_path / f"{name}.grids.json").items() if edge[:4] == "post"]
        for name in ("student", "teacher")
    ]
    assert method == "lsq" or steps[0] == steps[1]  # a range that is kept is the teacher's too


def test_a_quantizer_method_that_cannot_be_had_is_told_before_anything_is_read_or_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Any] = []
    monkeypatch.setattr(sources, "of_recipe", lambda *arguments: reads.append(arguments))
    for key in ("weight_method", "activation_method"):
        config = recipe(quantization=QuantizationConfig(**{key: f"{__name__}:Net"}))  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=rf"^quantization\.{key}: .*:Net does not derive from"):
            train(config, tmp_path, quiet)
    assert not reads and not list(tmp_path.iterdir())


def test_published_weights_of_other_classes_need_a_float_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Net(10, 1)
    monkeypatch.setattr(models, "pretrained", lambda *_: (copy.deepcopy(made), True))
    monkeypatch.setattr("crqat.train.models.published.data_section", lambda config: config.data)  # the digits are grey
    asked = ModelConfig("timm/resnet18", "pretrained")
    with pytest.raises(UsageError, match=r"^model\.weights: .* not for 10 classes; add a `float` section"):
        train(recipe(model=asked, float_training=FloatConfig(0)), tmp_path, quiet)
    run = _run_of(recipe(model=asked, float_training=FloatConfig(1, BATCH, 0.01)))
    trained = run.float_model(*initial(run))
    assert not torch.equal(trained.state_dict()["fc.weight"], made.state_dict()["fc.weight"])
    monkeypatch.setattr(models, "pretrained", lambda *_: (copy.deepcopy(made), False))
    run = _run_of(recipe(model=asked, float_training=FloatConfig(0)))
    kept = run.float_model(*initial(run))
    assert torch.equal(kept.state_dict()["fc.weight"], made.state_dict()["fc.weight"])


def _run_of(config: TrainConfig) -> trainer._Run:
    digits = sources.load("digits", None, False)
    return trainer._Run(config, digits, split_images(1000, 0.1, 0), CPU, quiet, Keeper(None, 0, CPU, quiet))


def test_steps_behind_calibration_are_keys_of_a_recipe(tuned: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """What they did is said, and the network that they make is the one that is delivered."""
    few = QuantizationConfig(weights=4, activations=8, calibration_images=200)
    weights = []
    for name, ptq in (("calibrated", PTQConfig()), ("improved", PTQConfig(True, True, True))):
        (tmp_path / name).mkdir()
        payload = train(tuned(qat=QATConfig(0), quantization=few, ptq=ptq), tmp_path / name, quiet)
        assert payload.candidates["student"].validation_accuracy > 0.8
        weights.append(read_tensors(tmp_path / name / "student.safetensors"))
        said = [note for note in payload.notes if "layers" in note]
        assert len(said) == (3 if name == "improved" else 0)
    moved = [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]
    assert [name for name in moved if name.endswith(".weight") and weights[0][name].ndim > 1]


def initial(run: trainer._Run) -> tuple[nn.Module, bool]:
    """The float network before training, and whether its weights stay as they are."""
    built = float_network.build(run.config, run.dataset, run.split, run.nncf, run.device, quiet)
    return built.network, built.unchanged
