"""The code of docs/adding_a_method.md runs, trains and ends as Grids that are what the method computes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crqat.pipeline.recipe import recipe
from crqat.pipeline.stages import staleness
from crqat.train.quantizers import quantizer_of

PAGE = Path(__file__).parents[1] / "docs" / "adding_a_method.md"
MODEL = "model: {name: cifar/resnet20}\nfloat: {epochs: 1}\nqat: {epochs: 1}\n"


def test_the_page_adds_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, training = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.S | re.M)
    (section,) = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), flags=re.S | re.M)
    (tmp_path / "my_methods.py").write_text(method)
    (tmp_path / "recipe.yaml").write_text(f"name: own\ndata: {{source: digits}}\n{MODEL}{section}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    config = recipe.load(Path("recipe.yaml"))
    assert config.quantization.weight_method == "my_methods:SofterQuantizer"
    assert Path(tmp_path / "my_methods.py") in staleness.own_modules(config).files.values()
    page: dict[str, Any] = {"__name__": "page"}
    exec(compile(training, str(PAGE), "exec"), page)  # noqa: S102
    assert page["losses"][-1] < 0.8 * page["losses"][0]
    model, grids = page["model"], page["grids"]
    assert all(type(quantizer_of(model, spec)).__name__ == "SofterQuantizer" for spec in model.specs)
    for spec in model.specs:
        shape = (3, 4) if spec.channels is None else (spec.channels, *[4] * (spec.ndim - 1))
        x = torch.randn(*shape) if spec.qmin < 0 else torch.rand(*shape)
        out = quantizer_of(model, spec)(x).detach().numpy()
        np.testing.assert_array_equal(grids[spec.edge].dequantize(grids[spec.edge].quantize(x.numpy())), out)
