"""Real processes, really killed; `make soak` does it longer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from bench import kill_and_resume

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, float]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        return kill_and_resume.undisturbed(tmp_path_factory.mktemp("soak") / "undisturbed")


def test_killed_at_random_instants_it_ends_with_the_same_bits(
    whole: tuple[dict[str, Any], dict[str, float]], tmp_path: Path
) -> None:
    reference, seconds = whole
    assert {name.split("/")[0] for name in reference} == {"train", "export", "benchmark"}
    assert {"train/student.safetensors", "train/teacher.safetensors", "export/onnxruntime.onnx"} <= reference.keys()
    figures, draw = kill_and_resume.Figures(), random.Random()  # noqa: S311 - other instants each time
    for run in range(8):
        found = kill_and_resume.disturbed(tmp_path / f"run{run}", seconds, draw, figures, most=4)
        kill_and_resume.compare(found, reference, figures)
        if sum(figures.kills.values()) >= 10 and min(figures.kills.values()) > 0:
            break
    assert figures.lost == [] and figures.differing == []
    assert sum(figures.kills.values()) >= 10 and min(figures.kills.values()) > 0


def test_what_differs_is_named(whole: tuple[dict[str, Any], dict[str, float]]) -> None:
    reference, _ = whole
    figures = kill_and_resume.Figures()
    kill_and_resume.compare({**reference, "train/student.safetensors": "0"}, reference, figures)
    assert figures.differing == [["train/student.safetensors"]]


def test_a_run_that_cannot_go_on_is_lost(whole: tuple[dict[str, Any], dict[str, float]], tmp_path: Path) -> None:
    figures = kill_and_resume.Figures()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            kill_and_resume, "RECIPE", kill_and_resume.RECIPE.replace("soak_network:network", "soak_network:none")
        )
        assert kill_and_resume.disturbed(tmp_path / "run", whole[1], random.Random(0), figures, most=0) is None  # noqa: S311
    assert len(figures.lost) == 1 and figures.lost[0].startswith("train ended with 2: ")
