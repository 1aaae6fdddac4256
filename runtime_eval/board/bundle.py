"""A bundle: one archive with everything that a board needs to measure an export, each file's SHA-256 in its manifest.

Standard library only. The archive is a .tar.gz of one folder: `bundle.json` first, then `export/` (a stage that
`run_directory.verify_stage` accepts) and the sources of `crqat.core` and `crqat.runtime_eval`. The same export, sources
and configuration give the same bytes. An archive from elsewhere is unpacked only as far as its manifest describes it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from crqat.core import run_directory, strict_json
from crqat.core.errors import CrqatError, ToolError, UsageError

SCHEMA_VERSION = 1
# The archive's folder, the manifest in it, the export in it.
FOLDER, MANIFEST, EXPORT = "crqat-bundle", "bundle.json", "export"
# What a board needs of crqat, which lies here or, in part, is linked from here.
PACKAGES = ("core", "runtime_eval")
_CRQAT = Path(__file__).parents[2]
_MAX_MANIFEST_BYTES = 16 * 2**20
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Bundle:
    """What a bundle's manifest says.

    Attributes:
        run: The run's name.
        crqat_version: Of the crqat that made it.
        benchmark: How to measure: the keys of `crqat.runtime_eval.config.BenchmarkConfig`.
        members: File name, relative to the bundle's folder, to SHA-256.
        schema_version: Of this file's layout.
    """

    run: str
    crqat_version: str
    benchmark: dict[str, Any]
    members: dict[str, str]
    schema_version: int = SCHEMA_VERSION

    def content(self) -> bytes:
        """The manifest file."""
        return json.dumps(vars(self), indent=1, sort_keys=True).encode()

    @property
    def sha256(self) -> str:
        """Hash of the manifest, and by it of every member: the bundle's identity, however it was compressed."""
        return hashlib.sha256(self.content()).hexdigest()


def describe(export_dir: Path, benchmark: Mapping[str, Any], crqat_version: str) -> tuple[Bundle, dict[str, Path]]:
    """The bundle of an export, and where each of its members lies.

    Args:
        export_dir: A directory written by the `export` stage; its hashes are checked.
        benchmark: How to measure it.
        crqat_version: Of this crqat.

    Raises:
        UsageError: The directory is no export, or a file in it is missing or damaged.
    """
    export_dir = export_dir.resolve()
    manifest = run_directory.verify_stage(export_dir)
    if manifest.stage != EXPORT:
        msg = f"{export_dir}: holds the stage {manifest.stage}, not an export; name the run's directory"
        raise UsageError(msg)
    paths = {f"{EXPORT}/{name}": export_dir / name for name in (*manifest.files, run_directory.MANIFEST)}
    for package in PACKAGES:
        for path in (_CRQAT / package).rglob("*.py"):
            paths[f"crqat/{path.relative_to(_CRQAT).as_posix()}"] = path
    paths["crqat/__init__.py"] = _CRQAT / "__init__.py"
    # `python3 -m runtime_eval .` is the command on a board: the one name beside crqat.
    paths["runtime_eval/__init__.py"] = _CRQAT / "runtime_eval" / "__init__.py"
    paths["runtime_eval/__main__.py"] = _CRQAT / "runtime_eval" / "board" / "bundle_main.py"
    known = {f"{EXPORT}/{name}": digest for name, digest in manifest.files.items()}
    members = {name: known.get(name) or run_directory.sha256_file(path) for name, path in paths.items()}
    how = json.loads(json.dumps(dict(benchmark)))  # as the board will read it
    return Bundle(manifest.payload["run"], crqat_version, how, members), paths


