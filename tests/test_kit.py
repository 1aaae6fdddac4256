"""The files beside the code: for coding agents, contributors, citations, issues and releases."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from crqat.core.results.advice import Advice, Step
from crqat.core.results.benchmark import Accuracy, ModelResult, Results, VersusFloat
from crqat.core.results.training import TrainingPayload
from crqat.core.results.verdict import Verdict
from crqat.pipeline.cli import crqat
from crqat.pipeline.commands.doctor import Finding
from crqat.pipeline.commands.network_fit import Summary
from crqat.pipeline.recipe.keys import Key, every_key

ROOT = Path(__file__).parents[1]
LLMS = (ROOT / "llms.txt").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", LLMS, re.DOTALL) for line in block.splitlines()]
GITHUB = ROOT / ".github"
YAML = [*sorted(GITHUB.rglob("*.yml")), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_for_agents_exists_with_its_options_and_gives_json(line: str) -> None:
    program, name, *words = shlex.split(line)
    command = crqat.commands[name]
    context = command.make_context(name, [*words], resilient_parsing=True)  # without its callbacks
    options = {option for item in command.params if isinstance(item, click.Option) for option in item.opts}
    assert program == "crqat" and {word for word in words if word.startswith("--")} <= options
    assert "--json" in words and context.params["as_json"]
    settings = context.params.get("overrides", ())
    keys = [setting.partition("=")[0] for setting in settings]
    keys += [context.params["key"]] if name == "explain" else []
    assert set(keys) <= every_key().keys()


def test_the_path_to_a_verdict_is_complete() -> None:
    names = [shlex.split(line)[1] for line in COMMANDS]
    assert names[:4] == ["doctor", "init", "check", "run"]
    assert {"gate", "advise", "explain", "quantize", "report"} <= set(names)
    assert "--help" not in LLMS  # a name and its fields are here
    assert set(re.findall(r"`crqat (\w+)", LLMS)) <= crqat.commands.keys()


@pytest.mark.parametrize(
    ("command", "kinds"),
    [
        ("doctor", (Finding,)),
        ("init", (Summary,)),
        ("run", (Verdict, TrainingPayload, Results, ModelResult, Accuracy, VersusFloat)),
        ("explain", (Key,)),
        ("advise", (Advice, Step)),
    ],
)
def test_the_fields_that_agents_are_told_of_are_those_of_the_data(command: str, kinds: tuple[type[Any], ...]) -> None:
    (text,) = re.findall(rf"^- `{command}`(.*)$", LLMS, re.M)
    own = {"doctor": {"works", "missing", "findings"}, "explain": set(), "init": set()}.get(
        command, {"run", "verdict", "exit_code", "rules", "training", "results", "files", "advice", "recipe"}
    )
    known = {str(item.metadata.get("key", item.name)) for kind in kinds for item in fields(kind)} | own
    words = {
        part for quoted in re.findall(r"`([^`]*)`", text) for part in quoted.strip(".").split(".") if part.islower()
    }
    inside = {"junit", "report", "verdict", "p50_ms"}  # of the files, and of the latency
    assert words - known - inside == set()


def test_every_link_of_the_text_for_agents_leads_to_a_file() -> None:
    links = re.findall(r"\]\(([^)]+)\)", LLMS + (ROOT / "CONTRIBUTING.md").read_text())
    assert links and all((ROOT / link).is_file() for link in links)


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_every_yaml_file_parses(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_hooks_run_the_tools_of_the_lint() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = " ".join(hook["entry"] for hook in repository["hooks"])
    assert repository["repo"] == "local"  # nothing is fetched from elsewhere
    for tool in ("ruff check", "ruff format --check", "mypy", "pytest -q tests/test_words.py"):
        assert f"-m {tool}" in entries


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_have_what_github_asks_for(name: str) -> None:
    form = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert {"name", "description", "body"} <= form.keys()
    inputs = [part for part in form["body"] if part["type"] != "markdown"]
    assert inputs and len({part["id"] for part in inputs}) == len(inputs)
    assert all(part["attributes"]["label"] for part in inputs)
    assert any(part.get("validations", {}).get("required") for part in inputs)


def test_a_release_is_built_attested_and_uploaded_by_a_job_that_can_do_no_more() -> None:
    text = (GITHUB / "workflows" / "release.yml").read_text()
    workflow = yaml.safe_load(text)
    assert workflow[True] == {"release": {"types": ["published"]}}  # PyYAML reads the key `on` as true
    assert workflow["permissions"] == {"contents": "read"} and "secrets." not in text
    (job,) = workflow["jobs"].values()
    assert job["permissions"] == {"contents": "write", "id-token": "write", "attestations": "write"}
    assert job["timeout-minutes"]
    done = [step.get("run") or step["uses"].partition("@")[0] for step in job["steps"]]
    assert done.index("python -m build") < done.index("actions/attest-build-provenance") < len(done) - 1
    assert done[-1].startswith("gh release upload")
    for action in re.findall(r"uses: (.*)", text):
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)
    same = set(re.findall(r"actions/(?:checkout|setup-python)@\S+", text))
    assert same <= set(re.findall(r"actions/\S+", (GITHUB / "workflows" / "ci.yml").read_text())) and len(same) == 2


def test_the_citation_is_of_this_version_and_license_and_names_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    text = (ROOT / "pyproject.toml").read_text()
    project = dict(re.findall(r'^(name|version|license) = "(.*)"$', text, re.M))
    assert (citation["title"], citation["version"], citation["license"]) == (
        project["name"], project["version"], project["license"],
    )  # fmt: skip
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2402.13497" and len(paper["authors"]) == 4


def test_contributors_find_the_targets_of_make_and_the_checks_of_ci() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"install", "lint", "test"} <= set(re.findall(r"^make ([a-z-]+)", text, re.M)) <= targets
    folders = re.findall(r"^\| `([\w/]+)` \|", text, re.M)
    assert len(folders) == 6 and all((ROOT / folder).is_dir() for folder in folders)


def test_json_of_a_key_is_what_agents_read() -> None:
    from click.testing import CliRunner

    found = json.loads(CliRunner().invoke(crqat, ["explain", "quantization", "--json"]).stdout)
    assert "quantization.weights" in found["keys"]
