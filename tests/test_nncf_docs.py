"""docs/nncf.md: its blocks run, one after the other, in one directory."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from crqat.pipeline.cli import crqat
from crqat.train.placement import nncf_layout

PAGE = (Path(__file__).parent.parent / "docs" / "nncf.md").read_text()
RECIPE = """\
name: nncf
compile: never
device: cpu
data: {source: digits, crop_padding: 1, flip: false}
model: {name: cifar/resnet20}
float: {epochs: 1}
qat: {epochs: 1, batch_size: 256}
"""


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    nncf_layout.without_extension()
    Path("recipe.yaml").write_text(RECIPE)
    blocks = re.findall(r"```(python|sh)\n(.*?)```", PAGE, re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "sh", "sh", "python"]
    said = ""
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, "docs/nncf.md", "exec"), {})  # noqa: S102 - the page's own text
            continue
        for line in text.splitlines():
            command, *arguments = shlex.split(line)
            assert command == "crqat"
            result = CliRunner().invoke(crqat, arguments, catch_exceptions=False)
            assert result.exit_code == 0, result.output
            said += result.output
    assert "torch.Size([1, 10])" in capsys.readouterr().out
    assert "wrote start: 50 quantizers, W8A8" in said
    assert "next: crqat train recipe.yaml --set model.nncf=start --set model.weights=null" in said
    assert "rescaled: post_hooks.relu/relu/0__0.0: codes 0 to 255 in the checkpoint, 0 to 127 here" in said
    assert "wrote back: 50 quantizers" in said
