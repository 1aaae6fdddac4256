"""What the documentation site has beside the files of docs/: mkdocs calls the functions that begin with `on_`.

Pages with a marker such as `<!-- reference: recipe -->` are filled from the code. README.md is the first page.
Notebooks become pages with the outputs that they hold. A link to a file outside docs/ leads to a page that
shows it, so each link works in the repository and on the site.
"""

from __future__ import annotations

import json
import posixpath
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]

_MARKER = re.compile(r"<!-- reference: (\w+) -->")
_LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#\s])")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".json": "json"}


# The recipe


def described(config: type[Any]) -> dict[str, str]:
    """Each field's description, from the `Attributes:` of its class and of those it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(config.__mro__):
        _, _, attributes = (base.__doc__ or "").partition("Attributes:\n")
        for match in re.finditer(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", attributes, re.M):
            found[match[1]] = " ".join(match[2].split())
    return found


def type_words(hint: Any) -> str:
    """A type of a recipe's key in words, with its bounds."""
    from crqat.core.field_bounds import OneOf, Range

    if typing.get_origin(hint) is typing.Annotated:
        inner, *notes = typing.get_args(hint)
        for note in notes:
            if isinstance(note, OneOf):
                return " | ".join([*(f"`{name}`" for name in note.names), "`package.module:Class`"])
        words = type_words(inner)
        bounds = [str(note).replace(f"{2**32:g}", "2^32") for note in notes if isinstance(note, Range)]
        return ", ".join([words, *bounds])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [type_words(part) for part in typing.get_args(hint) if part is not type(None)]
        return f"{' or '.join(parts)}, or `null`"
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(f"`{value}`" for value in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"list of {type_words(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is dict:
        return "mapping"
    names = {int: "whole number", float: "number", str: "text", bool: "`true` | `false`"}
    return names.get(hint, "mapping")


def _default(item: Any) -> str:
    if item.default is MISSING and item.default_factory is MISSING:
        return "needed"
    value = item.default if item.default is not MISSING else item.default_factory()
    if value is None or isinstance(value, bool):
        return f"default `{json.dumps(value)}`"
    return f"default `{json.dumps(value) if isinstance(value, tuple | dict) else value}`"


def _in_yaml(text: str) -> str:
    """A docstring's words for a recipe's reader: YAML's names for nothing, yes and no; names and pages as such."""
    text = re.sub(r'"([^"\s]+)"', r"`\1`", text)
    text = re.sub(r"docs/(\w+)\.md", r"[\1](\1.md)", text)
    for python, yaml in (("None", "null"), ("True", "true"), ("False", "false")):
        text = re.sub(rf"(?<!`)\b{python}\b", f"`{yaml}`", text)
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else part.replace("*", r"\*") for part in parts)


def _key(key: str, hint: Any, item: Any, text: str) -> str:
    return f"### `{key}` {{ #{key} }}\n\n*{type_words(hint)}; {_default(item)}.*\n\n{_in_yaml(text)}\n\n"


def _keys(prefix: str, config: type[Any]) -> Iterator[str]:
    texts, hints = described(config), typing.get_type_hints(config, include_extras=True)
    for item in fields(config):
        key = f"{prefix}{'float' if item.name == 'float_training' else item.name}"
        yield _key(key, hints[item.name], item, texts[item.name])


def recipe_reference() -> str:
    """Every key of a recipe: type, bounds, default and description."""
    from crqat.pipeline.recipe.recipe import SECTIONS, Recipe

    hints, texts = typing.get_type_hints(Recipe, include_extras=True), described(Recipe)
    own = [item for item in fields(Recipe) if item.name not in SECTIONS and item.name != "float_training"]
    parts = ["## The run { #run }\n\n", *(_key(item.name, hints[item.name], item, texts[item.name]) for item in own)]
    for name, config in SECTIONS.items():
        summary, _, rest = (config.__doc__ or "").partition("Attributes:")[0].strip().partition("\n\n")
        parts.append(f"## Section `{name}` {{ #{name} }}\n\n{summary} {' '.join(rest.split())}\n\n")
        parts.extend(_keys(f"{name}.", config))
    return "".join(parts)


# The command line


def _commands(command: click.Command, path: str, context: click.Context | None) -> Iterator[tuple[str, click.Context]]:
    own = click.Context(command, info_name=path.rpartition(" ")[2], parent=context)
    if context is not None:
        yield path, own
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from _commands(inner, f"{path} {name}", own)


