"""Reads JSON from untrusted files, more strictly than Python's own reader.

RFC 8259 has no NaN and no infinity, and crqat writes no integers beyond 64 bits. Rejecting them on reading keeps them
out of later comparisons, format strings and tables.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

# The largest file that crqat writes, a manifest or an engine report of a large network, has a few MB.
MAX_BYTES = 64 * 2**20


def read(path: Path) -> Any:
    """Return the JSON value in a file.

    Raises:
        ValueError: The file is larger than `MAX_BYTES`, which is checked before parsing, or `parse` rejects it.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        msg = f"larger than {MAX_BYTES // 2**20} MiB"
        raise ValueError(msg)
    return parse(content)


def parse(content: str | bytes) -> Any:
    """Return the value of a JSON text in UTF-8.

    Raises:
        ValueError: The text is not JSON, is nested too deeply, or has a number that is not finite, an integer beyond 64
            bits, or half of a surrogate pair, which cannot be written to a file.
    """
    text = content if isinstance(content, str) else content.decode()
    try:
        value = json.loads(text, parse_constant=_constant, parse_float=_float, parse_int=_integer)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        msg = "nested too deeply"
        raise ValueError(msg) from error
    return value


def _constant(text: str) -> Any:
    msg = f"{text} is not a number in JSON"
    raise ValueError(msg)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        msg = f"the number {text[:40]} is too large"
        raise ValueError(msg)
    return value


def _integer(text: str) -> int:
    value = int(text) if len(text) <= 20 else 2**64
    if not -(2**63) <= value < 2**63:
        msg = f"the integer {text[:40]} is beyond 64 bits"
        raise ValueError(msg)
    return value
