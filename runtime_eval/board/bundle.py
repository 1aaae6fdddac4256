"""Bundles: one archive with everything a board needs to measure an export, and a SHA-256 for each file.

Standard library only. The archive is a .tar.gz of one folder: `bundle.json` first, then `export/` (a stage that
`run_directory.verify_stage` accepts) and the sources of `crqat.core` and `crqat.runtime_eval`. The same export, sources
and configuration give the same bytes. An untrusted archive is unpacked only as far as its manifest describes it.
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
# The archive's folder, the manifest in it, and the export in it.
FOLDER, MANIFEST, EXPORT = "crqat-bundle", "bundle.json", "export"
# Parts of crqat that a board needs; they lie here or are linked from here.
PACKAGES = ("core", "runtime_eval")
_CRQAT = Path(__file__).parents[2]
_MAX_MANIFEST_BYTES = 16 * 2**20
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Bundle:
    """Manifest of a bundle.

    Attributes:
        run: Name of the run.
        crqat_version: Version of crqat that made the bundle.
        benchmark: Settings of the measurement: keys of `crqat.runtime_eval.config.BenchmarkConfig`.
        members: Maps the name of each file, relative to the bundle's folder, to its SHA-256.
        schema_version: Version of the manifest's layout.
    """

    run: str
    crqat_version: str
    benchmark: dict[str, Any]
    members: dict[str, str]
    schema_version: int = SCHEMA_VERSION

    def content(self) -> bytes:
        """Return the bytes of the manifest file, bundle.json."""
        return json.dumps(vars(self), indent=1, sort_keys=True).encode()

    @property
    def sha256(self) -> str:
        """Hash of the manifest, which identifies the bundle: it covers every member's hash, but not compression."""
        return hashlib.sha256(self.content()).hexdigest()


def describe(export_dir: Path, benchmark: Mapping[str, Any], crqat_version: str) -> tuple[Bundle, dict[str, Path]]:
    """Return the manifest of a new bundle of an export, and the path of the source file of each of its members.

    Args:
        export_dir: Directory written by the `export` stage; its hashes are checked.
        benchmark: Settings of the measurement.
        crqat_version: Version of this crqat.

    Raises:
        UsageError: The directory is not an export, or a file in it is missing or damaged.
    """
    export_dir = export_dir.resolve()
    manifest = run_directory.verify_stage(export_dir)
    if manifest.stage != EXPORT:
        msg = f"{export_dir}: holds the stage {manifest.stage}, not an export; give the directory of a run that has one"
        raise UsageError(msg)
    paths = {f"{EXPORT}/{name}": export_dir / name for name in (*manifest.files, run_directory.MANIFEST)}
    for package in PACKAGES:
        for path in (_CRQAT / package).rglob("*.py"):
            paths[f"crqat/{path.relative_to(_CRQAT).as_posix()}"] = path
    paths["crqat/__init__.py"] = _CRQAT / "__init__.py"
    # A board runs `python3 -m runtime_eval .`, which is the only name besides crqat.
    paths["runtime_eval/__init__.py"] = _CRQAT / "runtime_eval" / "__init__.py"
    paths["runtime_eval/__main__.py"] = _CRQAT / "runtime_eval" / "board" / "bundle_main.py"
    known = {f"{EXPORT}/{name}": digest for name, digest in manifest.files.items()}
    members = {name: known.get(name) or run_directory.sha256_file(path) for name, path in paths.items()}
    how = json.loads(json.dumps(dict(benchmark)))  # as the board will read it
    return Bundle(manifest.payload["run"], crqat_version, how, members), paths


