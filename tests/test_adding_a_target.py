"""The code of docs/adding_a_target.md runs: placement, lowering, lint, verification and recipes know its runtime."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper

from crqat.core.errors import UsageError
from crqat.core.targets import INT16_MAX, TARGETS
from crqat.pipeline.recipe import recipe

PAGE = Path(__file__).parents[1] / "docs" / "adding_a_target.md"


@pytest.fixture(scope="module")
def page() -> Iterator[dict[str, Any]]:
    known = dict(TARGETS)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.S | re.M)
    assert len(blocks) == 3
    names: dict[str, Any] = {"__name__": "page"}
    try:
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)  # noqa: S102
        yield names
    finally:
        TARGETS.clear()
        TARGETS.update(known)


def test_its_file_keeps_to_its_rules_and_is_verified(page: dict[str, Any]) -> None:
    assert page["result"].status == "passed"
    assert page["result"].checks["runtime"] == "not run: no tinynpu is attached"
    assert any("zero point other than 0" in str(finding) for finding in page["found"])
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in page["file"].model.graph.initializer}
    points = [value for name, value in tensors.items() if name.endswith("zero_point")]
    assert {value.dtype for value in points} == {np.dtype(np.int8)}
    assert any((value == -128).all() for value in points)  # all 256 codes of a tensor without negative values


def test_placement_is_the_union_of_what_the_targets_ask(page: dict[str, Any]) -> None:
    alone, both = page["alone"], page["both"]
    assert [spec.edge for spec in alone.specs] == [spec.edge for spec in both.specs]  # both inputs of each Add
    inputs = {spec.edge: spec for spec in both.specs}
    assert {spec.qmax for spec in both.specs if spec.qmin == 0} == {127}
    for spec in both.specs:
        if spec.kind == "weight":
            fed = inputs[spec.input_edge]
            assert 2 * (fed.qmax - fed.qmin) * spec.qmax <= INT16_MAX
    assert any("TinyNPU's 16-bit sums" in spec.reason for spec in both.specs)
    for grid in both.grids.values():
        if grid.axis is None:
            np.testing.assert_array_equal(grid.scale.astype(np.float16).astype(np.float32), grid.scale)


def test_recipes_know_its_name(page: dict[str, Any], tmp_path: Path) -> None:
    assert "tinynpu" in TARGETS
    path = tmp_path / "recipe.yaml"
    text = "name: x\ndata: {source: digits}\nmodel: {name: cifar/resnet20}\nfloat: {epochs: 1}\n"
    path.write_text(f"{text}targets: [tinynpu]\n")
    assert recipe.load(path).targets == ("tinynpu",)
    path.write_text(f"{text}targets: [tinypu]\n")
    with pytest.raises(UsageError, match=r"targets\.0.*did you mean `tinynpu`"):
        recipe.load(path)
