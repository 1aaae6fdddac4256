"""Stages that take no time: the pipeline is tested on what they owe each other, not on what they compute."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from crqat.core.preprocessing import Preprocessing
from crqat.core.progress import Progress
from crqat.core.results.benchmark import Results
from crqat.core.results.export import ExportedModel, ExportPayload
from crqat.core.results.training import Candidate, FloatNetwork, TrainingPayload
from crqat.core.results.verification import Verification
from crqat.core.typed_json import from_json

RECIPE = "name: run1\ndata: {source: digits}\nmodel: {name: cifar/resnet20}\nfloat: {epochs: 1}\n"


@dataclass
class Fakes:
    """The fake stages' record and what a test may change.

    Attributes:
        recipe: A recipe file that fits them.
        calls: Names of the stages that really ran.
        results: What the fake benchmark measures, as JSON.
        content: Of the files that the fake train and export write.
        trouble: Raised by the stage of that name after it wrote a file.
    """

    recipe: Path
    results: dict[str, Any]
    content: str = "not really"
    calls: list[str] = field(default_factory=list)
    trouble: dict[str, BaseException] = field(default_factory=dict)

    def train(
        self,
        config: Any,
        out: Path,
        progress: Progress,
        states: Path | None = None,
        save_every: float = 0.0,
        precheck: Any = None,
        track: Any = None,
    ) -> TrainingPayload:
        self._enter("train", out, "teacher.grids.json")
        progress("train", 1, 1, "loss 0.1")
        return TrainingPayload(
            best="teacher",
            candidates={"student": Candidate(0.89), "teacher": Candidate(0.895)},
            class_names=["a", "b"],
            float_network=FloatNetwork(0.9),
            input_shape=[1, 8, 8],
            preprocessing=Preprocessing((0.3,), (0.4,)),
            validation_images=10,
            compiled="no: no compiler",
            device="cpu",
            seconds=1.5,
            quantizers=2,
            warnings=["training made the network worse"],
        )

    def export(
        self,
        train_dir: Path,
        train: Any,
        config: Any,
        out: Path,
        progress: Progress,
        run: str,
        git_revision: str,
        unsafe: bool = False,
    ) -> ExportPayload:
        assert (train_dir / "teacher.grids.json").is_file()
        self._enter("export", out, "float.onnx")
        passed, findings = Verification("passed", 32, 1000, 0), ["conv1: a rule; a fix"] if unsafe else []
        entries = [
            ExportedModel("float.onnx", "float"),
            ExportedModel("onnxruntime.onnx", "onnxruntime", verification=passed, findings=findings),
            ExportedModel("tensorrt.onnx", "tensorrt", verification=passed),
        ]
        return ExportPayload(run, entries, "images.npy", "labels.npy")

    def benchmark(self, export_dir: Path, config: Any, progress: Progress) -> Results:
        assert (export_dir / "float.onnx").is_file()
        self.calls.append("benchmark")
        if "benchmark" in self.trouble:
            raise self.trouble["benchmark"]
        return from_json(Results, self.results)

    def _enter(self, stage: str, out: Path, file: str) -> None:
        self.calls.append(stage)
        (out / file).write_text(json.dumps(self.content))
        if stage in self.trouble:
            raise self.trouble[stage]


def measured(drop: float, interval: tuple[float, float]) -> dict[str, Any]:
    """Results in the layout of `crqat.runtime_eval.benchmark`, with one quantized model that loses `drop` points."""
    latency = {"status": "measured", "p50_ms": 1.0, "rounds": 10, "round_p50_ms": [1.0] * 10, "unstable": False}
    accuracy = {"n": 600, "top1": 0.95, "top5": 1.0, "top1_interval": [0.93, 0.96]}
    common = {
        "status": "measured",
        "size_bytes": 1024,
        "peak_memory_bytes": 1 << 20,
        "accuracy": accuracy,
        "latency": latency,
        "versus_float": None,
        "verification": None,
        "fusion": None,
    }
    versus = {
        "drop_points": drop,
        "drop_interval_points": list(interval),
        "agreement": 0.99,
        "agreement_interval": [0.98, 0.995],
        "latency_ratio": 0.5,
        "latency_ratio_interval": [0.48, 0.52],
        "size_ratio": 0.3,
    }
    proof = {"status": "passed", "codes": 1000, "differing_codes": 0, "images": 32}
    models = {
        "float.onnx": {**common, "target": "float"},
        "onnxruntime.onnx": {**common, "target": "onnxruntime", "versus_float": versus, "verification": proof},
        "tensorrt.onnx": {
            **common,
            "target": "tensorrt",
            "latency": {"status": "not run: no CUDA device"},
            "versus_float": {**versus, "latency_ratio": None, "latency_ratio_interval": None},
            "verification": proof,
        },
    }
    return {
        "schema_version": 1,
        "run": "run1",
        "device": {"cpu": "A [fast] CPU", "onnxruntime": "1.0"},
        "config": {"threads": 1},
        "models": models,
    }


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """Fake stages in place of the real ones, and the current directory an empty one with a recipe."""
    monkeypatch.chdir(tmp_path)
    recipe = Path("recipe.yaml")
    recipe.write_text(RECIPE)
    made = Fakes(recipe, measured(0.2, (0.1, 0.3)))
    functions: dict[str, tuple[str, Callable[..., Any]]] = {
        "crqat.train.training.stage": ("train", made.train),
        "crqat.export.stage": ("export", made.export),
        "crqat.runtime_eval.benchmark": ("benchmark", made.benchmark),
    }
    for name, (function, fake) in functions.items():
        module = ModuleType(name)
        setattr(module, function, fake)
        monkeypatch.setitem(sys.modules, name, module)
    # The page needs a whole run; tests/pipeline/report/test_html.py has one.

    def page(run: Path, results: Results, verdicts: list[Any], others: list[Any], perturbation: Any) -> str:
        return f"<p>{len(verdicts)} rules, {len(others)} other devices</p>"

    monkeypatch.setattr("crqat.pipeline.report.html.render", page)
    return made
