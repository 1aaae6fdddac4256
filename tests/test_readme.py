"""README and docs promise nothing that is not there. The two make commands are what `.ci/run` runs."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import CliRunner

from crqat.pipeline.cli import crqat
from crqat.pipeline.gate.rules import GateConfig
from crqat.pipeline.recipe.recipe import Recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
EVERYTHING = "\n".join([README, *PAGES.values()])


def test_the_two_commands_are_those_of_ci() -> None:
    commands = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)[0].splitlines()
    script = (ROOT / ".ci" / "run").read_text()
    assert commands == ["make train export benchmark gate", "make test"]
    for command in ("train export benchmark gate", "test-all"):  # the quick tests and the slow ones
        assert f"make --no-print-directory {command}\n" in script


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"make ([a-z-]+)", " ".join(re.findall(r"`make [^`]+`|^make .*", EVERYTHING, re.M))))
    assert {"train", "test", "lint", "bench-train", "bench-infer"} <= targets
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    for target in sorted(targets):
        subprocess.run(["make", "-n", "-C", str(ROOT), target], check=True, capture_output=True, env=environment)


def test_the_quickstart_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`init` as it stands there; `run` takes minutes, and .ci/run runs its stages."""
    lines = [line.split()[2:] for line in re.findall(r"^\$ crqat .*", README, re.M)]
    assert [line[0] for line in lines] == ["init", "check", "run"]
    monkeypatch.chdir(tmp_path)
    for line in (lines[0], [*lines[1], "--syntax"]):
        result = CliRunner().invoke(crqat, line)
        assert result.exit_code == 0, result.output
    name, recipe = lines[2]
    assert name in crqat.commands and Path(recipe).is_file()


def test_the_quickstart_in_python_is_the_block_that_the_api_tests_run() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert block == re.findall(r"```python\n(.*?)```", PAGES["python_api.md"], re.DOTALL)[0]


def test_it_can_be_read_in_a_terminal() -> None:
    assert max(map(len, README.splitlines())) <= 100
    assert len(README.splitlines()) <= 155


def test_its_first_screen_has_claim_picture_install_and_quickstart() -> None:
    screen = "\n".join(README.splitlines()[:45])
    claim, picture = screen.index("**Quantize an image classifier"), screen.index("](docs/images/wrong_codes.svg)")
    install, quickstart = screen.index("pip install "), screen.index("crqat quantize ")
    assert claim < picture < install < quickstart


def test_every_number_of_its_table_stands_in_the_results() -> None:
    measured = "".join(README.split(f"## {title}")[1].split("## ")[0] for title in ("When to use", "Measured"))
    numbers = re.findall(r"-?\d+\.\d+", measured)
    assert len(numbers) > 10
    found = PAGES["results.md"] + (ROOT / "docs" / "study" / "resnet20_w4a4.md").read_text()
    assert [number for number in numbers if number not in found] == []
    intervals = re.findall(r"[-\d.]+ \[[^\]]+\d\]", measured)
    assert [interval for interval in intervals if interval not in PAGES["results.md"]] == []


@pytest.mark.parametrize("page", ["README.md", "SECURITY.md", *(f"docs/{name}" for name in PAGES)])
def test_every_link_to_a_file_leads_to_one(page: str) -> None:
    text = (ROOT / page).read_text()
    paths = [path for path in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in path]
    assert [path for path in paths if not ((ROOT / page).parent / path).exists()] == []


def test_the_readme_leads_to_every_page() -> None:
    assert {name for name in PAGES if f"(docs/{name})" not in README} == set()


def test_every_command_is_listed_and_every_listed_command_exists() -> None:
    table = "\n".join(re.findall(r"^\| (`crqat .*?) \|", PAGES["commands.md"], re.M))
    listed = set(re.findall(r"`crqat (\w+)", table)) | set(re.findall(r"`(export|benchmark)", table))
    assert listed == set(crqat.commands)


def test_every_exit_code_is_explained() -> None:
    codes = re.findall(r"^\| ([\d, ]+) \|", PAGES["commands.md"], re.M)
    assert codes == ["0", "1", "2", "3", "4", "130, 141, 143"]


def test_every_gate_rule_and_recipe_section_is_explained() -> None:
    table = PAGES["recipes.md"].split("### Data")[0]
    for field in fields(GateConfig):
        assert f"`{field.name}`" in table
    for field in fields(Recipe):
        assert f"`{'float' if field.name == 'float_training' else field.name}`" in table


def test_every_recipe_that_is_named_exists() -> None:
    named = re.findall(r"recipes/[\w.]+\.yaml", EVERYTHING)
    assert named
    assert all((ROOT / name).is_file() for name in named)


def test_every_number_in_short_stands_in_the_results_below() -> None:
    summary, _, below = PAGES["results.md"].partition("## Conditions of all tables")
    numbers = re.findall(r"-?\d+\.\d+|\d+,\d{3}(?:,\d{3})*", summary)
    assert len(numbers) > 25
    assert [number for number in numbers if number not in below] == []
