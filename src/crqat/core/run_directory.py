"""Run directories: each stage's files are complete, described by a manifest, and replaced atomically.

``runs/NAME/STAGE`` is a symbolic link to a hidden directory next to it. Replacing a link is atomic, so a reader finds
either the old version or the new one, at any time and after any kill. A reader verifies the hashes before it uses a
file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from crqat.core import strict_json, typed_json
from crqat.core.errors import ToolError, UsageError

_Payload = TypeVar("_Payload")
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
# Operating system errors that mean a place cannot hold the files; any other OSError comes from the stage itself.
_PLACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
_LEFTOVER_SECONDS = 60


@dataclass
class Manifest:
    """Description of a stage's files and of what they were made from.

    Attributes:
        stage: "train", "export", "benchmark", or "benchmark@DEVICE" for another machine.
        key: Hash of everything the stage's result depends on; a stage with an unchanged key is not run again.
        parent: SHA-256 of the previous stage's manifest; None for the first stage.
        config: The resolved recipe.
        environment: Versions, git revision, seed, device.
        payload: Results of the stage for later stages, in the layout of a dataclass of `crqat.core.results`.
        files: Maps relative file names to SHA-256; filled in when the stage is complete.
        schema_version: Version of the manifest's layout.
        inputs: What the result depends on besides the recipe and the parent, by name: versions, files, data; None for a
            stage made before inputs were recorded.
    """

    stage: str
    key: str
    parent: str | None
    config: dict[str, Any]
    environment: dict[str, Any]
    payload: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
    inputs: dict[str, str] | None = None


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def git_revision(directory: Path) -> str:
    """Return the git revision of a directory, with the suffix "-dirty" if files changed; "unknown" outside git."""
    command = ["git", "-C", str(directory), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() if result.returncode == 0 else "unknown"


@contextmanager
def write_stage(run: Path, manifest: Manifest) -> Iterator[Path]:
    """Context manager that yields an empty directory and makes it the stage's current version on a clean exit.

    The exit hashes the files and writes the manifest. If the body raises, the directory is removed and the previous
    version stays current.

    Args:
        run: Directory of the run; created if necessary.
        manifest: Manifest of the stage. Its `files` are filled in at the end; the body may still change its `payload`.

    Raises:
        ToolError: The directory cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        version = Path(tempfile.mkdtemp(prefix=f".{manifest.stage}-", dir=run))
        # The lock is held until the version is current, so that nobody takes it for the leftover of a killed process.
        lock = os.open(version, os.O_RDONLY)
    except OSError as error:
        msg = f"cannot write to {run}: {error.strerror}; choose another place with --runs"
        raise ToolError(msg) from error
    try:
        _try_lock(lock)
        yield from _fill(run, manifest, version)
        _make_current(run, manifest.stage, version)
    finally:
        os.close(lock)


