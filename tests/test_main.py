"""`python -m crqat`, which `--nproc` and torchrun start too, searches the current folder last, as the command does."""

from __future__ import annotations

from pathlib import Path

from tests.own_process import ROOT, run

ARGUMENTS = ("-m", "crqat", "check", "--syntax", str(ROOT / "recipes" / "digits.yaml"))


def test_a_file_of_the_users_takes_the_place_of_no_library(tmp_path: Path) -> None:
    (tmp_path / "yaml").mkdir()
    for name in ("click.py", "yaml/__init__.py"):
        (tmp_path / name).write_text("raise RuntimeError('of the user')\n")
    ended = run(tmp_path, *ARGUMENTS)
    assert ended.returncode == 0, ended.stderr
    asked_for = run(tmp_path, *ARGUMENTS, PYTHONPATH=f"{tmp_path}:{ROOT / 'src'}")
    assert "RuntimeError: of the user" in asked_for.stderr, "what PYTHONPATH names comes first, as anywhere"
