"""The workflow and the one shown to users: pinned actions, a token that reads, commands that exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench import versions
from crqat.pipeline.cli import crqat

ROOT = Path(__file__).parent.parent
_SHOWN = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / "ci.md").read_text(), re.DOTALL | re.MULTILINE)
TEXTS = {
    "ci.yml": (ROOT / ".github" / "workflows" / "ci.yml").read_text(),
    "docs/ci.md, calibration": _SHOWN[0],
    "docs/ci.md, recipe": _SHOWN[1],
}
SHOWN = [name for name in TEXTS if name != "ci.yml"]


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("name", TEXTS)
def test_actions_are_pinned_and_the_token_can_only_read(name: str) -> None:
    workflow = yaml.safe_load(TEXTS[name])
    assert workflow["permissions"] == {"contents": "read"}
    assert all("permissions" not in job and job["timeout-minutes"] for job in workflow["jobs"].values())
    assert "pull_request_target" not in TEXTS[name] and "secrets." not in TEXTS[name]
    # PyYAML reads the key `on` as true.
    assert "pull_request" in workflow[True]
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert len(used) >= 3
    for action in used:
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", action)
        assert re.search(rf"{action} # v\d+\.\d+\.\d+$", TEXTS[name], re.MULTILINE)
    checkouts = [step for step in steps(workflow) if "actions/checkout" in step.get("uses", "")]
    assert checkouts and all(step["with"] == {"persist-credentials": False} for step in checkouts)


def test_all_pin_the_same_commits() -> None:
    pins = [set(re.findall(r"actions/\S+", text)) for text in TEXTS.values()]
    assert all(pin >= pins[0] for pin in pins)
    names = {pin.partition("@")[0] for pin in set.union(*pins)}
    assert len(names) == len(set.union(*pins)), "one commit for each action"


def commands(workflow: dict[str, Any]) -> list[list[str]]:
    """The words of each command of the steps, without redirections and what `tee` does with the output."""
    lines = [line for step in steps(workflow) for line in step.get("run", "").replace("\\\n", " ").splitlines()]
    return [shlex.split(line.split(" | ")[0]) for line in lines if not line.startswith("{ echo")]


@pytest.mark.parametrize("name", TEXTS)
def test_every_command_exists_and_the_gate_comes_last(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = commands(yaml.safe_load(TEXTS[name]))
    for program, *words in called:
        if program == "make":
            assert set(words) <= targets
        elif program.endswith("crqat"):
            crqat.commands[words[0]].make_context(words[0], words[1:])  # an unknown option is an error
            assert all((ROOT / word).is_file() for word in words if word.startswith("recipes/"))
        else:
            assert program == "pip"
    last = " ".join(called[-1])
    assert "crqat gate" in last or ("crqat quantize" in last and "--max-drop" in last)


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize("code", [0, 1, 4])
def test_the_steps_of_the_shown_workflows_end_with_the_verdict(name: str, code: int, tmp_path: Path) -> None:
    """The shell lines run as GitHub runs them, with programs that stand in for pip and crqat."""
    (tmp_path / "bin").mkdir()
    for program, ending in (("pip", 0), ("crqat", code)):
        stand_in = tmp_path / "bin" / program
        judges = '[ "$1" = gate ] || [ "$1" = quantize ]'
        stand_in.write_text(f"#!/bin/sh\n{judges} || exit 0\necho gate: $1\nexit {ending}\n")
        stand_in.chmod(0o755)
    workflow = yaml.safe_load(TEXTS[name])
    variables = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
        **workflow["env"],
    }
    codes = []
    for step in (step for step in steps(workflow) if "run" in step):
        # GitHub's own ways to start a step's shell.
        options = ["-eo", "pipefail"] if step.get("shell") == "bash" else ["-e"]
        run = subprocess.run(["bash", *options, "-c", step["run"]], cwd=tmp_path, env=variables, check=False)
        codes.append(run.returncode)
    assert codes[-2:] == [code, 0] and not any(codes[:-2])
    assert re.search(r"^gate: (gate|quantize)$", (tmp_path / "summary").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", TEXTS)
def test_the_report_is_kept_whatever_the_verdict(name: str) -> None:
    (upload,) = (step for step in steps(yaml.safe_load(TEXTS[name])) if "upload-artifact" in step.get("uses", ""))
    assert upload["if"] == "always()"
    kept = {Path(path).name for path in upload["with"]["path"].split()}
    assert kept == {"report.html", "junit.xml", "results.json"}


def test_the_newest_versions_are_run_every_week() -> None:
    text = (ROOT / ".github" / "workflows" / "versions.yml").read_text()
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"} and "secrets." not in text
    (when,) = workflow[True]["schedule"]
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", when["cron"])
    assert set(re.findall(r"actions/\S+", text)) == set(re.findall(r"actions/\S+", TEXTS["ci.yml"]))
    assert all(job["timeout-minutes"] for job in workflow["jobs"].values())
    (run,) = (step["run"] for step in steps(workflow) if "run" in step)
    program, target, *settings = shlex.split(run)
    assert (program, target) == ("make", "test-versions")
    names = {row.name for row in versions.rows(versions.bounds((ROOT / "pyproject.toml").read_text()))}
    given = dict(setting.split("=", 1) for setting in settings)
    asked = [word for word in shlex.split(given["ARGS"]) if word != "--rows"]
    assert "newest" in asked and set(asked) <= names
    (upload,) = (step for step in steps(workflow) if "upload-artifact" in step.get("uses", ""))
    assert upload["if"] == "always()"
    assert all((ROOT / path).is_file() for path in upload["with"]["path"].split())
