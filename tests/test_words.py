"""Words that were retired for good stay out of what users and contributors read: the field has its own for them."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = ("src/crqat", "crqat_train", "export", "runtime_eval", "pipeline", "bench", "examples")
PROSE = ("README.md", "SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md", "llms.txt", "Makefile", "pyproject.toml")
# What must not be found, and what to write instead.
RETIRED = {
    r"\bstrangers?\b": "untrusted",
    r"\bremarks?\b": "warning, message",
    r"\bproofs?\b|\b(dis)?proven\b": "verification, verified; of a statistic: shown",
    r"(?<!bit\s)(?<!bit-)\bwidths\b": "bit widths",
    r"\b(is|are|was|were|been) told\b(?! apart)": "is reported",
    r"\bfloat teacher\b": "knowledge distillation",
}
# A key of a file, in quotes, keeps its name, and so do the words of a page's tags and styles.
NO_PROSE = re.compile(r'"\w+"|`[^`\n]*`|<style>.*?</style>|</?\w[^<>]*>', re.DOTALL)


def prose(text: str) -> str:
    """The text with blanks in place of what is no prose."""
    return NO_PROSE.sub(lambda match: re.sub(r"\S", " ", match[0]), text)


def spoken(source: str) -> str:
    """Comments, docstrings and messages of Python code; lines and all else are left blank."""
    lines = [""] * (source.count("\n") + 2)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        literal = token.type == tokenize.STRING or tokenize.tok_name[token.type] == "FSTRING_MIDDLE"
        if token.type == tokenize.COMMENT or (literal and re.search(r"\s", token.string)):
            # In an f-string of Python 3.11 and before, names stand in braces.
            text = token.string if token.type == tokenize.COMMENT else re.sub(r"\{[^{}]*\}", "", token.string)
            for number, line in enumerate(text.splitlines(), token.start[0]):
                lines[number] += f" {line}"
    return "\n".join(lines[1:])


def retired_words(text: str) -> list[str]:
    """Each as `line: word (instead: ...)`; a phrase may go on in the next line."""
    text = prose(text)
    return [
        f"{text.count(chr(10), 0, match.start()) + 1}: {' '.join(match[0].split())} (instead: {instead})"
        for pattern, instead in RETIRED.items()
        for match in re.finditer(pattern.replace(" ", r"\s(?:\s|#)*"), text, re.IGNORECASE)
    ]


def sources() -> list[Path]:
    """Every file that people read, but tests."""
    texts = [path for name in ("docs", "recipes", "pipeline/templates") for path in (ROOT / name).iterdir()]
    code = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    texts = [path for path in texts if path.suffix in {".md", ".yaml", ".j2", ".py"}]
    return sorted([ROOT / name for name in PROSE] + texts + code)


def test_no_file_has_a_retired_word() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{word}"
        for path in sources()
        for word in retired_words(spoken(path.read_text()) if path.suffix == ".py" else path.read_text())
    ]
    assert found == [], "\n".join(found)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("of several widths", ["widths"]),
        ("of several bit\nwidths", []),
        ("an error that is\n    told", ["is told"]),
        ("the two are told apart", []),
        ('under "remarks" and `proof`, <td class="remark">text</td>', []),
        ("Proven on a board", ["Proven"]),
    ],
)
def test_what_is_found_in_prose(text: str, found: list[str]) -> None:
    assert [word.split(": ")[1].split(" (")[0] for word in retired_words(text)] == found


def test_names_in_code_are_not_prose() -> None:
    source = """proof = built["remarks"]  # a remark\nprint(f"{proof} is told", "proof")\n"""
    assert [word.split(" (")[0] for word in retired_words(spoken(source))] == ["1: remark", "2: is told"]
