"""Fixtures that more than one test file uses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from tests import needs

# Workers of pytest-xdist share the cores; set before torch is imported, and for the processes that tests start.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

SOURCES = Path(__file__).parents[1] / "src"
# Processes that tests start take this checkout's crqat, too, wherever the environment's own may point.
os.environ["PYTHONPATH"] = os.pathsep.join([str(SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])])


def pytest_configure() -> None:
    """A name in CRQAT_EXPECT that no test needs is an error before the first test."""
    try:
        needs.expected()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: at the end there is then enough for each worker."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What `needs` marks."""
    for mark in item.iter_markers("needs"):
        needs.require(*mark.args)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None, None, None]:
    """What never ran, by name, behind everything but the line with the counts."""
    yield
    skipped = [report.longrepr for report in terminalreporter.stats.get("skipped", [])]
    reasons = [where[2] for where in skipped if isinstance(where, tuple)]
    for line in needs.not_run(reasons):
        terminalreporter.write_line(line)


@contextmanager
def made_once(tmp_path_factory: pytest.TempPathFactory, name: str) -> Iterator[tuple[Path, bool]]:
    """A folder that all workers share; the first one has to fill it while the others wait.

    Yields:
        The folder, and whether it is already filled.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"shared-{name}"
    done = folder / ".done"
    with FileLock(f"{folder}.lock"):
        folder.mkdir(exist_ok=True)
        yield folder, done.exists()
        done.touch()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets and weights, which is not part of the project."""
    needs.require("shared")
    return needs.SHARED


@pytest.fixture(scope="session")
def cifar10_root(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the complete CIFAR-10 as torchvision expects it on disk; not to be changed."""
    source = shared_data / "cifar10-webp"
    if not source.is_dir():
        needs.missing("shared", f"no folder {source}")
    with made_once(tmp_path_factory, "cifar10") as (root, filled):
        if not filled:
            subprocess.run([sys.executable, shared_data / "make_cifar10.py", source, root], check=True)
    return root
