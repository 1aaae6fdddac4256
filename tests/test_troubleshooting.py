"""Each message that docs/troubleshooting.md quotes is still one of the code's."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = ("src/crqat", "crqat_train", "export", "runtime_eval", "pipeline")
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
# Names of the gate's rules, quoted in place of a message.
RULES = {"float_accuracy", "accuracy_drop", "int8_coverage"}


def texts(source: str) -> list[str]:
    """The texts of Python code; each value that an f-string puts in is one "…"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
            found.append("".join(str(part) for part in parts))
    return found


def quoted(page: str) -> list[str]:
    """The messages of a page: what an entry of a list begins with, in backquotes."""
    entries = re.split(r"^\* ", page.partition("\n## ")[2], flags=re.M)[1:]
    heads = [re.split(r"`:\s", entry)[0] + "`" for entry in entries]
    return [" ".join(message.split()) for head in heads for message in re.findall(r"`([^`]+)`", head)]


MESSAGES = [message for message in quoted(PAGE) if "…" in message or " " in message]


def test_all_entries_are_read() -> None:
    assert len(MESSAGES) > 40
    assert {message for message in quoted(PAGE) if message not in MESSAGES} <= RULES | {"RGB", "L"}


@pytest.fixture(scope="module")
def of_the_code() -> list[str]:
    files = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    return [" ".join(text.split()) for path in files for text in texts(path.read_text()) if " " in text]


@pytest.mark.parametrize("message", MESSAGES)
def test_the_message_stands_in_the_code(message: str, of_the_code: list[str]) -> None:
    pieces = [re.escape(piece.strip()) for piece in message.split("…")]
    pattern = re.compile(".*".join(pieces).removesuffix(".*"))
    assert any(pattern.match(text) for text in of_the_code)


def test_a_message_that_is_gone_is_found() -> None:
    code = 'f"model.weights: {path} is lost; " f"find {it}"'
    assert texts(code)[0] == "model.weights: … is lost; find …"
    assert quoted("## A\n\n* `model.weights: … was lost`: look for it.\n") == []
    assert quoted("\n## A\n\n* `model.weights: … was lost`: look for it.\n") == ["model.weights: … was lost"]