def _text(help_text: str) -> str:
    """A command's help as paragraphs; click's marks for lines that stay as they are go."""
    paragraphs = help_text.replace("\b\n", "").replace("\b", "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()).replace("<", "&lt;") for paragraph in paragraphs)


def command_reference() -> str:
    """Every command of `crqat`: usage, help and options."""
    from crqat.pipeline.cli import crqat

    parts = []
    for path, context in _commands(crqat, "crqat", None):
        command = context.command
        usage = " ".join([path, *command.collect_usage_pieces(context)])
        parts.append(f"## `{path}` {{ #{path.replace(' ', '-')} }}\n\n```text\n{usage}\n```\n\n")
        parts.append(f"{_text(command.help or '')}\n\n")
        options = [item for item in command.params if isinstance(item, click.Option) and not item.hidden]
        if options:
            parts.append("| option | what it does |\n|---|---|\n")
            for item in options:
                names, words = item.get_help_record(context) or ("", "")
                parts.append(f"| `{names}` | {words.replace('|', chr(92) + '|')} |\n")
            parts.append("\n")
    return "".join(parts)


# Python


def python_reference() -> str:
    """One entry of mkdocstrings for each public name."""
    import crqat

    parts = []
    for name in crqat.__all__:
        if name in crqat._MODULES:
            module = "crqat.export.export_model" if name == "export" else crqat._MODULES[name]
            defined = crqat._DEFINED_AS.get(name, name)
            options = f"    options:\n      heading: crqat.{name}\n      toc_label: {name}\n"
            parts.append(f"::: {module}.{defined}\n{options}\n")
    return "".join(parts)


REFERENCES = {"recipe": recipe_reference, "commands": command_reference, "python": python_reference}


# Notebooks


def notebook_page(notebook: dict[str, Any]) -> str:
    """A notebook as Markdown, with the outputs that are stored in it.

    Args:
        notebook: The .ipynb file's content.
    """
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![output](data:image/png;base64,{''.join(data['image/png']).strip()})")
            else:
                text = "".join(output.get("text", data.get("text/plain", "")))
                parts.append(f'```{{ .text .output title="Output" }}\n{text.rstrip()}\n```')
    return "\n\n".join(parts) + "\n"


# Links and pages


def _shown(path: str) -> str:
    """The page that shows a file or folder of the repository."""
    if path in ("README.md", "docs"):
        return "index.md"
    if path in ROOT_PAGES:
        return path.lower()
    return f"files/{path.removeprefix('.')}.md"  # mkdocs takes a name that begins with a dot for a hidden one


ROOT_PAGES = [name for name in ("SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md") if (ROOT / name).is_file()]


def outside(markdown: str, page: str) -> set[str]:
    """The files and folders of the repository, outside of docs/, that a page of docs/ links to.

    Args:
        markdown: The page's text.
        page: Its path in the repository.
    """
    targets = {posixpath.normpath(posixpath.join(posixpath.dirname(page), link)) for link in _LINK.findall(markdown)}
    return {target for target in targets if not f"{target}/".startswith(("docs/", "..")) and (ROOT / target).exists()}


def with_links(markdown: str, page: str, place: str) -> str:
    """A page's text with each link to a file of the repository as one to the site's page of it.

    Args:
        markdown: The page's text.
        page: Its path in the repository, from which its links lead.
        place: Its path on the site.
    """

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), match[1]))
        if target.startswith("..") or not (ROOT / target).exists():
            return match[1]
        if target.endswith(".ipynb"):
            target = target.removesuffix(".ipynb") + ".md"
        on_site = target.removeprefix("docs/") if target.startswith("docs/") else _shown(target)
        return posixpath.relpath(on_site, posixpath.dirname(place) or ".")

    return _LINK.sub(moved, markdown)


def _of_file(path: str) -> str:
    """A page that shows a file, or what a folder has."""
    place = ROOT / path
    if place.is_dir():
        names = sorted(item.name for item in place.iterdir() if item.is_file())
        return f"# {path}\n\n" + "".join(f"* [{name}]({posixpath.basename(path)}/{name}.md)\n" for name in names)
    language = _LANGUAGES.get(place.suffix, "text")
    return f"# {path}\n\n````{language}\n{place.read_text().rstrip()}\n````\n"


def generated() -> dict[str, str]:
    """The pages that are no files of docs/, by their path on the site."""
    pages = {}
    sources = {f"docs/{path.relative_to(ROOT / 'docs')}": path for path in (ROOT / "docs").rglob("*.md")}
    for name in ["README.md", *ROOT_PAGES]:
        text = (ROOT / name).read_text()
        pages[_shown(name)] = with_links(text, name, _shown(name))
        sources[name] = ROOT / name
    wanted = {target for page, path in sources.items() for target in outside(path.read_text(), page)}
    for path in sorted(wanted):
        if (ROOT / path).is_dir():
            wanted |= {f"{path}/{item.name}" for item in (ROOT / path).iterdir() if item.is_file()}
    for path in sorted(wanted - {"README.md", *ROOT_PAGES}):
        pages[_shown(path)] = _of_file(path)
    for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        place = f"notebooks/{notebook.stem}.md"
        title, _, rest = notebook_page(json.loads(notebook.read_text())).partition("\n")
        download = f"[Download this notebook]({notebook.name}){{ download }}"
        pages[place] = f"{title}\n\n{download}\n{with_links(rest, f'docs/{place}', place)}"
    return pages


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for place, text in generated().items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill markers, and turn links to the repository into links of the site."""
    markdown = _MARKER.sub(lambda match: REFERENCES[match[1]](), markdown)
    if page.file.generated_by:
        return markdown
    return with_links(markdown, str(PurePosixPath("docs") / page.file.src_uri), page.file.src_uri)
