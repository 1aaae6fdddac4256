"""One archive for a board: complete, the same bytes twice, and nothing written that its manifest does not name."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from crqat.core import typed_json
from crqat.core.errors import CrqatError, ToolError, UsageError
from crqat.core.progress import Progress, quiet
from crqat.core.results.benchmark import Results, Settings
from crqat.core.results.device import Device
from crqat.core.run_directory import verify_stage
from crqat.runtime_eval.__main__ import measure
from crqat.runtime_eval.benchmark import benchmark
from crqat.runtime_eval.board.bundle import EXPORT, FOLDER, MANIFEST, Bundle, describe, unpack, verify, write
from crqat.runtime_eval.config import BenchmarkConfig
from tests.runtime_eval.conftest import QUICK, WriteExport

# Something for a link to lead to and for a name to lead out to.
OUTSIDE = "outside.txt"

# How to measure, as JSON reads it back.
AS_JSON = {**asdict(QUICK), "require": list(QUICK.require)}


def bundled(export: Path, out: Path) -> Bundle:
    bundle, paths = describe(export, asdict(QUICK), "1.2.3")
    write(bundle, paths, out)
    return bundle


def test_what_is_in_it_and_back(write_export: WriteExport, tmp_path: Path) -> None:
    export, archive, out = write_export(), tmp_path / "b.tar.gz", tmp_path / "out"
    bundle = bundled(export, archive)
    assert (bundle.run, bundle.crqat_version, bundle.benchmark) == ("digits", "1.2.3", AS_JSON)
    out.mkdir()
    assert unpack(archive, out) == verify(out) == bundle
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {MANIFEST, *bundle.members}
    assert {
        "export/float.onnx",
        "export/manifest.json",
        "crqat/core/run_directory.py",
        "runtime_eval/__main__.py",
    } <= files
    assert not [name for name in files if "test" in name or "__pycache__" in name]
    assert verify_stage(out / EXPORT) == verify_stage(export)
    for name, digest in bundle.members.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    with tarfile.open(archive) as members:
        assert {name.split("/")[0] for name in members.getnames()} == {FOLDER}
        assert members.getnames()[1:] == sorted(members.getnames()[1:])


def test_the_same_bytes_twice_and_others_for_another_configuration(write_export: WriteExport, tmp_path: Path) -> None:
    export = write_export()
    first, second, third = (tmp_path / name for name in ("1", "2", "3"))
    bundle = bundled(export, first)
    for path in export.iterdir():
        path.touch()
    assert bundled(export, second).sha256 == bundle.sha256
    assert first.read_bytes() == second.read_bytes()
    other, paths = describe(export, {**asdict(QUICK), "threads": 2}, "1.2.3")
    write(other, paths, third)
    assert other.sha256 != bundle.sha256


def test_an_unpacked_bundle_measures_itself(write_export: WriteExport, tmp_path: Path) -> None:
    export, archive = write_export(), tmp_path / "b.tar.gz"
    bundle = bundled(export, archive)
    local = benchmark(export, QUICK, quiet)
    subprocess.run(["tar", "-xzf", archive], cwd=tmp_path, check=True)  # as a user of a board does it
    folder = tmp_path / FOLDER
    command = [sys.executable, "-m", "runtime_eval"]
    result = subprocess.run([*command, "."], cwd=folder, capture_output=True, text=True, check=True)
    results = json.loads((folder / "results.json").read_text())
    assert results["bundle"] == bundle.sha256
    assert results["config"] == AS_JSON
    for name, model in results["models"].items():
        assert model["accuracy"] == typed_json.to_json(local.models[name].accuracy)
        assert model["codes_on_this_cpu"] == typed_json.to_json(local.models[name].codes_on_this_cpu)
    assert "codes on this CPU (x86): 0 of 128 differ" in result.stdout
    assert "accuracy of float.onnx: 797/797" in result.stderr.splitlines()
    (folder / "export" / "float.onnx").write_bytes(b"another")
    failed = subprocess.run([*command, "."], cwd=folder, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert "export/float.onnx: damaged or altered" in failed.stderr


def test_an_archive_is_measured_as_it_is(
    write_export: WriteExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export, archive = write_export(), tmp_path / "b.tar.gz"
    bundle = bundled(export, archive)

    def fake(folder: Path, config: BenchmarkConfig, progress: Progress) -> Results:
        assert verify_stage(folder) == verify_stage(export)
        return Results("run", {}, Settings(config.threads, latency_rounds=config.latency_rounds), Device("a CPU", None))

    monkeypatch.setattr("crqat.runtime_eval.__main__.benchmark", fake)
    of_bundle, of_export = measure(archive, None), measure(export, 3)
    assert (of_bundle.config, of_bundle.bundle) == (Settings(1, latency_rounds=QUICK.latency_rounds), bundle.sha256)
    assert of_bundle.crqat_version == bundle.crqat_version
    assert measure(archive, 3).config.threads == 3
    assert (of_export.config, of_export.bundle) == (Settings(3, latency_rounds=BenchmarkConfig.latency_rounds), None)
    unknown, paths = describe(export, {"nonsense": 1}, "1.2.3")
    write(unknown, paths, archive)
    with pytest.raises(UsageError, match=r"nonsense.*make the bundle again"):
        measure(archive, None)


def tar(members: list[tuple[tarfile.TarInfo, bytes]], path: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for info, content in members:
            info.size = len(content) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(content))
    return path


def info(name: str, **values: Any) -> tarfile.TarInfo:
    made = tarfile.TarInfo(f"{FOLDER}/{name}" if not name.startswith(("/", "..")) else name)
    for key, value in values.items():
        setattr(made, key, value)
    return made


def manifest(*names: str, content: bytes = b"x") -> tuple[tarfile.TarInfo, bytes]:
    digest = hashlib.sha256(content).hexdigest()
    return info(MANIFEST), Bundle("run", "1", {}, dict.fromkeys(names, digest)).content()


HOSTILE: dict[str, tuple[list[tuple[tarfile.TarInfo, bytes]], str]] = {
    "up": ([manifest("a"), (info(f"../../{OUTSIDE}"), b"x")], "not a file that its manifest names"),
    "up, by name": ([manifest("a"), (info(f"../{OUTSIDE}"), b"x")], "not a file that its manifest names"),
    "up, named": ([manifest(f"../{OUTSIDE}"), (info(f"../{OUTSIDE}"), b"x")], "names a file outside its folder"),
    "absolute": ([manifest("a"), (info(f"/tmp/{OUTSIDE}"), b"x")], "not a file that its manifest names"),  # noqa: S108
    "absolute, named": ([manifest(f"/tmp/{OUTSIDE}")], "names a file outside its folder"),  # noqa: S108
    "itself, named": ([manifest(MANIFEST)], "names a file outside its folder"),
    "symbolic link": ([manifest("a"), (info("a", type=tarfile.SYMTYPE, linkname="/etc/passwd"), b"")], "is a link"),
    "hard link": ([manifest("a"), (info("a", type=tarfile.LNKTYPE, linkname=MANIFEST), b"")], "is a link"),
    "device": ([manifest("a"), (info("a", type=tarfile.CHRTYPE, devmajor=1, devminor=3), b"")], "is a link"),
    "pipe": ([manifest("a"), (info("a", type=tarfile.FIFOTYPE), b"")], "is a link"),
    "folder": ([manifest("a"), (info("a", type=tarfile.DIRTYPE), b"")], "is a link"),
    "unknown": ([manifest("a"), (info("b"), b"x")], "'crqat-bundle/b' is not a file that its manifest names"),
    "twice": ([manifest("a"), (info("a"), b"x"), (info("a"), b"x")], "or appears twice"),
    "other content": ([manifest("a"), (info("a"), b"y")], "a is damaged or altered"),
    "incomplete": ([manifest("a", "b"), (info("a"), b"x")], "b is missing"),
    "no manifest": ([(info("a"), b"x")], "does not begin with crqat-bundle/bundle.json"),
    "no JSON": ([(info(MANIFEST), b"{")], "not a bundle's manifest"),
    "a list": ([(info(MANIFEST), b"[]")], "not a bundle's manifest"),
    "another schema": ([(info(MANIFEST), b'{"schema_version": 9}')], "schema version 9"),
    "numbers": ([(info(MANIFEST), Bundle("r", "1", {}, {"a": 1}).content())], "not a bundle's manifest"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_are_refused(name: str, tmp_path: Path) -> None:
    members, message = HOSTILE[name]
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    with pytest.raises(UsageError, match=message):
        unpack(tar(members, tmp_path / "b.tar.gz"), out)
    assert not [path for path in tmp_path.rglob("*") if path.name == OUTSIDE or path.is_symlink()]
    assert not Path(f"/tmp/{OUTSIDE}").exists()  # noqa: S108


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (lambda content: content[: len(content) // 2], UsageError),
        (lambda content: b"no archive", UsageError),
        (lambda content: bytes.fromhex("1f8b081f"), UsageError),  # promises a name and more, and ends
        (lambda content: gzip.compress(b"no archive" * 100), UsageError),
        (lambda content: content[:5000] + b"\0" * 5000 + content[10000:], UsageError),
        (None, ToolError),
    ],
)
def test_damaged_archives_are_one_error(
    damage: Callable[[bytes], bytes] | None, kind: type[CrqatError], write_export: WriteExport, tmp_path: Path
) -> None:
    archive, out = tmp_path / "b.tar.gz", tmp_path / "out"
    out.mkdir()
    bundled(write_export(), archive)
    if damage is None:
        archive.unlink()
    else:
        archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(kind) as caught:
        unpack(archive, out)
    assert str(archive) in str(caught.value)


def test_an_unpacked_bundle_is_checked_file_by_file(write_export: WriteExport, tmp_path: Path) -> None:
    archive, out = tmp_path / "b.tar.gz", tmp_path / "out"
    out.mkdir()
    bundled(write_export(), archive)
    unpack(archive, out)
    path = out / "crqat" / "core" / "run_directory.py"
    content = path.read_bytes()
    path.write_bytes(content + b"\n")
    with pytest.raises(UsageError, match=r"crqat/core/run_directory\.py: damaged or altered"):
        verify(out)
    path.unlink()
    with pytest.raises(UsageError, match=r"crqat/core/run_directory\.py: missing"):
        verify(out)
    (tmp_path / "elsewhere.py").write_bytes(content)
    path.symlink_to(tmp_path / "elsewhere.py")
    with pytest.raises(UsageError, match=r"crqat/core/run_directory\.py: is a link"):
        verify(out)
    path.unlink()
    shutil.move(out / "crqat" / "core", tmp_path / "core")
    (tmp_path / "core" / "run_directory.py").write_bytes(content)
    (out / "crqat" / "core").symlink_to(tmp_path / "core")
    with pytest.raises(UsageError, match="a link"):
        verify(out)
    (out / MANIFEST).unlink()
    with pytest.raises(UsageError, match="cannot be read"):
        verify(out)


def test_only_an_intact_export_is_bundled_and_only_where_it_can_be_written(
    write_export: WriteExport, tmp_path: Path
) -> None:
    export = write_export()
    bundle, paths = describe(export, {}, "1")
    with pytest.raises(ToolError, match="cannot be written"):
        write(bundle, paths, tmp_path / "nowhere" / "b.tar.gz")
    (export / "float.onnx").write_bytes(b"another")
    with pytest.raises(UsageError, match=r"float\.onnx: altered or damaged"):
        describe(export, {}, "1")