def write(bundle: Bundle, paths: Mapping[str, Path], out: Path) -> None:
    """Write a bundle as a .tar.gz archive.

    Args:
        bundle: Bundle from `describe`.
        paths: Maps the name of each member to the file whose content it gets.
        out: Path of the archive; an existing one is replaced once the new one is complete.

    Raises:
        ToolError: The archive cannot be written.
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
    """Add a file to the archive with its name and content alone: no owner, time or permissions of this machine."""
    info = tarfile.TarInfo(f"{FOLDER}/{name}")
    info.size, info.mode, info.mtime = size, 0o644, 0
    archive.addfile(info, file)


def unpack(archive: Path, out: Path) -> Bundle:
    """Unpack an archive into a directory; only files that its manifest names are written.

    Args:
        archive: Archive from any source, possibly untrusted.
        out: An empty directory. On success, `verify` accepts it; after an error, it holds only a part of the bundle.

    Raises:
        UsageError: The archive is not a bundle, is damaged, or holds a link, a device or a file that its manifest does
            not describe.
        ToolError: The archive cannot be read, or `out` cannot be written.
    """
    try:
        with tarfile.open(archive, "r|gz") as members:
            first = members.next()
            if first is None or first.name != f"{FOLDER}/{MANIFEST}" or not first.isreg():
                msg = f"{archive}: not a bundle: does not begin with {FOLDER}/{MANIFEST}; make it with crqat bundle"
                raise UsageError(msg)
            if first.size > _MAX_MANIFEST_BYTES:
                msg = f"{archive}: not a bundle: its manifest has {first.size} bytes, more than crqat writes"
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
                    msg = f"{archive}: {name} is damaged or altered: its SHA-256 is not that in the manifest"
                    raise UsageError(msg)
    except CrqatError:
        raise
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile):
            raise _no_bundle(archive, error) from error
        msg = f"{archive}: cannot be unpacked into {out}: {error.strerror or error}"
        raise ToolError(msg) from error
    except Exception as error:  # what tarfile raises depends on the damaged bytes
        raise _no_bundle(archive, error) from error
    if missing:
        msg = f"{archive}: {next(iter(missing))} is missing, although its manifest names it; make the bundle again"
        raise UsageError(msg)
    return bundle


def _no_bundle(archive: Path, error: Exception) -> UsageError:
    return UsageError(f"{archive}: not a bundle, or truncated ({error})")


def verify(folder: Path) -> Bundle:
    """Check that every file in the manifest of an unpacked bundle exists, is no link and has its hash.

    Raises:
        UsageError: The folder is not a bundle, or a file is missing, altered or a link.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror}); not a bundle"
        raise UsageError(msg) from error
    bundle, root = _parse(content, path), folder.resolve()
    for name, digest in bundle.members.items():
        member = root / name
        if not member.is_file():
            msg = f"{folder / name}: missing, although bundle.json lists it; unpack the bundle again"
            raise UsageError(msg)
        if member.resolve() != member:
            msg = f"{folder / name}: is a link, which a bundle must not contain"
            raise UsageError(msg)
        if run_directory.sha256_file(member) != digest:
            msg = (
                f"{folder / name}: damaged or altered: its SHA-256 is not that in bundle.json; unpack the bundle again"
            )
            raise UsageError(msg)
    return bundle


def _parse(content: bytes, path: Path) -> Bundle:
    """Return a bundle's manifest after checking its layout, and that all files it names lie in its folder."""
    try:
        data = strict_json.parse(content)
        if data["schema_version"] != SCHEMA_VERSION:
            msg = f"{path}: a bundle of schema version {data['schema_version']}, not {SCHEMA_VERSION}; make it again"
            raise UsageError(msg)
        bundle = Bundle(**data)
        texts = (bundle.run, bundle.crqat_version, *bundle.members, *bundle.members.values())
        sound = all(isinstance(text, str) for text in texts) and isinstance(bundle.benchmark, dict)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        msg = f"{path}: not a bundle's manifest ({type(error).__name__}: {error})"
        raise UsageError(msg) from error
    if not sound or bundle.content() != content:
        msg = f"{path}: not a bundle's manifest: it differs from what crqat writes; make the bundle again"
        raise UsageError(msg)
    for name in bundle.members:
        parts = name.split("/")
        if {"", ".", ".."}.intersection(parts) or "\\" in name or "\0" in name or name == MANIFEST:
            msg = f"{path}: names a file outside its folder ({name!r})"
            raise UsageError(msg)
    return bundle


def _known(member: tarfile.TarInfo, missing: Mapping[str, str], archive: Path) -> str:
    """Return a member's name after checking that it is a plain file, and one of those `missing` so far."""
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        msg = f"{archive}: {member.name!r} is a link, a directory or a device; a bundle has plain files only"
        raise UsageError(msg)
    folder, _, name = member.name.partition("/")
    if folder != FOLDER or name not in missing:
        msg = f"{archive}: {member.name!r} is not a file that its manifest names, or appears twice"
        raise UsageError(msg)
    return name


def _opened(members: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    file = members.extractfile(member)
    if file is None:
        msg = f"{member.name} has no content"
        raise tarfile.TarError(msg)
    return file


def _copy(file: IO[bytes], path: Path) -> str:
    """Write a new file and return its SHA-256."""
    digest = hashlib.sha256()
    with path.open("xb") as out:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            out.write(chunk)
    return digest.hexdigest()
