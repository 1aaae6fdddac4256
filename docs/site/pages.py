"""What the documentation site has beside the files of docs/: mkdocs calls the functions that begin with `on_`.

Pages with a marker such as `<!-- reference: recipe -->` are filled from the code. README.md is the first page.
Notebooks become pages with the outputs that they hold. A link to a file outside docs/ leads to a page that
shows it, so each link works in the repository and on the site.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

    from crqat.pipeline.recipe import keys

ROOT = Path(__file__).resolve().parents[2]

_MARKER = re.compile(r"<!-- reference: (\w+) -->")
_LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#\s])")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".json": "json"}


# The recipe


def _as_markdown(text: str) -> str:
    """A docstring's words with names and values as code, and pages as links."""
    text = re.sub(r'"([^"\s]+)"', r"`\1`", text)
    text = re.sub(r"docs/(\w+)\.md", r"[\1](\1.md)", text)
    text = re.sub(r"(?<!`)\bnull\b", "`null`", text)
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else part.replace("*", r"\*") for part in parts)


def _key(key: keys.Key) -> str:
    allowed = f": {' | '.join(f'`{value}`' for value in key.allowed)}" if key.allowed else ""
    default = "needed" if key.required else f"default `{json.dumps(key.default)}`"
    return f"### `{key.key}` {{ #{key.key} }}\n\n*{key.type}{allowed}; {default}.*\n\n{_as_markdown(key.meaning)}\n\n"


def recipe_reference() -> str:
    """Every key of a recipe: type, allowed values, default and meaning."""
    from crqat.pipeline.recipe.keys import every_key

    found = every_key()
    parts = ["## The run { #run }\n\n"]
    parts += [_key(key) for key in found.values() if "." not in key.key and not key.keys]
    for section in (key for key in found.values() if key.keys):
        parts.append(f"## Section `{section.key}` {{ #{section.key} }}\n\n{_as_markdown(section.meaning)}\n\n")
        parts += [_key(found[name]) for name in section.keys]
    return "".join(parts)


# The command line


def _commands(command: click.Command, path: str, context: click.Context | None) -> Iterator[tuple[str, click.Context]]:
    own = click.Context(command, info_name=path.rpartition(" ")[2], parent=context)
    if context is not None:
        yield path, own
    if isinstance(command, click.Group):
        for name in command.list_commands(own):
            yield from _commands(command.commands[name], f"{path} {name}", own)


def _text(help_text: str) -> str:
    """A command's help as paragraphs; click's marks for lines that stay as they are go."""
    paragraphs = help_text.replace("\b\n", "").replace("\b", "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()).replace("<", "&lt;") for paragraph in paragraphs)


def command_reference() -> str:
    """Every command of `crqat`: usage, help and options, in the order and the groups of `crqat --help`."""
    from crqat.pipeline.cli import FIRST, crqat

    found = list(_commands(crqat, "crqat", None))
    parts = ["## Commands { #commands }\n\n"]
    for path, context in found:
        command = context.command
        if path.split()[1] not in FIRST and "## Expert tools { #expert-tools }\n\n" not in parts:
            parts.append("## Expert tools { #expert-tools }\n\n")
        usage = " ".join([path, *command.collect_usage_pieces(context)])
        parts.append(f"### `{path}` {{ #{path.replace(' ', '-')} }}\n\n```text\n{usage}\n```\n\n")
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
