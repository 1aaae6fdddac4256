"""One installed package: a wheel and an editable install, beside a user's own export.py, pipeline/ and artifacts/."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
FOLDERS = ("crqat_train", "export", "runtime_eval", "pipeline", "src")
OLD = ("artifacts", "crqat_train", "export", "runtime_eval", "pipeline")
NETWORK = """
from torch import nn

def build(classes, channels):
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)
    )
"""
RECIPE = """
name: own
device: cpu
compile: never
targets: [onnxruntime]
data: {source: digits, crop_padding: 0, flip: false}
model: {name: "pipeline.net:build"}
float: {epochs: 1, batch_size: 256}
qat: {epochs: 1, batch_size: 256}
export: {verify_images: 2}
"""
# Ends with the old names that are modules, after the command line has trained and the API was used.
MODULES = f"""
import sys
import crqat
import crqat.export.stage
from crqat.pipeline.cli import main
sys.argv = ["crqat", "train", "recipe.yaml", "--unchecked"]
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
crqat.quantize, crqat.export, crqat.benchmark
found = [name for name in {OLD!r} if name in sys.modules]
print("FOUND", found, crqat.__file__)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone holds that an install needs: links are links."""
    folder = tmp_path_factory.mktemp("checkout")
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out)]
    ended = run([sys.executable, "-m", "pip", "wheel", *options, str(checkout)], out)
    assert ended.returncode == 0, ended.stderr
    (path,) = out.glob("*.whl")
    return path


def environment(folder: Path, *install: str) -> Path:
    """A virtual environment with this one's dependencies and an install of crqat; gives its folder of programs."""
    venv.create(folder, with_pip=False)
    programs = folder / "bin"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run([str(programs / "python"), "-c", ask], folder).stdout.strip())
    # A path in a .pth file does not read the .pth files in that path: the checkout's own install stays unseen.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python"), "install", *options, *install]
    ended = run(pip, folder)
    assert ended.returncode == 0, ended.stderr
    return programs


def run(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command without this checkout on its path."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300, check=False)


def users_folder(folder: Path) -> Path:
    """A project of a user's that has files called as the repository's folders are."""
    for name in ("pipeline", "artifacts"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").touch()
    (folder / "pipeline" / "net.py").write_text(NETWORK)
    (folder / "export.py").write_text(NETWORK)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def test_a_wheel_holds_one_package_with_all_its_parts(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"crqat", "crqat_edge"}
    held = {name for name in names if name.startswith("crqat/")}
    wanted = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "crqat").glob("*.py")}
    for part in (ROOT / "src" / "crqat").iterdir():
        if part.is_dir() and part.name != "__pycache__":
            files = [path.relative_to(part.resolve()) for path in part.resolve().rglob("*.py")]
            wanted |= {f"crqat/{part.name}/{path.as_posix()}" for path in files}
    templates = {f"crqat/pipeline/templates/{name}" for name in ("recipe.yaml", "report.html.j2")}
    lists = {f"crqat/pipeline/commands/{name}.json" for name in ("model_survey_networks", "versions")}
    assert held == wanted | templates | lists | {"crqat/py.typed"}


def test_installed_it_works_beside_files_of_the_same_names(wheel: Path, tmp_path: Path) -> None:
    programs = environment(tmp_path / "env", str(wheel))
    folder = users_folder(tmp_path / "project")
    crqat = str(programs / "crqat")
    for command in (
        [crqat, "check", "recipe.yaml"],
        [crqat, "train", "recipe.yaml", "--unchecked", "--nproc", "2", "--set", "model.name=export:build"],
        [str(programs / "python"), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "crqat", "train", "recipe.yaml", "--unchecked", "--set", "seed=3"],
        [crqat, "models", "export:build", "--size", "32"],
    ):  # fmt: skip
        ended = run(command, folder)
        assert ended.returncode == 0, f"{command}: {ended.stdout}{ended.stderr}"
    assert (folder / "runs" / "own" / "train" / "manifest.json").is_file()
    asked = run(
        [str(programs / "python"), "-c", "import crqat, export; print(crqat.__file__, export.__file__)"], folder
    )
    assert asked.stdout.split() == [str(next((tmp_path / "env").rglob("crqat/__init__.py"))), str(folder / "export.py")]


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_no_part_is_imported_by_an_old_name(kind: str, wheel: Path, checkout: Path, tmp_path: Path) -> None:
    install = [str(wheel)] if kind == "wheel" else ["--editable", str(checkout)]
    programs = environment(tmp_path / "env", *install)
    (tmp_path / "own_net.py").write_text(NETWORK)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("pipeline.net", "own_net"))
    ended = run([str(programs / "python"), "-c", MODULES], tmp_path)
    assert "FOUND [] " in ended.stdout, ended.stdout + ended.stderr
    place = ended.stdout.rsplit("FOUND [] ", 1)[1].strip()
    assert Path(place).is_relative_to(checkout if kind == "editable" else tmp_path / "env")


def test_an_sdist_holds_the_links_as_folders(checkout: Path, tmp_path: Path) -> None:
    build = "from setuptools import build_meta; import sys; print(build_meta.build_sdist(sys.argv[1]))"
    ended = run([sys.executable, "-c", build, str(tmp_path)], checkout)
    assert ended.returncode == 0, ended.stderr
    shutil.unpack_archive(next(tmp_path.glob("*.tar.gz")), tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for name in ("train/config.py", "export/config.py", "runtime_eval/config.py", "pipeline/templates/recipe.yaml"):
        assert (unpacked / "src" / "crqat" / name).is_file()
