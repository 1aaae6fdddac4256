"""The README promises nothing that is not there. Its two commands themselves are what `.ci/run` runs."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import fields
from pathlib import Path

from crqat.pipeline.cli import crqat
from crqat.pipeline.gate.rules import GateConfig
from crqat.pipeline.recipe.recipe import Recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_two_commands_are_those_of_ci() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    assert [line for block in blocks for line in block.splitlines()] == [
        "make train export benchmark gate",
        "make test",
    ]
    script = (ROOT / ".ci" / "run").read_text()
    for command in ("train export benchmark gate", "test-all"):
        assert f"make --no-print-directory {command}\n" in script


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"make ([a-z-]+)", README))
    assert {"train", "test", "lint", "bench-train", "bench-infer"} <= targets
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    for target in sorted(targets):
        subprocess.run(["make", "-n", "-C", str(ROOT), target], check=True, capture_output=True, env=environment)


def test_every_command_is_listed_and_every_listed_command_exists() -> None:
    table = README.split("## The command line")[1].split("`--set")[0]
    listed = set(re.findall(r"`crqat (\w+)", table)) | set(re.findall(r"`(export|benchmark)", table))
    assert listed == set(crqat.commands)


def test_every_gate_rule_and_recipe_section_is_explained() -> None:
    table = README.split("## Recipes")[1].split("## ")[0]
    for field in fields(GateConfig):
        assert f"`{field.name}`" in table
    for field in fields(Recipe):
        assert f"`{'float' if field.name == 'float_training' else field.name}`" in table


def test_every_recipe_that_is_named_exists() -> None:
    named = re.findall(r"recipes/[\w.]+\.yaml", README)
    assert named
    assert all((ROOT / name).is_file() for name in named)
