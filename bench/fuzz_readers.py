"""Coverage-guided fuzzing of every file reader: any input must give a value or a `CrqatError`.

``python -m bench.fuzz_readers --runs 1000000`` (pip install crqat-edge[fuzz]) divides its inputs among the readers,
starts each with the files in tests/frozen, and prints a table. An input that breaks a reader is stored in
bench-out/fuzz and ends the fuzzing of that reader; ``python -m bench.fuzz_readers --reader NAME --replay FILE`` shows
the traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from crqat.core.errors import CrqatError
from crqat.core.progress import quiet

ROOT = Path(__file__).resolve().parent.parent
FROZEN = ROOT / "tests" / "frozen"
OUT = Path("bench-out") / "fuzz"
Read = Callable[[bytes], object]
Reader = tuple[Read, Iterable[bytes]]
_STATISTICS = re.compile(r"cov: (\d+) ft: (\d+)")


def _frozen(*names: str) -> list[bytes]:
    return [path.read_bytes() for name in names for path in sorted(FROZEN.rglob(name))]


def _pictures() -> Iterator[bytes]:
    from PIL import Image

    for kind in ("PNG", "JPEG", "BMP", "WEBP", "TIFF"):
        buffer = io.BytesIO()
        Image.linear_gradient("L").resize((24, 20)).convert("RGB").save(buffer, kind)
        yield buffer.getvalue()


def _bundles(folder: Path) -> Iterator[bytes]:
    """Yield bundles of two files, because the hundred of the frozen bundle take a second to unpack."""
    from crqat.core import run_directory
    from crqat.runtime_eval.board import bundle

    paths = {
        "export/manifest.json": FROZEN / "make.py",
        "crqat/core/errors.py": ROOT / "src" / "crqat" / "core" / "errors.py",
    }
    members = {name: run_directory.sha256_file(path) for name, path in paths.items()}
    bundle.write(bundle.Bundle("run", "1", {"threads": 1}, members), paths, folder / "seed.tar.gz")
    yield (folder / "seed.tar.gz").read_bytes()


def _shards() -> Iterator[bytes]:
    """Yield a WebDataset shard of two samples."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in (("0.jpg", b"0" * 600), ("0.cls", b"0"), ("a/1.png", b"1"), ("a/1.cls", b"1\n")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    yield buffer.getvalue()


def _nncf(folder: Path) -> Reader:
    """Return a reader of NNCF configurations that belong to a state dict of two quantizers."""
    import numpy as np
    import torch

    from crqat.core.grid import Grid
    from crqat.train.nncf import checkpoint as nncf_checkpoint

    grids = {"post_hooks.x__0.0": Grid(np.ones(1, np.float32), 0, 0, 255)}
    grids["pre_hooks.fc/linear/0__1.0"] = Grid(np.ones(2, np.float32), 0, -127, 127, 0)
    quantizers = [nncf_checkpoint.of_grid([hook], grid, 2) for hook, grid in grids.items()]
    nncf_checkpoint.write(nncf_checkpoint.Checkpoint({"fc.weight": torch.ones(2, 3)}, quantizers), folder, "network")
    config = folder / nncf_checkpoint.CONFIG
    seed = config.read_bytes()

    def read(content: bytes) -> None:
        config.write_bytes(content)
        nncf_checkpoint.read(folder)

    return read, [seed]


def _checkpoints() -> Iterator[bytes]:
    import torch

    for zipped in (True, False):
        buffer = io.BytesIO()
        state = torch.nn.Linear(2, 2).state_dict()
        torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
        yield buffer.getvalue()


