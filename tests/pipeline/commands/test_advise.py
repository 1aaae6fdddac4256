"""`crqat advise`: the first step that passes is the advice, on images that nothing else has seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from torch import nn

from crqat.core.errors import UsageError
from crqat.core.progress import quiet
from crqat.core.results.advice import Advice, Step
from crqat.core.results.verdict import Verdict
from crqat.pipeline.cli import crqat
from crqat.pipeline.commands.advise import Ladder, chosen, show
from crqat.pipeline.gate import rules
from crqat.pipeline.recipe import recipe as recipes
from crqat.train.config import DataConfig
from crqat.train.data import sources
from crqat.train.data.split import split_of


def network(classes: int, channels: int) -> nn.Module:
    """Learns digits in seconds."""
    first, second = nn.Conv2d(channels, 8, 3), nn.Conv2d(8, 16, 3, 2)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(64, classes))


def write(folder: Path, limit: float, **further: object) -> Path:
    """A recipe of the network above at three bits."""
    content = {
        "name": "digits",
        "targets": ["onnxruntime"],
        "data": {"source": "digits", "crop_padding": 0, "flip": False},
        "model": {"name": f"{__name__}:network"},
        "float": {"epochs": 8, "lr": 0.05, "batch_size": 32},
        "quantization": {"weights": 3, "activations": 4, "first_layer": 4, "last_layer": 4},
        "qat": {"epochs": 2, "batch_size": 64, "lr": 0.005},
        "compile": "never",
        "benchmark": {"latency_rounds": 6, "latency_seconds": 0.1},
        "gate": {"max_accuracy_drop": limit},
        **further,
    }
    (folder / "digits.yaml").write_text(yaml.safe_dump(content))
    return folder / "digits.yaml"


def test_judging_images_are_in_no_other_part() -> None:
    """Whether all labels are kept or a part; the same ones for the same seed."""
    labels = torch.arange(200) % 10
    for labeled in (None, 60):
        config = DataConfig("digits", judging=0.25, labeled=labeled)
        found = split_of(labels, config, seed=3)
        parts = torch.cat([found.train, found.validation, found.unlabeled, found.judging])
        assert len(found.judging) == 50
        assert sorted(parts.tolist()) == list(range(200))
        assert found.judging.equal(split_of(labels, config, seed=3).judging)
    with pytest.raises(UsageError, match=r"^data\.judging: a share of 0\.001"):
        split_of(labels, DataConfig("digits", judging=0.001), seed=3)


def test_the_first_step_that_passes_is_measured_on_the_test_images(tmp_path: Path) -> None:
    """The whole way: table, picture, JSON, a recipe that runs, and the gate's exit code; then the same again."""
    recipe, runs = write(tmp_path, 60.0), tmp_path / "runs"
    result = CliRunner().invoke(crqat, ["advise", str(recipe), "--runs", str(runs)])
    assert result.exit_code == 0, result.output
    out = runs / "digits-advise"
    advice = json.loads((out / "advice.json").read_text())
    assert [step["name"] for step in advice["steps"]] == ["calibration-minmax"] == [advice["chosen"]]
    assert advice["passed"]
    assert advice["images"] == 200
    assert (out / "advice.png").stat().st_size > 1000
    chosen = recipes.load(out / "recipe.yaml")
    assert chosen.quantization.calibration == "minmax"
    assert chosen.data.judging == 0.2
    assert "advice: calibration-minmax, the cheapest step that passes" in result.output
    assert "gate: PASS" in result.output
    config = recipes.load(recipe)
    told: list[str] = []
    Ladder(config, runs, None, lambda task, *_: told.append(task)).climb()
    assert not [task for task in told if "epoch" in task or "float" in task]