@contextmanager
def write_directory(out: Path, manifest: Manifest) -> Iterator[Path]:
    """Context manager that yields an empty directory and moves it, with its manifest, to `out` on a clean exit.

    Args:
        out: Directory to create. An existing one must be empty or made by this function, which replaces it.
        manifest: See `write_stage`.

    Raises:
        UsageError: `out` is a file, or a directory with files that this function did not write.
        ToolError: The directory cannot be written.
    """
    out = out.absolute()
    if out.exists() and not (out.is_dir() and ((out / MANIFEST).is_file() or not any(out.iterdir()))):
        msg = f"{out}: is a file or has files that crqat did not write; choose an empty directory"
        raise UsageError(msg)
    if (out / MANIFEST).is_file():
        read_manifest(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        version = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        msg = f"cannot write to {out}: {error.strerror}; choose another place"
        raise ToolError(msg) from error
    yield from _fill(out, manifest, version)
    previous = out.with_name(f"{version.name}.before")
    if out.exists():
        out.rename(previous)
    version.rename(out)
    sync(out.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _fill(run: Path, manifest: Manifest, version: Path) -> Iterator[Path]:
    try:
        yield version
        manifest.files = {
            str(path.relative_to(version)): sha256_file(path) for path in sorted(version.rglob("*")) if path.is_file()
        }
        (version / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1, sort_keys=True))
        version.chmod(0o755)
        for path in version.rglob("*"):
            sync(path)
        sync(version)
    except BaseException as error:
        shutil.rmtree(version, ignore_errors=True)
        # An error that names a file elsewhere, such as a temporary one, is reported for that file.
        if isinstance(error, OSError) and error.errno in _PLACE_ERRORS and _concerns(error, version):
            what = f"cannot write the stage {manifest.stage} to {run}: {error.strerror}"
            msg = f"{what}; make room there, or for temporary files (TMPDIR)"
            raise ToolError(msg) from error
        raise


def _concerns(error: OSError, version: Path) -> bool:
    return error.filename is None or version.resolve() in Path(os.fsdecode(error.filename)).resolve().parents


def _make_current(run: Path, stage: str, version: Path) -> None:
    link, temporary = run / stage, run / f"{version.name}.link"
    previous = link.resolve()
    if link.is_dir() and not link.is_symlink():
        # The run was copied without its links. A directory cannot be replaced in one step, so it is moved aside first.
        previous = link.rename(run / f"{version.name}.copied").resolve()
    temporary.symlink_to(version.name)
    temporary.replace(link)
    sync(run)
    _sweep(run, stage, version, previous)


def _sweep(run: Path, stage: str, version: Path, previous: Path) -> None:
    """Remove the previous version and leftovers of killed processes, but no directory that a process has locked."""
    # mkdtemp and `_make_current` append no hyphen, but another device's stage name may begin with this stage's name.
    own = re.compile(rf"\.{re.escape(stage)}-[a-z0-9_]+(\.link|\.copied)?")
    for path in run.iterdir():
        if not own.fullmatch(path.name):
            continue
        # Another process may sweep at the same time and be faster.
        with suppress(FileNotFoundError):
            old = time.time() - path.lstat().st_mtime > _LEFTOVER_SECONDS
            if path.is_symlink():
                if old:
                    path.unlink()
            elif path.name != version.name and (old or path.resolve() == previous):
                descriptor = os.open(path, os.O_RDONLY)
                if _try_lock(descriptor):
                    shutil.rmtree(path, ignore_errors=True)
                os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    """Lock a directory until its descriptor is closed, unless another process holds the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def sync(path: Path) -> None:
    """Make the operating system write the content of a file, or the entries of a directory, to disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds either the old content or the new, never a part of it."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a partial file would keep a full disk full
        raise


def command(stage: str) -> str:
    """Return the command line that runs a stage, without the leading "crqat": "train RECIPE" for "train"."""
    kind, at, _ = stage.partition("@")
    if kind == "perturbation":
        return "sensitivity RECIPE --perturbation"
    return f"{kind} RECIPE --on ssh://HOST" if at else f"{kind} RECIPE"


def read_manifest(directory: Path) -> Manifest:
    """Return a stage's manifest after checking its layout, but not the stage's files.

    Raises:
        UsageError: The manifest is missing or was not written by this version.
        ToolError: The manifest cannot be read.
    """
    path = directory / MANIFEST
    if not directory.exists():
        msg = f"{directory}: no such stage yet; run it first (crqat {command(directory.name)})"
        raise UsageError(msg)
    if not path.is_file():
        msg = f"{path}: missing; run the stage again with --force"
        raise UsageError(msg)
    try:
        data = strict_json.read(path)
        if data["schema_version"] != SCHEMA_VERSION:
            found = data["schema_version"]
            msg = f"{path}: schema version {found}, not {SCHEMA_VERSION}; run the stage again with --force"
            raise UsageError(msg)
        manifest = Manifest(**data)
    except (ValueError, TypeError, KeyError) as error:
        msg = f"{path}: damaged ({type(error).__name__}: {error}); run the stage again with --force"
        raise UsageError(msg) from error
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}"
        raise ToolError(msg) from error
    objects = (manifest.config, manifest.environment, manifest.payload, manifest.files)
    if not all(isinstance(value, dict) for value in objects):
        msg = (
            f"{path}: damaged (config, environment, payload or files is not an object); run the stage again with "
            "--force"
        )
        raise UsageError(msg)
    if manifest.inputs is not None:
        texts = isinstance(manifest.inputs, dict) and all(isinstance(value, str) for value in manifest.inputs.values())
        if not texts:
            msg = f"{path}: damaged (inputs does not map names to texts); run the stage again with --force"
            raise UsageError(msg)
    if not all(isinstance(text, str) for text in (manifest.stage, manifest.key, manifest.parent or "")):
        msg = f"{path}: damaged (stage, key or parent is not a text); run the stage again with --force"
        raise UsageError(msg)
    for name in manifest.files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            msg = f"{path}: names a file outside its directory ({name}); the manifest is not crqat's"
            raise UsageError(msg)
    return manifest


def verify_stage(directory: Path) -> Manifest:
    """Return a stage's manifest after checking that every file in it has the recorded SHA-256.

    Raises:
        UsageError: A file is missing or altered; the message names it.
    """
    manifest = read_manifest(directory)
    for name, expected in manifest.files.items():
        path = directory / name
        if not path.is_file():
            msg = f"{path}: missing; run the stage again with --force"
            raise UsageError(msg)
        if sha256_file(path) != expected:
            msg = (
                f"{path}: altered or damaged: its SHA-256 is not that in the manifest; run the stage again with --force"
            )
            raise UsageError(msg)
    return manifest


def payload_of(cls: type[_Payload], directory: Path, manifest: Manifest) -> _Payload:
    """Return a manifest's payload as the dataclass of its stage.

    Args:
        cls: Dataclass of the stage's payload.
        directory: Directory of the stage, for the message.
        manifest: Manifest of the stage.

    Raises:
        UsageError: The payload has another layout or was written by another version; the message names the key.
    """
    versions = manifest.environment.get("versions")
    writer = versions.get("crqat-edge") if isinstance(versions, dict) else None
    again = f"run the stage again with --force (crqat {command(manifest.stage)})"
    return typed_json.checked(cls, manifest.payload, f"{directory / MANIFEST}: the payload", again, writer)


def manifest_hash(directory: Path) -> str:
    """Return the SHA-256 of a stage's manifest file, which the next stage records as its parent."""
    return sha256_file(directory / MANIFEST)
