"""The workflow and the one shown to users: pinned actions, a token that reads, commands that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from bench import versions
from crqat.pipeline.cli import crqat

ROOT = Path(__file__).parent.parent
TEXTS = {
    "ci.yml": (ROOT / ".github" / "workflows" / "ci.yml").read_text(),
    "docs/ci.md": (ROOT / "docs" / "ci.md").read_text().split("```yaml\n")[1].split("```")[0],
}


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


def test_both_pin_the_same_commits() -> None:
    pins = [set(re.findall(r"actions/\S+", text)) for text in TEXTS.values()]
    assert pins[0] == pins[1]


@pytest.mark.parametrize("name", TEXTS)
def test_every_command_exists_and_the_gate_comes_last(name: str) -> None:
    runs = [step["run"] for step in steps(yaml.safe_load(TEXTS[name])) if "run" in step]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in runs:
        program, *words = line.split()
        if program == "make":
            assert set(words) <= targets
        elif program.endswith("crqat"):
            command = crqat.commands[words[0]]
            options = {option for item in command.params if isinstance(item, click.Option) for option in item.opts}
            assert {word for word in words if word.startswith("--")} <= options
            assert all((ROOT / word).is_file() for word in words if word.startswith("recipes/"))
        else:
            assert program == "pip"
    assert "crqat gate" in runs[-1]


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
