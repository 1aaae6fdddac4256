"""Fixtures that more than one test file uses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "src"
# Processes that tests start take this checkout's crqat, too, wherever the environment's own may point.
os.environ["PYTHONPATH"] = os.pathsep.join([str(SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets and weights, which is not part of the project."""
    default = Path(__file__).parents[2] / "shared" / "data"
    path = Path(os.environ.get("CRQAT_SHARED_DATA", default)).resolve()
    if not path.is_dir():
        pytest.skip(f"no folder {path} with real data and weights; set CRQAT_SHARED_DATA")
    return path


@pytest.fixture(scope="session")
def cifar10_root(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the complete CIFAR-10 as torchvision expects it on disk; not to be changed."""
    source = shared_data / "cifar10-webp"
    if not source.is_dir():
        pytest.skip(f"no folder {source}")
    root = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, shared_data / "make_cifar10.py", source, root], check=True)
    return root
