"""Answers in results.json: the same numbers come back, and nothing else is taken for them."""

from __future__ import annotations

import base64
import zlib

import numpy as np
import pytest

from crqat.core.results.answers import pack, unpack


def test_the_same_classes_come_back() -> None:
    for classes in ([], [0], [3, 999, 0, 2**31 - 1]):
        assert unpack(pack(np.array(classes, np.int64)), len(classes)).tolist() == classes
    assert len(pack(np.arange(10_000) % 10)) < 500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not base64!", "damaged `answers`"),
        (base64.b64encode(b"not zlib").decode(), "damaged `answers`"),
        (pack(np.arange(4)), "another number of images than 3"),
        (pack(np.arange(2)), "another number of images than 3"),
        (pack(np.array([1, -1, 2])), "not class indices"),
        (base64.b64encode(zlib.compress(bytes(10**7))).decode(), "another number of images than 3"),
    ],
)
def test_anything_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack(text, 3)
