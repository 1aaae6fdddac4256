"""The code of docs/adding_a_method.md runs, trains and ends as Grids that are what the method computes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crqat.train import quantizers
from crqat.train.quantizers import quantizer_of

PAGE = Path(__file__).parents[1] / "docs" / "adding_a_method.md"


def test_the_page_adds_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("METHODS", "WEIGHT_METHODS", "ACTIVATION_METHODS"):
        monkeypatch.setitem(
            getattr(quantizers, name), "softer", quantizers.MinMaxQuantizer
        )  # taken out again at the end
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.S | re.M)
    assert len(blocks) == 3
    page: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), page)  # noqa: S102
    assert page["losses"][-1] < 0.8 * page["losses"][0]
    model, grids = page["model"], page["grids"]
    assert all(type(quantizer_of(model, spec)) is page["SofterQuantizer"] for spec in model.specs)
    for spec in model.specs:
        shape = (3, 4) if spec.channels is None else (spec.channels, *[4] * (spec.ndim - 1))
        x = torch.randn(*shape) if spec.qmin < 0 else torch.rand(*shape)
        out = quantizer_of(model, spec)(x).detach().numpy()
        np.testing.assert_array_equal(grids[spec.edge].dequantize(grids[spec.edge].quantize(x.numpy())), out)