def write(bundle: Bundle, paths: Mapping[str, Path], out: Path) -> None:
    """Write the archive.

    Args:
        bundle: What `describe` gave.
        paths: Member to the file it is made from.
        out: The archive; what is there is replaced once the new one is complete.

    Raises:
        ToolError: It cannot be written.
    """
    temporary = out.with_name(f"{out.name}.part")
    try:
        with (
            temporary.open("wb") as raw,
            gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            content = bundle.content()
            _add(archive, MANIFEST, len(content), io.BytesIO(content))
            for name in sorted(paths):
                with paths[name].open("rb") as file:
                    _add(archive, name, paths[name].stat().st_size, file)
        temporary.replace(out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        msg = f"{out}: cannot be written: {error.strerror or error}; choose another place with --out"
        raise ToolError(msg) from error


def _add(archive: tarfile.TarFile, name: str, size: int, file: IO[bytes]) -> None:
    """A member of which nothing but name and content is of this machine or this day."""
    info = tarfile.TarInfo(f"{FOLDER}/{name}")
    info.size, info.mode, info.mtime = size, 0o644, 0
    archive.addfile(info, file)


def unpack(archive: Path, out: Path) -> Bundle:
    """Unpack an archive into a directory; nothing is written that its manifest does not name.

    Args:
        archive: From anywhere.
        out: An empty directory, which becomes what `verify` accepts. After an error it holds only a part.

    Raises:
        UsageError: It is no bundle, damaged, or holds a link, a device, or a file that its manifest does not describe.
        ToolError: It cannot be read, or `out` cannot be written.
    """
    try:
        with tarfile.open(archive, "r|gz") as members:
            first = members.next()
            if first is None or first.name != f"{FOLDER}/{MANIFEST}" or not first.isreg():
                msg = f"{archive}: no bundle: does not begin with {FOLDER}/{MANIFEST}; make it by crqat bundle"
                raise UsageError(msg)
            if first.size > _MAX_MANIFEST_BYTES:
                msg = f"{archive}: no bundle: its manifest has {first.size} bytes"
                raise UsageError(msg)
            content = _opened(members, first).read()
            bundle = _parse(content, archive)
            (out / MANIFEST).write_bytes(content)
            missing = dict(bundle.members)
            while (member := members.next()) is not None:
                name = _known(member, missing, archive)
                path = out / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if _copy(_opened(members, member), path) != missing.pop(name):
                    msg = f"{archive}: {name} is damaged or altered (its SHA-256 is not the manifest's)"
                    raise UsageError(msg)
    except CrqatError:
        raise
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile):
            raise _no_bundle(archive, error) from error
        msg = f"{archive}: cannot be unpacked into {out}: {error.strerror or error}"
        raise ToolError(msg) from error
    except Exception as error:  # a damaged archive fails in whatever way its bytes lead tarfile to
        raise _no_bundle(archive, error) from error
    if missing:
        msg = f"{archive}: {next(iter(missing))} is missing, which its manifest names"
        raise UsageError(msg)
    return bundle


def _no_bundle(archive: Path, error: Exception) -> UsageError:
    return UsageError(f"{archive}: no bundle, or a truncated one ({error})")


def verify(folder: Path) -> Bundle:
    """Check an unpacked bundle: every file that the manifest names is there, is no link and has its hash.

    Raises:
        UsageError: It is no bundle, or a file is missing, altered or a link.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror}); no bundle"
        raise UsageError(msg) from error
    bundle, root = _parse(content, path), folder.resolve()
    for name, digest in bundle.members.items():
        member = root / name
        if not member.is_file():
            msg = f"{folder / name}: missing"
            raise UsageError(msg)
        if member.resolve() != member:
            msg = f"{folder / name}: a link; a bundle has none"
            raise UsageError(msg)
        if run_directory.sha256_file(member) != digest:
            msg = f"{folder / name}: damaged or altered (its SHA-256 is not the bundle's)"
            raise UsageError(msg)
    return bundle


def _parse(content: bytes, path: Path) -> Bundle:
    """The manifest, checked: what it names lies in its folder."""
    try:
        data = strict_json.parse(content)
        if data["schema_version"] != SCHEMA_VERSION:
            msg = f"{path}: a bundle of schema version {data['schema_version']}, not {SCHEMA_VERSION}; make it anew"
            raise UsageError(msg)
        bundle = Bundle(**data)
        texts = (bundle.run, bundle.crqat_version, *bundle.members, *bundle.members.values())
        sound = all(isinstance(text, str) for text in texts) and isinstance(bundle.benchmark, dict)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        msg = f"{path}: no bundle's manifest ({type(error).__name__}: {error})"
        raise UsageError(msg) from error
    if not sound or bundle.content() != content:
        msg = f"{path}: no bundle's manifest as crqat writes it"
        raise UsageError(msg)
    for name in bundle.members:
        parts = name.split("/")
        if {"", ".", ".."}.intersection(parts) or "\\" in name or "\0" in name or name == MANIFEST:
            msg = f"{path}: names a file outside its folder ({name!r})"
            raise UsageError(msg)
    return bundle


def _known(member: tarfile.TarInfo, missing: Mapping[str, str], archive: Path) -> str:
    """The name of a member that the manifest names and that was not there yet."""
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        msg = f"{archive}: {member.name!r} is a link, a directory or a device; a bundle has plain files only"
        raise UsageError(msg)
    folder, _, name = member.name.partition("/")
    if folder != FOLDER or name not in missing:
        msg = f"{archive}: {member.name!r} is not a file that its manifest names, or comes twice"
        raise UsageError(msg)
    return name


def _opened(members: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    file = members.extractfile(member)
    if file is None:
        msg = f"{member.name} has no content"
        raise tarfile.TarError(msg)
    return file


def _copy(file: IO[bytes], path: Path) -> str:
    """Write a new file and give its SHA-256."""
    digest = hashlib.sha256()
    with path.open("xb") as out:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            out.write(chunk)
    return digest.hexdigest()