def _readers(folder: Path) -> dict[str, Reader]:
    """Return all readers with their initial inputs; `folder` holds files that readers need."""
    from crqat.core import grid, image_file, run_directory
    from crqat.core.results import benchmark
    from crqat.pipeline.commands import check, inspect_engine
    from crqat.pipeline.gate import junit, latency_regression
    from crqat.pipeline.gate import rules as gate
    from crqat.pipeline.recipe import recipe
    from crqat.pipeline.recipe import yaml as yaml_reader
    from crqat.runtime_eval.board import bundle
    from crqat.runtime_eval.measure import codes
    from crqat.runtime_eval.runners import onnx_header
    from crqat.runtime_eval.trt import plan_file

    def written(name: str, content: bytes) -> Path:
        path = folder / name
        path.write_bytes(content)
        return path

    def results(content: bytes) -> None:
        read = benchmark.read_results(written("results.json", content))
        verdicts = gate.judge(read, gate.GateConfig()) + latency_regression.judge(read, read, 1.1)
        junit.junit(verdicts, "run")
        gate.exit_code(verdicts)

    def manifest(content: bytes) -> None:
        written(run_directory.MANIFEST, content)
        run_directory.verify_stage(folder)

    def onnx(content: bytes) -> None:
        path = written("m.onnx", content)
        check.check(path)

    def metadata(content: bytes) -> None:
        path = written("m.onnx", content)
        onnx_header.external_tensor(path)
        onnx_header.read(path)

    def plan(content: bytes) -> None:
        path = folder / "m.plan"
        plan_file.sidecar_path(path).write_bytes(content)
        plan_file.read(path)

    def unpacked(content: bytes) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            bundle.unpack(written("b.tar.gz", content), Path(out))

    def weights(name: str) -> Read:
        import torch

        from crqat.train.models.build import load_weights

        return lambda content: load_weights(torch.nn.Linear(2, 2), written(name, content))

    def shards(content: bytes) -> None:
        from crqat.train.data.webdataset import list_shards

        root = folder / "shards"
        root.mkdir(exist_ok=True)
        for part in ("train.tar", "test.tar"):
            (root / part).write_bytes(content)
        list_shards(root, quiet)

    return {
        "recipe": (lambda content: recipe.load(written("r.yaml", content)), _frozen("recipe.yaml")),
        "yaml": (lambda content: yaml_reader.parse_yaml(content.decode(errors="replace"), "r"), _frozen("recipe.yaml")),
        "grids": (lambda content: grid.load_grids(written("grids.json", content)), _frozen("student.grids.json")),
        "manifest": (manifest, _frozen("manifest.json")),
        "results": (results, _frozen("results.json")),
        "engine": (lambda content: inspect_engine.read(written("engine.json", content)), _frozen("engine.json")),
        "sidecar": (plan, _frozen("model.plan.json")),
        "bundle": (unpacked, _bundles(folder)),
        "onnx": (onnx, _frozen("float.onnx", "onnxruntime.onnx", "tensorrt.onnx")),
        "onnx metadata": (metadata, _frozen("float.onnx", "onnxruntime.onnx")),
        "shards": (shards, _shards()),
        "codes": (lambda content: codes.read(written("c.npz", content)), _frozen("onnxruntime.codes.npz")),
        "image": (
            lambda content: image_file.load_image(written("i.png", content), 16, 16, convert=True),
            _pictures(),
        ),
        "nncf": _nncf(folder / "nncf"),
        "safetensors": (weights("w.safetensors"), _frozen("student.safetensors")),
        "pth": (weights("w.pth"), _checkpoints()),
    }


def _fuzz(name: str, corpus: Path, options: list[str]) -> None:
    """Fuzz one reader in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(
        include=[
            "crqat.core",
            "crqat.pipeline",
            "crqat.runtime_eval",
            "yaml",
            "crqat.train.data.webdataset",
            "crqat.train.nncf.checkpoint",
        ]
    ):
        scratch = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))  # noqa: S108
        read, seeds = _readers(scratch)[name]
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)

    def one(content: bytes) -> None:
        with contextlib.suppress(CrqatError):
            read(content)

    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


def _turn(name: str, runs: int) -> list[str]:
    """Fuzz one reader in a separate process and return its row of the table."""
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as corpus:
        command = [
            sys.executable,
            "-m",
            "bench.fuzz_readers",
            "--reader",
            name,
            "--corpus",
            corpus,
            "--runs",
            str(runs),
        ]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    done = re.search(r"Done (\d+) runs in (\d+)", result.stderr)
    covered = _STATISTICS.findall(result.stderr)
    found = re.search(r"Test unit written to (\S+)", result.stderr)
    (OUT / f"{name.replace(' ', '-')}.log").write_text(result.stderr)
    inputs, seconds = done.groups() if done else ("ended early", "-")
    edges = covered[-1][0] if covered else "-"
    crash = found[1] if found else ("none" if result.returncode == 0 else f"exit code {result.returncode}")
    return [name, inputs, seconds, covered[0][0] if covered else "-", edges, crash]


def main() -> None:
    """Run the command line that the module's docstring describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100_000, help="inputs in all")
    parser.add_argument("--reader", help="this one alone, in this process")
    parser.add_argument("--corpus", type=Path, help="with --reader: a folder for the inputs that reach new code")
    parser.add_argument("--replay", type=Path, help="with --reader: this input alone")
    given = parser.parse_args()
    if given.replay:
        with tempfile.TemporaryDirectory() as folder:
            print(_readers(Path(folder))[given.reader][0](given.replay.read_bytes()))
        return
    if given.reader:
        options = [
            f"-runs={given.runs}",
            f"-artifact_prefix={OUT}/",
            "-max_len=100000",
            "-timeout=20",
            "-rss_limit_mb=4096",
        ]
        _fuzz(given.reader, given.corpus, options)
    with tempfile.TemporaryDirectory() as folder:
        names = list(_readers(Path(folder)))
    print("| reader | inputs | seconds | edges at the start | edges | broke it |\n|---|---|---|---|---|---|")
    for name in names:
        print("|", " | ".join(_turn(name, given.runs // len(names))), "|", flush=True)


if __name__ == "__main__":
    main()