def test_every_step_is_tried_where_none_passes(tmp_path: Path) -> None:
    """Each builds on the best before it, none sees the judging images, and the best is named."""
    config = recipes.load(write(tmp_path, 1.5))
    ladder = Ladder(config, tmp_path / "runs", None, quiet, every=True)
    advice = ladder.climb()
    assert [step.name for step in advice.steps] == [
        "calibration-minmax", "calibration-percentile", "calibration-mse", "bias-correction", "equalization",
        "adaptive-rounding", "wider-layers", "short-qat", "qat-ema",
    ]  # fmt: skip
    assert not any(step.status == "pass" for step in advice.steps[:3])
    passing = [step.name for step in advice.steps if step.status == "pass"]
    best = min(advice.steps, key=lambda step: (step.status == "fail", step.drop_points)).name
    assert (advice.passed, advice.chosen) == (bool(passing), passing[0] if passing else best)
    assert all(len(step.verdicts) == 1 for step in advice.steps)
    configs = list(ladder.configs.values())
    assert {config.data.judging for config in configs} == {0.2}
    assert [config.qat.epochs for config in configs] == [0] * 7 + [1, 2]
    assert configs[5].ptq.adaround
    assert configs[6].quantization.overrides
    floats = {(tmp_path / "runs" / config.name / "train" / "float.safetensors").read_bytes() for config in configs}
    assert len(floats) == 1
    wider = advice.steps[6]
    assert all(step.int8_share == 1.0 for step in advice.steps)
    assert all(0 < step.size_bytes <= wider.size_bytes + 4096 for step in advice.steps)


def test_a_folder_judges(tmp_path: Path) -> None:
    """Its class folders are those of the recipe's data, or it is refused before anything else is read."""
    dataset = sources.load("digits", None, False)
    for index in range(40):
        folder = tmp_path / "judge" / dataset.class_names[int(dataset.test_labels[index])]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(dataset.test_images[index, 0].numpy()).save(folder / f"{index}.png")
    config = recipes.load(write(tmp_path, 60.0))
    advice = Ladder(config, tmp_path / "runs", tmp_path / "judge", quiet).climb()
    assert (advice.images, advice.source) == (40, str(tmp_path / "judge"))
    assert advice.float_top1 > 0.7
    (tmp_path / "judge" / "eleven").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "judge" / "eleven" / "0.png")
    with pytest.raises(UsageError, match=r"^--judge: .* has eleven, which is not a class"):
        Ladder(config, tmp_path / "others", tmp_path / "judge", quiet).climb()
    assert not (tmp_path / "others").exists()


def test_a_float_network_of_elsewhere_may_have_seen_the_images(tmp_path: Path) -> None:
    """Then the drop may be understated, and that is said; a folder is the way out."""
    weights = tmp_path / "weights.pt"
    torch.save(network(10, 1).state_dict(), weights)
    model = {"name": f"{__name__}:network", "weights": str(weights)}
    config = recipes.load(write(tmp_path, 100.0, model=model, float=None))
    advice = Ladder(config, tmp_path / "runs", None, quiet).climb()
    assert advice.understated.startswith("the float network was trained elsewhere and may have seen these images")


def test_what_cannot_be_decided_or_rounded_is_said_at_once(tmp_path: Path) -> None:
    """Too few images for the limit, before anything is trained; a step that a method forbids is left out."""
    config = recipes.load(write(tmp_path, 0.5))
    with pytest.raises(UsageError, match=r"^data\.judging: 200 images cannot show that a drop is within 0\.5 points"):
        Ladder(config, tmp_path / "runs", None, quiet).climb()
    assert not (tmp_path / "runs").exists()
    few = {"weights": 2, "activations": 4, "weight_method": "dorefa"}
    config = recipes.load(write(tmp_path, 1.5, quantization=few))
    told: list[str] = []
    ladder = Ladder(config, tmp_path / "runs", None, lambda task, done, total, note="": told.append(f"{task} {note}"))
    names = [step.name for step in ladder.climb().steps]
    assert "adaptive-rounding" not in names
    assert "short-qat" in names
    assert [line for line in told if line.startswith("step adaptive-rounding left out: ptq.adaround: 0: DoReFa")]


def test_a_best_step_that_is_inconclusive_is_not_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    """More judging images might show that it passes; the output says how many."""

    def advice(status: Any, needed: int | None) -> Advice:
        verdict = Verdict("accuracy_drop", "mse", status, 0.5, (-1.32, 2.54), 2.0, 200, "", needed)
        step = Step("mse", "run", 0.1, 0.9, 0.5, (-1.32, 2.54), [verdict], status, [], 8.0, 1000, 1.0)
        return Advice(200, "here", "", 0.905, [step], "mse", False)

    assert rules.exit_code(chosen(advice("inconclusive", 900)).verdicts) == 4
    assert rules.exit_code(chosen(advice("fail", None)).verdicts) == 1
    show(advice("inconclusive", 900), Path("out"))
    assert (
        "no step passes; the best is mse (inconclusive); about 900 judging images would decide\n"
        in capsys.readouterr().out
    )
    show(advice("fail", None), Path("out"))
    assert "no step passes; the best is mse (fail)\n" in capsys.readouterr().out
