from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench import training_methods
from crqat.pipeline.recipe import recipe

RECIPE = """
name: small
data: {source: digits}
model: {name: cifar/resnet20}
float: {epochs: 1}
"""


def test_all_arms_start_from_one_float_network_and_differ_in_one_thing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(RECIPE)
    seen: dict[str, recipe.Recipe] = {}
    stages: list[tuple[str, str, str]] = []

    def crqat(arguments: list[str], check: bool) -> None:
        stage, path, settings = arguments[3], Path(arguments[4]), arguments[6::2]
        config = recipe.load(path, settings)  # every key that an arm replaces is one of a recipe's
        stages.append((config.name, config.export.candidate, stage))
        run, candidate = tmp_path / "runs" / config.name, config.export.candidate
        seen[f"{config.name} {candidate}"] = config
        if stage == "train":
            payload: dict[str, Any] = {"seconds": 10.0, "candidates": {candidate: {"validation_accuracy": 0.9}}}
        elif stage == "export":
            payload = {"candidate": candidate}
        else:
            accuracy = {"top1": 0.8 + 0.1 * config.seed}
            versus = {"drop_points": 1.0, "drop_interval_points": [0.5, 1.5]}
            entry = {"accuracy": accuracy, "versus_float": versus, "verification": {"status": "passed"}}
            results = {"dataset": {"n": 100}, "models": {"float.onnx": entry, training_methods.FILE: entry}}
            (run / stage).mkdir(parents=True, exist_ok=True)
            (run / stage / "results.json").write_text(json.dumps(results))
            return
        (run / stage).mkdir(parents=True, exist_ok=True)
        (run / stage / "manifest.json").write_text(json.dumps({"payload": payload}))

    monkeypatch.setattr("bench.training_methods.subprocess.run", crqat)
    result = CliRunner().invoke(
        training_methods.rows_of_recipe, ["small.yaml", "--seeds", "0,1", "--set", "qat.epochs=2"]
    )
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "bench-out" / "arms-small.json").read_text())["rows"]
    names = ["PTQ", "QAT", "QAT, EMA of the weights", "QAT, distillation", "CR-QAT, student", "CR-QAT, teacher"]
    assert [(row["arm"], row["seed"]) for row in rows] == [(name, seed) for seed in (0, 1) for name in names]
    assert [row["top1"] for row in rows] == [0.8] * 6 + [0.9] * 6
    assert [stage for _, _, stage in stages] == ["train", "export", "benchmark"] * 12
    settings = {key: (c.qat.epochs, c.consistency.teacher, c.consistency.weight) for key, c in seen.items()}
    for seed in (0, 1):
        assert settings[f"small-ptq-seed{seed} student"][0] == 0
        assert settings[f"small-qat-seed{seed} student"] == settings[f"small-qat-seed{seed} teacher"] == (2, "ema", 0.0)
        assert settings[f"small-kd-seed{seed} student"] == (2, "float", 1.0)
        assert settings[f"small-cr-seed{seed} student"] == settings[f"small-cr-seed{seed} teacher"] == (2, "ema", 1.0)
        weights = {c.model.weights for key, c in seen.items() if f"seed{seed}" in key and "ptq" not in key}
        assert weights == {f"runs/small-ptq-seed{seed}/train/float.safetensors"}
        assert seen[f"small-ptq-seed{seed} student"].model.weights is None
    assert "85.00" in result.output  # the mean of the seeds
