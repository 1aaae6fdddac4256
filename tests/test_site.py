"""The documentation site: pages that are made from the code, links that work in the repository and there, recipes."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

import crqat as public
from crqat.pipeline.cli import crqat
from crqat.pipeline.recipe import recipe as recipes
from tests.test_notebooks import loaded

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
site = loaded("pages")
# mkdocs' own tags name Python functions, which no test needs to load.
NAV = yaml.safe_load((ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2].partition("\nnot_in_nav:")[0])


def test_the_recipe_reference_has_every_key() -> None:
    page = site.recipe_reference()
    headings = dict(re.findall(r"^### `([\w.]+)` \{ #([\w.]+) \}$", page, re.M))
    for section, config in recipes.SECTIONS.items():
        assert {f"{section}.{item.name}" for item in fields(config)} <= headings.keys()
    assert {"name", "seed", "targets", "device", "compile"} <= headings.keys()
    assert all(key == anchor for key, anchor in headings.items())
    lr = page.split("### `qat.lr` { #qat.lr }\n\n")[1].split("\n###")[0]
    assert lr.split("\n\n") == ["*number, above 0; default `0.01`.*", "Peak learning rate.\n"]
    assert '*text: `auto` | `cpu` | `cuda`; default `"auto"`.*' in page and "*text; needed.*" in page
    assert "None" not in page


def test_the_command_reference_has_every_command_and_option() -> None:
    page = site.command_reference()
    for name, command in crqat.commands.items():
        text = page.split(f"### `crqat {name}` {{ #crqat-{name} }}\n")[1].split("\n##")[0]
        options = [item for item in command.params if isinstance(item, click.Option) and not item.hidden]
        assert [item.opts[0] for item in options if item.opts[0] not in text] == []
    assert "### `crqat nncf import` { #crqat-nncf-import }" in page
    assert page.index("### `crqat init`") < page.index("## Expert tools") < page.index("### `crqat sensitivity`")
    assert "\b" not in page


def test_the_python_reference_has_every_public_name() -> None:
    named = re.findall(r"^      heading: crqat\.(\w+)$", site.python_reference(), re.M)
    assert named == [name for name in public.__all__ if name != "__version__"]


def test_every_page_is_in_the_navigation() -> None:
    def leaves(part: Any) -> list[str]:
        if isinstance(part, str):
            return [part]
        return [leaf for item in (part.values() if isinstance(part, dict) else part) for leaf in leaves(item)]

    named = leaves(NAV)
    assert len(named) == len(set(named))
    assert {str(page.relative_to(ROOT / "docs")) for page in PAGES} <= set(named)
    assert {"index.md", *(f"notebooks/{path.stem}.md" for path in (ROOT / "docs/notebooks").iterdir())} <= set(named)


@pytest.mark.parametrize(
    ("link", "page", "place", "moved"),
    [
        ("docs/ci.md", "README.md", "index.md", "ci.md"),
        ("SECURITY.md", "README.md", "index.md", "security.md"),
        ("../SECURITY.md", "docs/ci.md", "ci.md", "security.md"),
        ("../recipes/digits.yaml", "docs/versions.md", "versions.md", "files/recipes/digits.yaml.md"),
        ("../results.md", "docs/study/resnet20_w4a4.md", "study/resnet20_w4a4.md", "../results.md"),
        ("notebooks/reading_results.ipynb", "docs/results.md", "results.md", "notebooks/reading_results.md"),
        ("https://arxiv.org/abs/2402.13497", "README.md", "index.md", "https://arxiv.org/abs/2402.13497"),
    ],
)
def test_a_link_of_the_repository_leads_to_a_page_of_the_site(link: str, page: str, place: str, moved: str) -> None:
    assert site.with_links(f"see [it]({link}) there", page, place) == f"see [it]({moved}) there"


def test_a_linked_file_is_shown_on_a_page_of_its_own() -> None:
    pages = site.generated()
    shown = pages["files/recipes/digits.yaml.md"]
    assert shown.startswith("# recipes/digits.yaml\n\n````yaml\n")
    assert (ROOT / "recipes" / "digits.yaml").read_text().strip() in shown
    assert "](examples/own_loop.py.md)" in pages["files/examples.md"]
    assert pages["index.md"].startswith("# crqat-edge")


def blocks() -> list[tuple[str, str]]:
    """The recipes on the pages, whole ones and parts, with the page's name."""
    found = []
    for page in PAGES:
        for text in re.findall(r"^```yaml[^\n]*\n(.*?)^```", page.read_text(), re.M | re.S):
            keys = set(re.findall(r"^(\w+):", text, re.M))  # neither a workflow's nor a manifest's
            if keys and keys <= set(recipes.top_level_keys()):
                found.append((page.name, text))
    return found


@pytest.mark.parametrize(("page", "text"), blocks())
def test_every_recipe_of_a_page_is_valid(page: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = {"name": "part", "data": {"source": "digits"}, "model": {"name": "cifar/resnet20", "weights": "a.pth"}}
    parts = yaml.safe_load(text)
    if "data" in parts and "source" not in parts["data"]:
        parts["data"] = {"source": "imagefolder", **parts["data"]}
    if page == "adding_a_method.md":
        (tmp_path / "my_methods.py").write_text("")
        monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**needed, **parts}))
    assert recipes.load(tmp_path / "recipe.yaml").name


def test_recipes_are_found() -> None:
    assert {page for page, _ in blocks()} >= {"recipes.md", "getting_started.md", "mixed_precision.md", "unlabeled.md"}


def commands_of(page: Path) -> list[str]:
    """The calls of `crqat` in a page's blocks of shell, without what a shell takes away."""
    found = []
    for kind, text in re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", page.read_text(), re.M | re.S):
        if kind in ("", "sh", "bash", "console"):
            lines = (re.sub(r"^\$ ", "", line) for line in re.sub(r" *\\\n *", " ", text).splitlines())
            found += [line for line in lines if line.startswith("crqat ")]
    return found


CALLS = [(page.name, line) for page in [ROOT / "README.md", *PAGES] for line in commands_of(page)]


@pytest.mark.parametrize(("page", "line"), CALLS)
def test_every_command_in_a_block_has_options_that_exist(page: str, line: str) -> None:
    del page
    command: click.Command = crqat
    words = shlex.split(line, comments=True)[1:]
    context = click.Context(crqat, info_name="crqat")
    while isinstance(command, click.Group):
        name, *words = words
        command = command.commands[name]
        context = click.Context(command, info_name=name, parent=context)
    made = command.make_context(context.info_name or "", words, parent=context.parent)
    assert made.command is command  # a wrong option or argument is a UsageError
    assert not made.args  # nothing is left over


def test_commands_are_found() -> None:
    assert {"README.md", "getting_started.md", "boards.md", "nncf.md"} <= {page for page, _ in CALLS}
